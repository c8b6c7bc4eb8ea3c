"""What another process does in between: forgetting, writing, holding the lock."""

import contextlib
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner

from agentlab.cli import main
from agentlab.errors import MemoryStoreError
from agentlab.memory import MemoryItem

from .helpers import HashingEmbedder, Memory, contents, everything, open_memory

SECRET = "Zebrafinch7731"


def left(path):
    return [name for name, data in everything(path).items() if SECRET.lower().encode() in data.lower()]


class Interrupted(HashingEmbedder):
    """The embedder, calling `then` once when it is given a text with `word` in it."""

    def __init__(self, word, then):
        super().__init__()
        self.word, self.then = word, then

    def embed(self, texts):
        if self.then is not None and any(self.word in text for text in texts):
            then, self.then = self.then, None
            then()
        return super().embed(texts)


def forget_first(path, word):
    with open_memory(path) as other:
        other.forget(other.search(word)[0].memory_id)


def test_a_summary_keeps_nothing_that_is_forgotten_while_it_is_written(path):
    done = []

    def summariser(turns):
        if not done:
            done.append(True)
            forget_first(path, "vault")
        return " ".join(turn.user_input for turn in turns)

    with open_memory(path) as memory:
        memory.conversation("s").add(f"The vault code is {SECRET}.", "Noted.")
        talk = memory.conversation("s", summariser=summariser)
        number = 0
        while not done:
            number += 1
            talk.add(f"Sentence {number} about the harbour and ship {number}. " * 20, f"I see {number}.")
        assert not any(SECRET in part.text for part in talk.summary())
        assert left(path) == []
        talk.add("One more sentence about the harbour.", "I see it.")
        assert talk.summary(), "the next turn summarises what stays"


def test_an_answer_made_with_what_was_forgotten_meanwhile_is_not_kept(path):
    with open_memory(path) as memory:
        secret = memory.remember(f"My passphrase is {SECRET}.", memory_type="knowledge")
        talk = memory.conversation("s")
        memory.forget(secret)
        with pytest.raises(MemoryStoreError, match="forgotten meanwhile"):
            talk.add("What is my passphrase?", f"It is {SECRET}.", context_used=[secret])
        with pytest.raises(MemoryStoreError, match=f"{secret} was forgotten"):
            memory.remember(f"The user has {SECRET}", source="agent", derived_from=[secret])
        with pytest.raises(MemoryStoreError, match=f"{secret} was forgotten"):
            memory.remember_many([MemoryItem(memory_id="", content=f"It is {SECRET}", derived_from=[secret])])
        with pytest.raises(MemoryStoreError, match=f"{secret} was forgotten"):
            memory.remember_many([MemoryItem(memory_id=secret, content="under the forgotten id")])
        assert (talk.turns(), contents(memory.items()), left(path)) == ([], [], [])


def test_a_turn_whose_words_are_forgotten_before_it_is_stored_is_not_kept(path):
    """Between the memories of a turn and the turn itself there is a moment in which somebody may forget."""
    embedder = Interrupted("Good to know", lambda: forget_first(path, "passphrase"))
    with Memory.open(path, embedder=embedder) as memory:
        talk = memory.conversation("s")
        with pytest.raises(MemoryStoreError, match="forgotten meanwhile"):
            talk.add(f"My passphrase is {SECRET}.", "Good to know that.")
        assert (talk.turns(), contents(memory.items()), left(path)) == ([], [], [])
        assert memory.doctor().clean


def at_statement(memory, part, then):
    """Run `then` once, just before `memory` executes an SQL statement with `part` in it."""
    db, pending = memory._core.store.db, [then]

    def trace(statement):
        if part in statement and pending:
            pending.pop()()

    db.set_trace_callback(trace)


