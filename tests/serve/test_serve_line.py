"""The queue of requests: a job that breaks costs its own request alone, and the client learns what concerns it."""

import asyncio
import threading

import pytest

from agentlab.errors import StorageError
from agentlab.serve.line import Job, Line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StorageError("the disk is full"), "the disk is full"),
        (RuntimeError("no such key in /home/tomas/secret"), "the server failed; its log says why"),
    ],
)
def test_a_job_that_breaks_tells_what_is_known_and_logs_the_rest(error, told, caplog):
    async def ask():
        def answer(job):
            if job is broken:
                raise error
            job.push("answered")

        broken, next_one = Job(None), Job(None)
        line = Line(answer, lambda: None, places=2)
        try:
            line.submit(broken)
            line.submit(next_one)
            return [await asyncio.wait_for(job.news.get(), 10) for job in (broken, next_one)]
        finally:
            line.close()

    problem, answered = asyncio.run(ask())
    assert (problem.status, problem.message, problem.code, problem.reason) == (500, told, "answer_failed", "failed")
    assert answered == "answered"  # the thread lives on
    assert str(error) in caplog.text


def test_what_breaks_between_two_jobs_costs_none_of_them(caplog):
    async def ask():
        def idle():
            raise RuntimeError("the folder of the run is gone")

        job = Job(None)
        line = Line(lambda job: job.push("answered"), idle, places=2)
        try:
            line.submit(job)
            return await asyncio.wait_for(job.news.get(), 10)
        finally:
            line.close()

    assert asyncio.run(ask()) == "answered"
    assert "the folder of the run is gone" in caplog.text


def test_a_job_whose_turn_is_cut_off_before_it_begins_is_told():
    async def ask():
        idling, over = threading.Event(), threading.Event()

        def idle():  # a champion is loaded, which takes a while
            if line.busy:
                idling.set()
                over.wait(10)

        line = Line(lambda job: job.push("answered"), idle, places=2)
        try:
            job = Job(None)
            line.submit(job)
            await asyncio.to_thread(idling.wait, 10)
            line.drain()
            line.cancel_running()
            over.set()
            return await asyncio.wait_for(job.news.get(), 10)
        finally:
            over.set()
            line.close()

    told = asyncio.run(ask())
    assert (told.status, told.code) == (503, "shutting_down")
