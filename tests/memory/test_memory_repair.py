"""Repair: everything intact comes back, what is lost is named, nobody's acknowledged write goes missing."""

import contextlib
import gzip
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from agentlab import Memory
from agentlab.cli import main
from agentlab.errors import MemoryStoreError, StorageError
from agentlab.memory import repair as repairing
from agentlab.memory import schema, sealed

from .helpers import HashingEmbedder, contents, digest, flip, open_memory


def repair(path):
    return Memory.repair(path, embedder=HashingEmbedder())


def facts(count):
    return [f"fact {i} about topic{i % 40} and place{i}" for i in range(count)]


def test_living_memories_stay_in_recall_after_a_repair(path):
    """A repair numbers rows anew, and tombstones kept the old numbers: views buried who has them now."""
    with open_memory(path) as memory:
        ids = memory.remember_many(facts(6))
        for number in range(5):
            memory.remember(f"later note number {number} about river{number}")
        memory.forget(ids[1], ids[2])
    flip(path, path.read_bytes().index(b"fact 5 about") + 3)
    repair(path)
    with open_memory(path) as memory, open_memory(path) as other:
        assert memory.recall("place3", words_only=True)
        other.remember("a new note by another process")
        for number in (0, 3, 4):
            assert contents(memory.recall(f"place{number}", k=1, words_only=True)) == [facts(6)[number]]
        assert {stone.memory_id for stone in memory.tombstones()} == {ids[1], ids[2]}


def pages(path, table, kind):
    with contextlib.closing(sqlite3.connect(path)) as db:
        query = "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = ? ORDER BY pageno"
        return [number for (number,) in db.execute(query, (table, kind))]


@pytest.fixture
def full(path):
    """A closed memory of 560 and something of every other kind, in one file."""
    with open_memory(path) as memory:
        memory.remember_many(facts(400))
        talk = memory.conversation("s", user_id="ana")
        for number in range(80):
            talk.add(f"A question number {number} about topic1?", f"An answer with place{900 + number}.")
        memory.forget(memory.remember("gone soon"))
        assert len(memory) == 560
    return path


