"""The queue before the engine: jobs are answered one at a time, in the order in which they came."""

import asyncio
import collections
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from agentlab.errors import AgentlabError
from agentlab.serve.asking import Ask
from agentlab.serve.problems import Problem, shutting_down

_LOG = logging.getLogger("agentlab.serve")
_WEIGHT = 0.2  # of the newest answer in the mean that Retry-After is made of


class Job:
    """One request on its way. What happens to it arrives in `news`, in the event loop of the request."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.news: asyncio.Queue[Any] = asyncio.Queue()
        self.cancel = threading.Event()
        self.arrived = time.monotonic()
        self._loop = asyncio.get_running_loop()

    @property
    def waited_s(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self.arrived

    @property
    def left_s(self) -> float:
        """Seconds until its deadline, counted from when it came; infinite without one."""
        return math.inf if self.ask.deadline_s is None else self.ask.deadline_s - self.waited_s

    def push(self, item: Any) -> None:
        """Tell the request something; from any thread. A loop that is closed has nobody to tell."""
        try:
            self._loop.call_soon_threadsafe(self.news.put_nowait, item)
        except RuntimeError:
            self.cancel.set()


class Line:
    """A bounded queue and the thread that works on it.

    answer(job) works on one job and pushes its news; idle() is called between two jobs, and every `poll_s` seconds
    while there is none.
    """

    def __init__(
        self, answer: Callable[[Job], None], idle: Callable[[], None], places: int, poll_s: float = 1.0
    ) -> None:
        self.places = places
        self._answer = answer
        self._idle = idle
        self._poll_s = poll_s
        self._jobs: collections.deque[Job] = collections.deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._draining = self._closed = False
        self._mean_s = 1.0
        self._thread = threading.Thread(target=self._work, name="serve", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Jobs that wait for their turn."""
        return len(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether an answer is being worked on."""
        return self._running is not None

    @property
    def alive(self) -> bool:
        """Whether jobs are taken and worked on."""
        return self._thread.is_alive() and not self._draining

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Problem: 429 when every place is taken, 503 while shutting down."""
        with self._changed:
            if self._draining:
                raise shutting_down()
            if len(self._jobs) >= self.places:
                after_s = math.ceil(min(60.0, max(1.0, self._mean_s * len(self._jobs))))
                raise Problem(
                    429, f"{self.places} requests wait already; ask again in {after_s} s", code="queue_full",
                    reason="queue_full", headers={"Retry-After": str(after_s)},
                )  # fmt: skip
            self._jobs.append(job)
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """Nobody wants this answer any more: it leaves the queue, or its work ends at the next token."""
        job.cancel.set()
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def drain(self) -> None:
        """Take no more jobs and send those away that wait; what is being answered goes on."""
        with self._changed:
            self._draining = True
            waiting, self._jobs = self._jobs, collections.deque()
            self._changed.notify()
        for job in waiting:
            job.push(shutting_down())

    def cancel_running(self) -> None:
        """End the answer that is being worked on."""
        if (job := self._running) is not None:
            job.cancel.set()

    def close(self, wait_s: float = 10.0) -> None:
        """Drain, cancel, and end the thread; harmless when repeated."""
        self.drain()
        self.cancel_running()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(wait_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs and not self._closed:
                    self._changed.wait(self._poll_s)
                if self._closed:
                    return
                job = self._running = self._jobs.popleft() if self._jobs else None
            try:
                self._idle()
            except Exception:  # what is done between two jobs is neither's
                _LOG.exception("what is done between two answers broke")
            try:
                if job is not None and not job.cancel.is_set():
                    started = time.monotonic()
                    self._answer(job)
                    self._mean_s += _WEIGHT * (time.monotonic() - started - self._mean_s)
                elif job is not None:  # its turn was cut off before it began; who has withdrawn does not listen
                    job.push(shutting_down())
            except Exception as error:  # one job's failure is not the next one's
                _LOG.exception("an answer broke")
                if job is not None:
                    # what nobody foresaw may name files and more of this machine
                    known = isinstance(error, AgentlabError)
                    what = str(error) if known else "the server failed; its log says why"
                    job.push(Problem(500, what, code="answer_failed", reason="failed"))
            finally:
                self._running = None
