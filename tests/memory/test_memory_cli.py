"""`agentlab memory …` from end to end, with the embedding model where a command needs it."""

import datetime
import errno
import json
import os

import pytest
from click.testing import CliRunner

from agentlab import Memory
from agentlab.cli import main
from agentlab.memory.forgetting import session_mark

from .helpers import open_memory

pytestmark = pytest.mark.model


def run(*arguments):
    return CliRunner().invoke(main, ["memory", *map(str, arguments)])


def ok(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def filled(path):
    first = ok("add", "The report is due on Friday.", "--file", path, "--tag", "work").strip()
    second = ok("add", "祖母は金沢に住んでいます。", "--file", path, "--type", "preference", "--session", "s1").strip()
    return path, first, second


def test_days_are_those_of_the_calendar(path, monkeypatch):
    import time

    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        with open_memory(path) as memory:  # a day of 25 hours
            late = datetime.datetime(2026, 10, 25, 23, 30).timestamp()
            memory.remember("The clocks went back.", created_at=late)
        for day in ("--since", "--until"):
            assert "clocks" in ok("search", "clocks", "--file", path, "--words", day, "2026-10-25")
        assert "nothing found" in ok("search", "clocks", "--file", path, "--words", "--until", "2026-10-24")
        for words in (("--since", "0001-01-01"), ("--until", "9999-12-31")):
            result = run("search", "clocks", "--file", path, "--words", *words)
            assert result.exit_code == 0 or "is no day that this machine can count" in result.output
            assert result.exception is None or isinstance(result.exception, SystemExit)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_memory_of_no_bytes_is_not_whole(path):
    path.write_bytes(b"")
    for command in (("doctor", path), ("stats", "--file", path), ("search", "x", "--file", path, "--words")):
        result = run(*command)
        assert (result.exit_code, path.stat().st_size) == (9, 0)
        assert "is empty: what it held is lost; restore it from a copy" in result.output


def test_add_search_show_forget(filled):
    path, first, second = filled
    assert ok("add", "The report is due on Friday", "--file", path).strip() == first, "told again"
    assert first in ok("search", "when must the report be ready?", "--file", path).splitlines()[0]
    explained = ok("search", "report", "--file", path, "--explain")
    assert "vector" in explained
    assert "recency" in explained
    assert second in ok("search", "祖母", "--file", path, "--words")
    assert "nothing found" in ok("search", "report", "--file", path, "--session", "none")
    assert "nothing found" in ok("search", "report", "--file", path, "--until", "2001-01-01")
    hits = [json.loads(line) for line in ok("search", "report", "--file", path, "--json", "--tag", "work").splitlines()]
    assert [hit["memory_id"] for hit in hits] == [first]
    shown = json.loads(ok("show", first, "--file", path))
    assert (shown["validation_count"], shown["tags"]) == (2, ["work"])
    assert first in ok("forget", first, "--file", path)
    assert run("show", first, "--file", path).exit_code == 9
    assert run("forget", "--file", path).exit_code == 9
    ok("forget", "--session", "s1", "--file", path)
    assert json.loads(ok("stats", "--json", "--file", path))["memories"] == 0


def test_export_import_stats_doctor(filled, tmp_path):
    path, *_ = filled
    assert "2 memories" in ok("export", tmp_path / "out.jsonl", "--file", path)
    said = ok("import", tmp_path / "out.jsonl", "--file", tmp_path / "copy.db")
    assert said == "2 new memories, with vectors of all-MiniLM-L6-v2\n"
    assert "is whole: 2 memories, 2 vectors" in ok("doctor", tmp_path / "copy.db")
    assert "knowledge 1, preference 1" in ok("stats", "--file", path)


def test_an_import_says_whose_vectors_the_memories_have(path, tmp_path):
    with open_memory(path) as memory:
        memory.remember("The kettle is broken.")
        memory.export(tmp_path / "out.jsonl")
    said = ok("import", tmp_path / "out.jsonl", "--file", tmp_path / "new.db")
    assert said == "1 new memories, with vectors of hashing-64\n"
    ok("add", "The report is due on Friday.", "--file", tmp_path / "mine.db")
    said = ok("import", tmp_path / "out.jsonl", "--file", tmp_path / "mine.db")
    assert said == "1 new memories, with vectors of all-MiniLM-L6-v2, made anew: the export has those of hashing-64\n"


def test_damage_is_said_and_repaired(filled):
    path, first, _ = filled
    data = bytearray(path.read_bytes())
    data[data.index(b"due on Friday.") + 5] ^= 1
    path.write_bytes(data)
    found = run("search", "report", "--file", path)
    assert "is damaged" in found.output
    assert run("doctor", path).exit_code == 9
    assert first in run("doctor", path, "--repair").output
    assert "is whole: 1 memories" in ok("doctor", path)


def test_the_wrong_file_is_one_sentence(tmp_path, path):
    result = run("search", "x", "--file", path)
    assert result.exit_code == 9
    assert "no memory at" in result.output
    with open_memory(path) as memory:
        memory.remember("x y z")
    result = run("add", "text", "--file", path, "--model", "all-MiniLM-L6-v2")
    assert result.exit_code == 9
    assert result.output.count("\n") == 1


def test_reembed_brings_a_foreign_memory_home(path):
    with open_memory(path) as memory:
        memory.remember("The kettle is broken.")
    assert run("reembed", path, "--model", "org/missing").exit_code == 3
    assert "1 memories" in ok("reembed", path, "--model", "all-MiniLM-L6-v2")
    assert "kettle" in ok("search", "what does not work?", "--file", path)


def test_doctor_and_reembed_take_the_file_like_all_others(path):
    with open_memory(path) as memory:
        memory.remember("The kettle is broken.")
    assert "is whole" in ok("doctor", "--file", path)
    assert "is whole" in ok("doctor", path)
    for command in (["doctor"], ["reembed", "--model", "all-MiniLM-L6-v2"]):
        assert "given twice" in run(*command, path, "--file", path).output
    assert "1 memories now have vectors" in ok("reembed", "--model", "all-MiniLM-L6-v2", "--file", path)
    assert "model is empty" in run("reembed", "--model", "", "--file", path).output
    assert "memory_id is empty" in run("forget", "", "--file", path).output


def test_where_an_export_cannot_be_written_the_place_is_named_and_nothing_said_to_resume(path, tmp_path, monkeypatch):
    from agentlab.memory import transfer

    with open_memory(path) as memory:
        memory.remember("The kettle is broken.")

    def refused(*_arguments):
        raise OSError(errno.EROFS, "read-only", str(tmp_path / f".out.jsonl.{os.getpid()}.tmp"))

    monkeypatch.setattr(transfer.os, "open", refused)
    said = run("export", tmp_path / "out.jsonl", "--file", path).output
    assert f"cannot write {tmp_path / 'out.jsonl'}: the file system is read-only" in said
    assert "stopped" not in said


def test_a_misspelled_session_is_not_forgotten(path):
    ok("add", "I like tea.", "--session", "tuesday", "--file", path)
    result = run("forget", "--session", "tusday", "--file", path)
    assert result.exit_code == 9
    assert "no session 'tusday'" in result.output
    with Memory.open(path) as memory:
        assert memory._core.store.buried([session_mark("tusday")]) == set()
        assert len(memory) == 1


def test_a_model_that_is_not_there_leaves_no_file(path):
    assert run("add", "x", "--file", path, "--model", "org/no-such-model").exit_code == 3
    assert not path.exists()


def test_stored_escapes_do_not_steer_a_terminal(path):
    ok("add", "red \x1b[31m alert \x07", "--file", path)
    assert "red ␛[31m alert ␇" in ok("search", "red alert", "--words", "--file", path)
