"""SIGKILL at random moments under four writing processes: what was acknowledged is there, once, and as it was told."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from .helpers import open_memory

WRITERS = 4
WRITER = """
import os, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.memory.helpers import open_memory
memory = open_memory(Path(sys.argv[2]))
acknowledged = open(sys.argv[3], "a")
name, chance = sys.argv[4], random.Random(sys.argv[4])
number, mine, talk = 0, [], memory.conversation(f"talk {sys.argv[4]}")
while True:
    number += 1
    text = f"writer {name} says {number} of {chance.choice('red blue green'.split())}"
    memory_id = memory.remember(text, session_id=name)
    acknowledged.write(f"+{memory_id}\\t{text}\\n")
    acknowledged.flush()
    mine.append(memory_id)
    if number % 3 == 0:
        memory.recall(text, k=2)
    if number % 7 == 0:
        memory.remember_many([f"{text} batch {part}" for part in range(5)])
    if number % 11 == 0:
        turn = talk.add(f"Ship {name} {number} came in.", f"Harbour {number} has ship {name}.")
        acknowledged.write(f"t{turn.conversation_id}\\t{turn.user_input}\\n")
        acknowledged.flush()
    if number % 22 == 0:
        memory.consolidate()
        talk.add("Never mind this one.", "As you like.")
        talk.undo()
    if number % 25 == 0:
        gone = mine.pop(chance.randrange(len(mine)))
        acknowledged.write(f"?{gone}\\n")
        acknowledged.flush()
        memory.forget(gone)
        acknowledged.write(f"-{gone}\\n")
        acknowledged.flush()
"""


def start(path, folder, root, name):
    """A writer in a process group of its own; it acknowledges into a file, line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(path), str(folder / f"{name}.log"), name],
        cwd=root, stderr=open(folder / f"{name}.err", "a"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def check(path, folder):
    """Everything acknowledged is there, once, as told; everything whose forgetting was acknowledged is not."""
    told, turns, doubtful, forgotten = {}, {}, set(), set()
    for log in folder.glob("*.log"):
        # the last line may be cut off by the kill: then it was not acknowledged
        for line in log.read_text().split("\n")[:-1]:
            memory_id, _, text = line[1:].partition("\t")
            if line[0] == "+":
                told[memory_id] = text
            elif line[0] == "t":
                turns[memory_id] = text
            elif line[0] == "?":
                doubtful.add(memory_id)
            else:
                forgotten.add(memory_id)
    with open_memory(path) as memory:
        items = list(memory.items())
        report = memory.doctor()
        assert report.clean, report.problems
        there = {item.memory_id: item.content for item in items}
        assert len(there) == len(items)
        texts = [(item.session_id, item.content) for item in items]
        assert len(set(texts)) == len(texts), "something was doubled"
        lost = [memory_id for memory_id in told if memory_id not in there and memory_id not in doubtful]
        assert lost == []
        assert [memory_id for memory_id in told if there.get(memory_id, told[memory_id]) != told[memory_id]] == []
        assert not forgotten & there.keys()
        talked = [turn for one in memory.sessions() for turn in memory.conversation(one.session_id).turns(10**6)]
        assert {turn.conversation_id: turn.user_input for turn in talked}.items() >= turns.items()
        ships = [turn.user_input for turn in talked if turn.user_input.startswith("Ship")]
        assert len(set(ships)) == len(ships), "a turn was doubled"
        batches = {}
        for item in items:
            if " batch " in item.content:
                batches.setdefault(item.content.split(" batch ")[0], []).append(item.content)
        assert all(len(parts) == 5 for parts in batches.values()), "a batch was stored in part"
        for item in items[-3:]:
            found = memory.recall(item.content, k=10, session_id=item.session_id, count=False)
            assert item.content in [hit.content for hit in found]
    return len(told)


def wait_for_acknowledgements(folder, writers, count):
    """Return when `count` more lines were acknowledged, so that a slow machine is killed at work too."""

    def lines():
        return sum(log.read_bytes().count(b"\n") for log in folder.glob("*.log"))

    before, deadline = lines(), time.monotonic() + 120
    while lines() < before + count:
        assert time.monotonic() < deadline
        assert all(writer.poll() is None for writer in writers), "a writer ended by itself"
        time.sleep(0.01)


def kill_while_writing(path, folder, root, kills, seed):
    chance = random.Random(seed)
    run = iter(range(10**9))
    writers = [start(path, folder, root, f"w{next(run)}") for _ in range(WRITERS)]
    try:
        for _ in range(kills):
            wait_for_acknowledgements(folder, writers, 5)
            time.sleep(chance.uniform(0.0, 0.3))
            victims = chance.sample(range(WRITERS), chance.choice((1, 1, 2, WRITERS)))
            for number in victims:
                assert writers[number].poll() is None, "a writer ended by itself"
                writers[number].send_signal(signal.SIGKILL)
            for number in victims:
                writers[number].wait()
                writers[number] = start(path, folder, root, f"w{next(run)}")
        time.sleep(0.5)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    errors = "".join(file.read_text() for file in folder.glob("*.err"))
    assert errors == "", errors[-2000:]
    return check(path, folder)


def test_six_kills(path, tmp_path, request):
    logs = tmp_path / "logs"
    logs.mkdir()
    assert kill_while_writing(path, logs, request.config.rootpath, 6, seed=1) > 20


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hundred_kills(path, tmp_path, request):
    logs = tmp_path / "logs"
    logs.mkdir()
    assert kill_while_writing(path, logs, request.config.rootpath, 200, seed=2) > 200