def test_a_memory_that_is_forgotten_while_it_is_looked_at_is_no_damage(path):
    with open_memory(path) as memory, open_memory(path) as other:
        shown = memory.remember("The kettle is broken.", session_id="a")
        at_statement(memory, "SELECT vector FROM chunks", lambda: other.forget(shown))
        assert memory.get(shown).content == "The kettle is broken.", "as it was when the reading began"
        assert memory.damage() == []
        with pytest.raises(MemoryStoreError, match="no memory"):
            memory.get(shown)


def test_a_memory_that_is_forgotten_while_it_is_consolidated_is_no_damage(path):
    with open_memory(path) as memory, open_memory(path) as other:
        one = memory.remember("I work on Mondays only", session_id="a")
        memory.remember("I work on Mondays only", session_id="b")
        at_statement(memory, "SELECT vector FROM chunks", lambda: other.forget(one))
        memory.consolidate()
        assert memory.damage() == []
        assert memory.doctor().clean


def test_two_threads_that_forget_and_look_find_no_damage(path):
    wrong, end = [], time.monotonic() + 1.5

    def work(name):
        with open_memory(path) as memory:
            number = 0
            while time.monotonic() < end:
                number += 1
                try:
                    for session in "ab":
                        memory.remember(f"fact {number % 5} about topic{number % 3}", session_id=session)
                    memory.consolidate()
                    for hit in memory.recall(f"topic{number % 3}", k=2):
                        memory.get(hit.memory_id)
                    memory.forget(memory.recall("fact", k=1)[0].memory_id)
                except (MemoryStoreError, IndexError) as error:
                    if "damaged" in str(error):
                        wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(name,)) for name in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_conversation_begins_and_is_read_while_somebody_else_writes(path):
    with open_memory(path) as memory:
        memory.conversation("s").add("My cat is called Tom.", "Noted.")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            started = time.monotonic()
            talk = memory.conversation("s", user_id="ana")
            assert [turn.user_input for turn in talk.window()] == ["My cat is called Tom."]
            assert talk.summary() == []
            new = memory.conversation("new", user_id="ana")
            assert new.turns() == []
            assert (new.session().user_id, new.session().conversation_count) == ("ana", 0)
            assert time.monotonic() - started < 1
            writer.execute("ROLLBACK")
        assert [session.session_id for session in memory.sessions()] == ["s"], "a session begins with its first turn"
        memory.conversation("new", user_id="ana").add("Hello there.", "Good day.")
        assert {session.session_id: session.user_id for session in memory.sessions()} == {"s": "", "new": "ana"}


def test_what_a_process_writes_that_has_the_memory_open_twice_is_not_lost(path, request):
    """Closing any handle on a file drops POSIX locks of the whole process: another one then took the log away."""
    elsewhere = (
        "import sys, pathlib\nsys.path.insert(0, sys.argv[1])\nfrom tests.memory.helpers import open_memory\n"
        "with open_memory(pathlib.Path(sys.argv[2])) as memory: print(len(memory))"
    )

    def look():
        root = str(request.config.rootpath)
        done = subprocess.run([sys.executable, "-c", elsewhere, root, str(path)], cwd=root, capture_output=True)
        return int(done.stdout)

    with open_memory(path) as memory:
        memory.remember("The kettle is broken.")
        with open_memory(path):
            pass
        with open_memory(path) as again:
            assert look() == 1
            memory.remember("The lamp is red.")
            again.remember("The door is green.")
            assert look() == 3


def test_who_forgets_is_told_that_a_reader_keeps_the_bytes(path):
    with open_memory(path) as memory:
        secret = memory.remember(f"It is {SECRET}.", memory_type="knowledge")
        assert memory.traces() == []
        with open_memory(path) as reader, reader._core.store.reading() as db:
            db.execute("SELECT content FROM memories").fetchone()
            result = CliRunner().invoke(main, ["memory", "forget", secret, "--file", str(path)])
            assert result.exit_code == 0, result.output
            assert f"forgotten: {secret}" in result.output
            assert "not everywhere: another program is reading" in result.output
            assert left(path), "the test must be able to fail"
            assert len(memory.traces()) == 1
        memory.remember("a write after that")
        assert memory.traces() == []
        assert left(path) == []
