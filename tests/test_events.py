"""The journal: what is appended can be read by others at once, and a torn line costs only itself."""

import multiprocessing
import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from agentlab import events
from agentlab.events import Journal, Promoted, TrainingStep, Warned


def step(number):
    return TrainingStep(candidate="g000-c00", step=number, steps=9, loss=1.5, tokens=10, seconds=0.1)


@given(st.text())
def test_any_message_survives_the_journal(text):
    assert events.parse(Warned(message=text).to_json()) is not None


@given(st.text())
def test_parsing_never_raises(line):
    events.parse(line)


def test_what_is_appended_is_replayed(tmp_path):
    journal = Journal(tmp_path / "run" / "events.jsonl")
    written = [step(1), Promoted(generation=0, adapter="g000-c00", previous="base", below_threshold=False)]
    for event in written:
        journal.append(event)
    assert list(journal.replay()) == written


def test_torn_line_is_left_out_and_the_next_event_is_not_glued_to_it(tmp_path):
    journal = Journal(tmp_path / "events.jsonl")
    journal.append(step(1))
    with open(journal.path, "a") as file:
        file.write('{"kind": "warned", "mess')  # a kill in the middle of a write
    assert list(journal.replay())[-1].step == 1
    journal.append(step(2))
    assert [event.step for event in journal.replay()] == [1, 2]


def test_events_of_later_versions_are_passed_over(tmp_path):
    journal = Journal(tmp_path / "events.jsonl")
    journal.path.write_text(
        '{"kind": "from_the_future", "x": 1}\n{"kind": "warned", "message": "m", "time_s": 1, "new": 2}\n'
    )
    assert list(journal.replay()) == [Warned(message="m", time_s=1)]


def test_following_sees_events_of_another_thread_and_ends_with_it(tmp_path):
    journal = Journal(tmp_path / "events.jsonl")
    journal.append(step(1))

    def write():
        for number in range(2, 6):
            time.sleep(0.05)
            journal.append(step(number))

    worker = threading.Thread(target=write)
    worker.start()
    seen = [event.step for event in journal.follow(alive=worker.is_alive, poll_s=0.01)]
    assert seen == [1, 2, 3, 4, 5]


def test_follow_from_an_offset_skips_what_was_before(tmp_path):
    journal = Journal(tmp_path / "events.jsonl")
    journal.append(step(1))
    offset = journal.size()
    journal.append(step(2))
    assert [event.step for event in journal.follow(offset, alive=lambda: False)] == [2]


def _append_many(path, start):
    for number in range(start, start + 200):
        Journal(path).append(step(number))


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "events.jsonl"
    Journal(path).append(step(0))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path, start)) for start in (1000, 2000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sum(1 for _ in Journal(path).replay()) == 401