def test_a_destroyed_page_of_memories_is_named_memory_by_memory(full):
    leaves = pages(full, "memories", "leaf")
    number = leaves[len(leaves) // 2]
    with contextlib.closing(sqlite3.connect(full)) as db:
        there = {memory_id for (memory_id,) in db.execute("SELECT memory_id FROM memories")}
    flip(full, (number - 1) * 4096, 4096)
    report = repair(full)
    with open_memory(full) as memory:
        left = {item.memory_id for item in memory.items()}
        assert memory.doctor().clean
        assert 500 < len(left) < 560
    (said,) = report.problems
    assert said.startswith(f"{560 - len(left)} memories are lost: ")
    assert set(said.partition(": ")[2].removesuffix(", …").split(", ")) <= there - left
    assert report.memories == len(left)
    result = CliRunner().invoke(main, ["memory", "doctor", str(full)])
    assert result.exit_code == 0, result.output


def test_what_is_lost_ends_the_command_with_an_error(full):
    """With intact vectors nothing is embedded, so the command needs no model."""
    flip(full, (pages(full, "memories", "leaf")[5] - 1) * 4096, 4096)
    result = CliRunner().invoke(main, ["memory", "doctor", str(full), "--repair", "--model", "hashing-64"])
    assert result.exit_code == 9
    assert "memories are lost: m-" in result.output
    assert "now holds the rest" in result.output
    assert "is whole" not in result.output
    kept = next(full.parent.glob("memory.db.damaged-*"))
    result = CliRunner().invoke(main, ["memory", "doctor", str(full), "--drop-kept"])
    assert (result.exit_code, kept.exists()) == (0, False)


@pytest.mark.parametrize("table", ["memories", "chunks", "turns"])
def test_a_destroyed_root_costs_nothing_where_the_leaves_are_whole(full, table):
    (root, *_) = pages(full, table, "internal")
    flip(full, (root - 1) * 4096, 4096)
    report = repair(full)
    assert report.problems == []
    with open_memory(full) as memory:
        assert len(memory) == 560
        assert memory.doctor().clean
        assert len(memory.conversation("s").turns(1000)) == 80
        assert contents(memory.recall("place7", k=1, count=False)) == [facts(8)[7]]


@pytest.mark.parametrize("where", ["meta", "schema"])
def test_a_damaged_first_page_or_table_of_facts_is_repaired(full, where):
    if where == "schema":
        flip(full, 100, 3000)
    else:
        flip(full, (pages(full, "meta", "leaf")[0] - 1) * 4096, 4096)
    before = digest(full)
    with contextlib.suppress(MemoryStoreError):
        open_memory(full).close()
    assert digest(full) == before
    report = repair(full)
    with open_memory(full) as memory:
        assert len(memory) == 560
        assert memory.embedding_model == "hashing-64"
        assert memory.doctor().clean
        assert len(memory.conversation("s").turns(1000)) == 80
        assert memory.conversation("s").session().user_id == "ana"
        assert len(memory.tombstones()) == 1
        assert contents(memory.recall("place7", k=1, count=False)) == [facts(8)[7]]
    assert not any("memories are lost" in problem for problem in report.problems)


@pytest.mark.parametrize("table", ["sessions", "turns", "tombstones", "sources", "knowledge"])
def test_memories_stay_readable_where_a_page_beside_them_is_destroyed(full, table):
    there = pages(full, table, "leaf")
    flip(full, (there[len(there) // 2] - 1) * 4096, 4096)
    before = digest(full)
    with open_memory(full) as memory:
        assert contents(memory.recall("place7", k=1, count=False)) == [facts(8)[7]]
        shown = [turn.user_input for turn in memory.conversation("s").turns(1000)]
        assert len(shown) < 80 if table == "turns" else len(shown) == 80
        memory.sessions(), memory.tombstones(), memory.knowledge()
        assert memory.damage()
        with pytest.raises(MemoryStoreError, match=r"damaged.*--repair"):
            memory.remember("new")
    assert digest(full) == before


@pytest.mark.parametrize("table", ["sessions", "tombstones"])
def test_a_destroyed_page_beside_the_memories_is_said(full, table):
    flip(full, (pages(full, table, "leaf")[0] - 1) * 4096, 4096)
    report = repair(full)
    assert any(problem.startswith(f"{table}: 0 were readable") for problem in report.problems)
    with open_memory(full) as memory:
        assert len(memory) == 560
        assert memory.doctor().clean
        talk = memory.conversation("s")
        assert len(talk.window()) > 0, "a lost session begins anew with its turns"
        talk.add("Another question", "Another answer")


def test_a_file_that_is_open_somewhere_is_not_repaired(full, request):
    flip(full, full.read_bytes().index(b"fact 5 about") + 3)
    before = digest(full)
    with open_memory(full), pytest.raises(MemoryStoreError, match="is open in some program"):
        repair(full)
    root = str(request.config.rootpath)
    code = (
        "import sys, pathlib\nsys.path.insert(0, sys.argv[1])\nfrom tests.memory.helpers import open_memory\n"
        "memory = open_memory(pathlib.Path(sys.argv[2]))\nprint('open', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, root, str(full)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(MemoryStoreError, match="is open in some program"):
            repair(full)
        other.stdin.close()
    assert digest(full) == before
    assert repair(full).repaired


def test_nobody_opens_a_file_during_its_repair(full, monkeypatch):
    flip(full, full.read_bytes().index(b"fact 5 about") + 3)
    monkeypatch.setattr(schema, "BUSY_S", 0.2)
    tried = []

    class Watching(HashingEmbedder):
        def embed(self, texts):
            return super().embed(texts)

        @property
        def dimension(self):
            if not tried:
                tried.append(True)
                with pytest.raises(StorageError, match="another process"):
                    open_memory(full)
            return self._dimension

        @dimension.setter
        def dimension(self, value):
            self._dimension = value

    Memory.repair(full, embedder=Watching())
    assert tried


def repair_and_die(path, step):
    """Repair in a child that kills itself at its `step`th use of the file system; whether it got to the end before."""
    child = os.fork()
    if child:
        return os.WIFEXITED(os.waitpid(child, 0)[1])
    seen = 0

    def kill(event, _):
        nonlocal seen
        if event.startswith(("os.", "shutil.", "sqlite3.connect", "open")):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    try:
        repair(path)
    finally:
        os._exit(0)


def test_a_kill_at_any_step_of_a_repair_leaves_a_file_that_can_be_repaired(full):
    flip(full, full.read_bytes().index(b"fact 5 about") + 3)
    damaged = full.read_bytes()
    for step in range(1, 100):
        done = repair_and_die(full, step)
        assert full.exists()
        with contextlib.suppress(MemoryStoreError), open_memory(full) as memory:
            assert len(memory) >= 559, f"after a kill at step {step}"
        if done:
            break
        for leftover in (*full.parent.glob("memory.db-*"), *full.parent.glob("memory.db.damaged-*")):
            leftover.unlink()
        full.write_bytes(damaged)
    assert 10 < step < 99
    with open_memory(full) as memory:
        assert memory.doctor().clean
        assert len(memory) == 559
        assert len(memory.traces()) == 1, "the kept file, nothing of the repairs that were killed"


def test_an_answer_about_forgetting_names_what_a_repair_kept(full):
    flip(full, full.read_bytes().index(b"fact 5 about") + 3)
    assert any("damaged file is kept as" in line for line in repair(full).repaired)
    with open_memory(full) as memory:
        (kept,) = memory.drop_kept() if memory.traces() else ()
        assert not kept.exists()
        assert memory.traces() == []


def test_a_file_is_for_its_owner_alone(path, tmp_path):
    before = os.umask(0)
    try:
        with open_memory(path) as memory:
            memory.remember("The kettle is broken.")
            memory.export(tmp_path / "out.jsonl")
            made = [*path.parent.glob("memory.db*"), tmp_path / "out.jsonl"]
            assert {stat.S_IMODE(file.stat().st_mode) for file in made} == {0o600}
    finally:
        os.umask(before)


@pytest.mark.parametrize("table", ["memories", "turns", "meta"])
def test_a_damaged_file_of_the_first_schema_is_repaired(path, table):
    """What cannot be migrated is read as it is."""
    with gzip.open(Path(__file__).with_name("schema_1.db.gz")) as old:
        path.write_bytes(old.read())
    there = pages(path, table, "leaf")
    flip(path, (there[len(there) // 2] - 1) * 4096, 4096)
    report = repair(path)
    with open_memory(path) as memory:
        assert memory.doctor().clean
        assert len(memory) > 80 if table == "memories" else len(memory) == 114
        assert memory.stats()["schema_version"] == schema.VERSION
    assert any("memories are lost" in problem for problem in report.problems) == (table == "memories")
    assert any("turns are lost" in problem for problem in report.problems) == (table == "turns")


@pytest.mark.parametrize("damage", ["created_at = 1e300", "created_at = 9e999", "content = 'other words'"])
def test_a_damaged_row_of_the_second_schema_is_left_for_who_reads_it(path, damage):
    """Making its terms anew would believe it, or ask for a date in the year 10^292."""
    with gzip.open(Path(__file__).with_name("schema_2.db.gz")) as old:
        path.write_bytes(old.read())
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        (damaged,) = db.execute("SELECT memory_id FROM memories WHERE id = 3").fetchone()
        db.execute(f"UPDATE memories SET {damage} WHERE id = 3")
        db.execute("PRAGMA journal_mode = DELETE")
    with open_memory(path) as memory:
        assert len(list(memory.items())) == 43
        assert contents(memory.recall("dog called Rex", k=1, count=False)) == ["My dog is called Rex"]
        with pytest.raises(MemoryStoreError, match=rf"damaged \(memory {damaged} does not match"):
            memory.remember("new")
    assert repair(path).problems == [f"1 memories are lost: {damaged}"]
    with open_memory(path) as memory:
        assert (memory.doctor().clean, len(memory)) == (True, 43)


@pytest.mark.parametrize("error", [OverflowError, ValueError])
def test_a_file_that_cannot_be_migrated_is_repaired_as_it_is(path, monkeypatch, error):
    def stumble(_):
        raise error("of a damage that nobody thought of")

    with gzip.open(Path(__file__).with_name("schema_2.db.gz")) as old:
        path.write_bytes(old.read())
    monkeypatch.setattr("agentlab.memory.respelling.respell_all", stumble)
    report = repair(path)
    assert (report.memories, report.problems) == (44, [])
    with open_memory(path) as memory:
        assert memory.doctor().clean


def test_what_a_repair_lost_comes_back_by_an_import_also_where_it_had_merged(path, tmp_path):
    text, export = "The bridge is closed on Sundays.", tmp_path / "other.jsonl"
    with open_memory(tmp_path / "other.db") as other:
        other.remember(text)
        other.export(export)
    with open_memory(path) as memory:
        memory.remember_many([*facts(3), text])
        memory.import_(export)  # the same words: its id stands for the one that is there
    flip(path, path.read_bytes().index(text.encode()) + 3)
    assert any("lost" in problem for problem in repair(path).problems)
    with open_memory(path) as memory:
        assert memory.doctor().clean
        assert text not in contents(memory.recall("bridge", words_only=True))
        memory.import_(export)
        assert contents(memory.recall("bridge", k=1, words_only=True)) == [text]


def test_rows_of_one_table_are_no_rows_of_another():
    """`sources` and `aliases` have the same shape, and a page by itself does not say whose it is."""
    values = ["one", "other"]
    assert sealed.opened("sources", values, sealed.seal("sources", values)) is not None
    assert sealed.opened("aliases", values, sealed.seal("sources", values)) is None


def test_a_copied_log_is_for_its_owner_alone(path):
    with open_memory(path) as memory:
        memory.remember("in the log")
        assert path.with_name(f"{path.name}-wal").stat().st_size
        with open(path, "rb") as file:
            repairing._copy(path, file, path.with_name("copy.db"), 0)
    assert {stat.S_IMODE(path.with_name(name).stat().st_mode) for name in ("copy.db", "copy.db-wal")} == {0o600}


def test_kept_files_are_found_whatever_the_memory_is_called(tmp_path):
    path = tmp_path / "a[1].db"
    with open_memory(path) as memory:
        memory.remember_many(facts(5))
    flip(path, path.read_bytes().index(b"fact 3 about") + 3)
    repair(path)
    with open_memory(path) as memory:
        assert len(memory.traces()) == 1
        assert memory.drop_kept()
        assert memory.traces() == []


def test_nobody_waits_for_a_repair_in_the_same_process(path):
    with open_memory(path) as memory:
        memory.remember_many(facts(5))
    with repairing._alone(path):
        started = time.monotonic()
        with pytest.raises(MemoryStoreError, match="is being repaired"):
            open_memory(path)
        with open_memory(path.with_name("another.db")) as other:  # which has nothing to do with it
            other.remember("a note")
        assert time.monotonic() - started < 2
    with open_memory(path) as memory:
        assert len(memory) == 5


def test_a_repair_names_the_file_and_no_copy_of_it(path):
    with open_memory(path) as memory:
        memory.remember_many(facts(400))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MemoryStoreError, match=r"ends .* bytes too early"):
        open_memory(path)
    for line in repair(path).repaired:
        assert "-old" not in line
        assert "--repair" not in line


@pytest.mark.parametrize("name", ["memories", "memories_generation", "sqlite_autoindex_memories_1", "chunks"])
def test_a_damaged_file_gets_no_other_vectors(path, name):
    """An index that names other rows than the table made it end in a KeyError."""
    with open_memory(path) as memory:
        memory.remember_many(facts(400))
    there = pages(path, name, "leaf")
    flip(path, (there[len(there) // 2] - 1) * 4096 + 8, 200)
    before = path.read_bytes()
    with open_memory(path) as memory, pytest.raises(MemoryStoreError, match=r"is damaged.*--repair"):
        memory.reembed(embedder=HashingEmbedder(model_id="other-64"))
    assert path.read_bytes() == before


def test_a_repair_through_a_link_finds_the_log_and_keeps_what_it_held(tmp_path):
    """SQLite keeps the log beside the file that a link leads to."""
    real, link = tmp_path / "data" / "m.db", tmp_path / "links" / "mine.db"
    for folder in (real.parent, link.parent):
        folder.mkdir()
    with open_memory(real) as memory:
        memory.remember("first fact")
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2]); from tests.memory.helpers import open_memory\n"
        "memory = open_memory(sys.argv[1])\n"
        "for number in range(20): memory.remember(f'later fact number {number}')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(real), str(Path(__file__).parents[2])], check=False, timeout=120)
    link.symlink_to(real)
    flip(real, real.read_bytes().index(b"first fact") + 2)
    assert repair(link).memories == 21, "the log has a newer copy of the page"
    with open_memory(link) as memory:
        assert (len(memory), memory.path) == (21, real)
    flip(real, real.read_bytes().index(b"first fact") + 2)
    assert repair(link).memories == 20
    with open_memory(link) as memory:
        assert [kept.parent for kept in memory.kept_files()] == [real.parent]
    assert list(link.parent.iterdir()) == [link]
