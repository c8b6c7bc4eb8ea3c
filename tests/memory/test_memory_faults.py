"""Damage, a wrong model, a full disk: one clear sentence, the file untouched, the rest readable."""

import contextlib
import gzip
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from agentlab import Memory
from agentlab.errors import AgentlabError, MemoryStoreError, StorageError
from agentlab.memory import core, schema
from agentlab.memory.schema import VERSION, sqlite_errors
from agentlab.memory.store import Store

from .helpers import HashingEmbedder, contents, digest, flip, open_memory


@pytest.fixture
def full(path):
    """A memory of 400 facts, closed, in one file."""
    with open_memory(path) as memory:
        memory.remember_many([f"fact {i} about topic{i % 40} and place{i}" for i in range(400)])
        memory.conversation("s").add("A question about topic1?", "An answer with place900.")
    assert not path.with_name("memory.db-wal").exists()
    return path


def readable(path):
    """How many of the 400 facts are recalled by their own words, and what was said to be damaged."""
    with open_memory(path) as memory:
        found = sum(
            f"fact {i} about topic{i % 40} and place{i}" in contents(memory.recall(f"place{i}", k=3, count=False))
            for i in range(0, 400, 10)
        )
        return found, memory.damage()


def test_a_flipped_byte_of_text_costs_that_memory_and_is_named(full):
    offset = full.read_bytes().index(b"fact 200 about") + 3
    flip(full, offset)
    before = digest(full)
    with open_memory(full) as memory:
        assert all("place200" not in text for text in contents(memory.recall("fact place200", k=5)))
        assert contents(memory.recall("place210"))[0].endswith("place210")
        assert len(memory.damage()) == 1
        assert "checksum" in memory.damage()[0]
        with pytest.raises(MemoryStoreError, match=r"damaged.*--repair"):
            memory.remember("new")
        report = memory.doctor()
        assert not report.clean
        assert report.memories == 400 + 2 - 1
    assert digest(full) == before


def test_a_flipped_byte_of_a_vector_is_found_and_embedded_anew(full):
    with sqlite3.connect(full) as db:
        (vector,) = db.execute("SELECT vector FROM chunks WHERE id = ?", (200 << schema.CHUNK_BITS,)).fetchone()
    db.close()
    flip(full, full.read_bytes().index(vector) + 10)
    with open_memory(full) as memory:
        assert contents(memory.recall("place210"))[0].endswith("place210")
        assert any("checksum" in problem for problem in memory.damage())
    report = Memory.repair(full, embedder=HashingEmbedder())
    assert report.problems == []
    assert any("embedded anew" in line for line in report.repaired)
    with open_memory(full) as memory:
        assert len(memory) == 402
        assert contents(memory.recall("place199"))[0].endswith("place199")
        assert memory.doctor().clean
        assert memory.remember("writing works again")


def broken(path, column, value):
    """A closed memory whose second row holds something wrong, as after damage on the disk; the ids of its rows."""
    with open_memory(path) as memory:
        ids = memory.remember_many([f"fact {i} about topic{i} and place{i}" for i in range(5)])
        memory.conversation("s").add("What is fact 0?", "Fact 0 about topic0 and place0.", context_used=ids[:2])
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA ignore_check_constraints = 1")
        db.execute(f"UPDATE memories SET {column} = ? WHERE id = 2", (value,))
    return ids


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("tags", '["work'), ("tags", "7"), ("tags", b"\xff"), ("content", "other words"), ("metadata", "{"),
        ("importance", "much"), ("validation_count", "once"), ("source", "dog"), ("memory_type", "dream"),
    ],
)  # fmt: skip
def test_a_damaged_row_is_named_and_the_rest_stays_readable(path, column, value):
    ids = broken(path, column, value)
    with open_memory(path) as memory:
        assert contents(memory.recall("place3", k=1)) == ["fact 3 about topic3 and place3"]
        assert "fact 1 about topic1 and place1" not in contents(memory.recall("fact place1", k=5))
        assert memory.get(ids[3]).content == "fact 3 about topic3 and place3"
        assert contents(memory.search("place4")) == ["fact 4 about topic4 and place4"]
        with pytest.raises(MemoryStoreError, match=f"damaged.*{ids[1]}.*--repair"):
            memory.get(ids[1])
        for change in (lambda: memory.forget(ids[1]), lambda: memory.remember("fact 1 about topic1 and place1")):
            with pytest.raises(MemoryStoreError, match=r"damaged.*--repair"):
                change()


@pytest.mark.parametrize("step", ["forget", "forget another", "remember", "get"])
def test_the_first_step_on_a_damaged_row_says_so_and_writes_nothing(path, step):
    ids = broken(path, "content", "other words")
    before = digest(path)
    memory = open_memory(path)
    with pytest.raises(MemoryStoreError, match=f"damaged.*{ids[1]}.*--repair"):
        {
            "forget": lambda: memory.forget(ids[1]),
            "forget another": lambda: memory.forget(ids[0]),
            "remember": lambda: memory.remember("fact 1 about topic1 and place1"),
            "get": lambda: memory.get(ids[1]),
        }[step]()
    memory.close()
    assert digest(path) == before


@pytest.mark.parametrize("change", ["vector = 7", "terms = x'ff'", "start = 'x'", "checksum = 'x'"])
def test_a_chunk_that_is_none_any_more_is_named_and_not_exported(path, change):
    broken(path, "importance", 0.5)
    rewritten(path, f"UPDATE chunks SET {change} WHERE id >> {schema.CHUNK_BITS} = 2")
    with open_memory(path) as memory:
        assert contents(memory.recall("place3", k=1)) == ["fact 3 about topic3 and place3"]
        assert any("chunk of memory row 2" in problem for problem in memory.damage())
        assert not memory.doctor().clean
        assert memory.export(path.with_name("out.jsonl")) == len(memory)
    with open_memory(path.with_name("copy.db")) as copy:
        assert copy.import_(path.with_name("out.jsonl")) == 6
        assert contents(copy.recall("place1", k=1)) == ["fact 1 about topic1 and place1"], "embedded anew"
    assert Memory.repair(path, embedder=HashingEmbedder()).problems == []


def test_a_vector_of_wrong_length_is_named(path):
    ids = broken(path, "importance", 0.5)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE chunks SET vector = x'00' WHERE id >> ? = 2", (schema.CHUNK_BITS,))
    with open_memory(path) as memory:
        with pytest.raises(MemoryStoreError, match=f"damaged.*{ids[1]} has no intact vector"):
            memory.get(ids[1])
        assert contents(memory.recall("place3", k=1)) == ["fact 3 about topic3 and place3"]


@pytest.fixture
def talked(path):
    """A closed memory with something of every kind that is no memory: turns, a summary, knowledge, a tombstone."""
    with open_memory(path) as memory:
        talk = memory.conversation("s")
        for number in range(60):
            talk.add(f"Please transfer {number}00 dollars to Mr Smith tomorrow.", "Done.")
        for session in "ab":
            memory.remember("I work on Mondays only", session_id=session)
        memory.consolidate()
        memory.forget(memory.remember("forget this one"))
        assert talk.summary()
    return path


def rewritten(path, statement, *values):
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        assert db.execute(statement, values).rowcount >= 1


@pytest.mark.parametrize(
    ("statement", "words", "look"),
    [
        ("UPDATE turns SET user_input = replace(user_input, '5800', '9800')", "turn c-",
         lambda m: [turn.user_input for turn in m.conversation("s").turns()]),
        ("UPDATE turns SET metadata = '{' WHERE id = 59", "turn c-",
         lambda m: [turn.user_input for turn in m.conversation("s").window()]),
        ("UPDATE sessions SET summary = replace(summary, '00 dollars', '99 dollars')", "session s",
         lambda m: [part.text for part in m.conversation("s").summary()]),
        ("UPDATE sessions SET summary = '[{'", "session s", lambda m: [session.summary for session in m.sessions()]),
        ("UPDATE knowledge SET relationships = '[', title = 'x'", "knowledge k-",
         lambda m: [item.title for item in m.knowledge()]),
        ("UPDATE tombstones SET memory_id = 'm-other'", "tombstone m-other",
         lambda m: [stone.memory_id for stone in m.tombstones()]),
        ("UPDATE sources SET source = 'm-' || source", "source of k-",
         lambda m: [source for item in m.items() for source in item.derived_from]),
    ],
)  # fmt: skip
def test_damage_beside_the_memories_is_named_and_never_shown(talked, statement, words, look):
    with open_memory(talked) as memory:
        before = look(memory)
    rewritten(talked, statement)
    with open_memory(talked) as memory:
        shown = look(memory)
        assert set(shown) < set(before), "what is damaged is left out, the rest is as it was"
        assert any(words in problem for problem in memory.damage())
        with pytest.raises(MemoryStoreError, match=r"damaged.*--repair"):
            memory.remember("new")
    with open_memory(talked) as memory:
        assert any(words in problem for problem in memory.doctor().problems)
        assert memory.export(talked.with_name("out.jsonl"))
    with open_memory(talked) as memory:
        facts = memory.search("Mondays")
        change = (lambda: memory.forget(facts[0].memory_id)) if "tombstones" not in statement else (
            lambda: memory.import_(talked.with_name("out.jsonl"))
        )  # fmt: skip
        with pytest.raises(MemoryStoreError, match=r"damaged.*--repair"):
            change()


def test_a_damaged_session_is_one_sentence(talked):
    rewritten(talked, "UPDATE sessions SET preferences = '{'")
    with open_memory(talked) as memory:
        talk = memory.conversation("s")
        for call in (talk.session, lambda: talk.prefer(tone="short"), lambda: talk.add("hello there", "good day")):
            with pytest.raises(MemoryStoreError, match=r"damaged.*session s.*--repair"):
                call()
        assert talk.summary() == []


def test_a_wrong_signature_is_found(talked):
    rewritten(talked, "UPDATE memories SET signature = x'00' WHERE id = 3")
    with open_memory(talked) as memory:
        (problem,) = memory.doctor().problems
        assert "signature of other words" in problem
    assert Memory.repair(talked, embedder=HashingEmbedder()).problems == []
    with open_memory(talked) as memory:
        assert memory.doctor().clean


def test_a_file_of_the_first_schema_is_migrated(path):
    """`schema_1.db.gz` was written by the last version with that schema."""
    with gzip.open(Path(__file__).with_name("schema_1.db.gz")) as old:
        path.write_bytes(old.read())
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        db.execute("UPDATE tombstones SET row = 3")  # as repairs of that version left it
    with open_memory(path) as memory:
        assert memory.stats()["schema_version"] == VERSION
        assert memory.doctor().clean
        assert len(memory) == 114
        talk = memory.conversation("s")
        assert (len(talk.turns(100)), talk.session().preferences) == (55, {"tone": "short"})
        assert talk.summary()
        (fact,) = memory.knowledge()
        assert len(fact.source_conversations) == 2
        assert memory.tombstones()[0].reason == "asked"
        assert memory._core.store.db.execute("SELECT row FROM tombstones").fetchall() == [(0,)]
        talk.add("A new turn of the new version", "I see it.")
        memory.forget(talk.memories_of([talk.turns(1)[0].conversation_id])[0])
        assert memory.doctor().clean


@pytest.mark.parametrize("seed", range(12))
def test_flips_anywhere_never_give_wrong_text(full, seed):
    """Whatever page is hit: what is recalled is a fact as it was told, or the damage is said in one sentence."""
    chance = random.Random(seed)
    for _ in range(6):
        flip(full, chance.randrange(100, full.stat().st_size - 8), chance.choice((1, 8)))
    before = digest(full)
    told = {f"fact {i} about topic{i % 40} and place{i}" for i in range(400)}
    told |= {"A question about topic1?", "An answer with place900."}
    said = []
    try:
        with open_memory(full) as memory:
            for i in range(0, 400, 25):
                try:
                    assert set(contents(memory.recall(f"fact place{i}", count=False))) <= told
                except AgentlabError as error:
                    said.append(str(error))
            said += memory.doctor().problems
    except AgentlabError as error:
        said.append(str(error))
    assert not any("\n" in sentence for sentence in said)
    assert digest(full) == before


@pytest.mark.parametrize("table", ["memories", "chunks", "text_index_data", "memories_generation"])
def test_a_destroyed_page_leaves_the_rest_readable_and_is_repaired(full, table):
    with contextlib.closing(sqlite3.connect(full)) as db:
        try:
            query = "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf'"
            pages = [number for (number,) in db.execute(query, (table,))]
        except sqlite3.OperationalError:
            pytest.skip("this SQLite has no dbstat, which finds the pages")
    flip(full, (pages[len(pages) // 2] - 1) * 4096, 4096)
    before = digest(full)
    found, damage = readable(full)
    assert digest(full) == before
    assert found >= (20 if table in ("memories", "chunks") else 0)
    if table in ("memories", "chunks"):
        assert damage
    Memory.repair(full, embedder=HashingEmbedder())
    with open_memory(full) as memory:
        assert memory.doctor().clean
        assert len(memory) >= (300 if table == "memories" else 402)
        assert memory.remember("writing works again")
    assert readable(full)[0] >= found
    (kept,) = full.parent.glob("memory.db.damaged-*[0-9]")
    assert digest(kept) == before


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file_is_said_to_be_and_its_rest_is_kept(full, share):
    size = int(full.stat().st_size * share) // 4096 * 4096
    with open(full, "r+b") as file:
        file.truncate(size)
    before = digest(full)
    with pytest.raises(MemoryStoreError, match=r"ends [0-9]+ bytes too early.*--repair"):
        open_memory(full)
    assert digest(full) == before
    report = Memory.repair(full, embedder=HashingEmbedder())
    assert report.repaired
    with open_memory(full) as memory:
        assert memory.doctor().clean
        assert 0 < len(memory) <= 402
    assert readable(full)[0] > 0
    (kept,) = full.parent.glob("memory.db.damaged-*[0-9]")
    assert digest(kept) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a database at all, only text that is long enough to be one" * 4, "does not begin as an SQLite file"),
        (b"SQLite format 3\x00" + b"\x10", "ends after 17 bytes"),
    ],
)
def test_what_is_no_memory_is_left_untouched(path, content, words):
    path.write_bytes(content)
    with pytest.raises(MemoryStoreError, match=words):
        open_memory(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_left_untouched(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE invoices(id)")
    before = digest(path)
    with pytest.raises(MemoryStoreError, match="another program"):
        open_memory(path)
    assert digest(path) == before


def test_a_newer_schema_is_refused_and_an_older_one_migrated(full, monkeypatch):
    monkeypatch.setattr(
        schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE added(x); INSERT INTO added VALUES (7)")
    )
    monkeypatch.setattr(schema, "VERSION", len(schema.MIGRATIONS))
    with open_memory(full) as memory:
        assert memory.stats()["schema_version"] == VERSION + 1
        assert memory._core.store.db.execute("SELECT x FROM added").fetchone() == (7,)
        assert len(memory) == 402
    with open_memory(full) as memory:
        assert memory.stats()["schema_version"] == VERSION + 1, "migrated once"
    monkeypatch.undo()
    before = digest(full)
    with pytest.raises(
        MemoryStoreError, match=f"newer agentlab: schema version {VERSION + 1}; allowed: up to {VERSION}"
    ):
        open_memory(full)
    assert digest(full) == before


def test_a_failed_migration_changes_nothing(full, monkeypatch):
    before = digest(full)
    monkeypatch.setattr(
        schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE added(x); INSERT INTO meta VALUES ('epoch', '1')")
    )
    monkeypatch.setattr(schema, "VERSION", len(schema.MIGRATIONS))
    with pytest.raises(MemoryStoreError):
        open_memory(full)
    monkeypatch.undo()
    assert digest(full) == before
    assert readable(full) == (40, [])


def test_another_model_and_another_dimension_are_refused(full):
    before = digest(full)
    with pytest.raises(MemoryStoreError, match=r"holds vectors of hashing-64, not of other-model.*reembed"):
        Memory.open(full, embedder=HashingEmbedder(model_id="other-model"))
    with pytest.raises(MemoryStoreError, match="holds vectors of hashing-64"):
        Memory.open(full, embedding_model="all-MiniLM-L6-v2")
    with pytest.raises(MemoryStoreError, match="32 dimensions; allowed: 64"):
        Memory.open(full, embedder=HashingEmbedder(dimension=32))
    assert digest(full) == before


def test_missing_and_impossible_paths(tmp_path):
    with pytest.raises(MemoryStoreError, match="no memory at"):
        open_memory(tmp_path / "none.db", create=False)
    with pytest.raises(MemoryStoreError, match="is a folder"):
        open_memory(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        open_memory(tmp_path / "file" / "memory.db")


def test_a_replaced_file_is_not_written_into(full):
    memory = open_memory(full)
    memory.recall("place1")
    shutil.copy(full, full.with_name("copy"))
    full.with_name("copy").rename(full)
    with pytest.raises(MemoryStoreError, match="replaced"):
        memory.remember("would be lost")
    memory._core._uses.clear()
    memory.close()


def _no_room(store):
    def refuse(*_):
        raise StorageError(f"cannot write {store.path}: the disk is full")

    store.writing = store.purge = refuse


def test_uses_that_cannot_be_written_cost_no_result(path, monkeypatch):
    monkeypatch.setattr(core, "_USES_KEPT", 1)
    memory = open_memory(path)
    memory.remember("the lamp is red")
    _no_room(memory._core.store)
    with pytest.warns(RuntimeWarning, match="uses of memories are not counted: .*the disk is full"):
        assert contents(memory.recall("lamp")) == ["the lamp is red"]
    monkeypatch.undo()
    memory.recall("lamp")
    with pytest.warns(RuntimeWarning, match="uses"):
        memory.close()
    with pytest.raises(MemoryStoreError, match="closed"):
        memory.recall("lamp")


def test_a_purge_without_room_keeps_nobody_from_opening_and_closing(path, monkeypatch):
    with open_memory(path) as memory:
        memory.remember("the lamp is red")
        with memory._core.store.writing():
            memory._core.store.owe_purge()
        _no_room(memory._core.store)
        with pytest.warns(RuntimeWarning, match="traces of what was forgotten stay"):
            memory.close()

    def refuse(store):
        raise StorageError(f"cannot write {store.path}: the disk is full")

    monkeypatch.setattr(Store, "purge", refuse)
    with pytest.warns(RuntimeWarning, match="traces of what was forgotten stay"):
        memory = open_memory(path)
    assert contents(memory.recall("lamp", count=False)) == ["the lamp is red"]
    monkeypatch.undo()
    memory.close()
    with open_memory(path) as memory:
        assert memory._core.store.meta("purge") == "0"


def _fill_until_full(path):
    """Runs in a process of its own: files may not grow beyond 300 KB."""
    with open_memory(path) as memory:
        memory.remember("the first fact stays")
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    memory = open_memory(path)
    known, error = [], None
    for number in range(2000):
        try:
            known.append((memory.remember(f"fact {number} {'padding ' * 30}{number}"), number))
        except StorageError as problem:
            error = problem
            break
    assert error is not None
    assert "\n" not in str(error)
    assert str(path) in str(error)
    assert "nothing of this step was stored" in str(error)
    assert known
    assert contents(memory.recall("first fact stays", k=1, count=False)) == ["the first fact stays"]
    with contextlib.suppress(StorageError):
        memory.close()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    with open_memory(path) as memory:
        assert len(memory) == 1 + len(known), "all that was acknowledged and nothing else"
        assert {item.memory_id for item in memory.items()} >= {memory_id for memory_id, _ in known}
        assert memory.doctor().clean
        memory.remember("there is room again")


def test_a_full_disk_stores_all_or_nothing_and_stays_readable(path, request):
    # SIGXFSZ is ignored by Python, so that writing beyond the limit is an error, as on a full disk
    code = (
        "import sys, pathlib\nsys.path.insert(0, sys.argv[1])\n"
        "from tests.memory.test_memory_faults import _fill_until_full\n_fill_until_full(pathlib.Path(sys.argv[2]))"
    )
    root = str(request.config.rootpath)
    done = subprocess.run([sys.executable, "-c", code, root, str(path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a megabyte, a function that fills it, and one that makes it take no writes."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs rights that this user has not")

    def fill():
        with contextlib.suppress(OSError), open(place / "filling", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))

    yield place, fill, lambda: subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    subprocess.run(["umount", "-l", place], check=True)


def left_by_a_kill(path, count=3):
    """A memory whose process was killed: its log holds what it acknowledged."""
    script = (
        "import os, sys; from memory.helpers import open_memory; from pathlib import Path\n"
        "memory = open_memory(Path(sys.argv[1]))\n"
        f"for n in range({count}): memory.remember(f'The gate has the number {{n}}.')\n"
        "os.kill(os.getpid(), 9)"
    )
    tests = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", script, path], cwd=tests, env={**os.environ, "PYTHONPATH": str(tests)})
    assert run.returncode == -9
    assert path.with_name(f"{path.name}-wal").stat().st_size


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_what_takes_no_writes_can_be_read_and_written_again_later(small_disk, tmp_path, how, killed):
    place, fill, write_protect = small_disk
    path = place / "memory.db"
    if killed:
        left_by_a_kill(path)
        path.with_name("memory.db-shm").unlink()
    else:
        with open_memory(path) as memory:
            for number in range(3):
                memory.remember(f"The gate has the number {number}.")
    fill() if how == "full" else write_protect()
    before = digest(path)
    with open_memory(path) as memory:
        assert len(memory.recall("gate number", k=5, words_only=True)) == 3
        assert (memory.export(tmp_path / "out.jsonl"), memory.doctor().clean) == (3, True)
        assert memory.only_read()
        for change in (lambda: memory.remember("A fourth."), memory.consolidate):
            with pytest.raises(StorageError, match="disk is full" if how == "full" else "for writing"):
                change()
        assert digest(path) == before
        if how == "full":
            (place / "filling").unlink()
            memory.remember("A fourth gate number.")  # by the memory that was opened while it was full
            assert not memory.only_read()
            assert len(memory.recall("gate number", k=5, words_only=True)) == 4
    if how == "full":
        with open_memory(path) as memory:
            assert memory.doctor().clean
            assert len(memory) == 4


def test_where_everything_on_disk_is_full_the_copy_is_made_in_ram(small_disk, monkeypatch):
    place, fill, _ = small_disk
    with open_memory(place / "memory.db") as memory:
        memory.remember("The gate has the number 7.")
    (place / "tmp").mkdir()
    fill()
    monkeypatch.setattr("tempfile.tempdir", str(place / "tmp"))
    with open_memory(place / "memory.db") as memory:
        assert contents(memory.items()) == ["The gate has the number 7."]
    assert not list((place / "tmp").iterdir())
    monkeypatch.setattr("agentlab.memory.frozen._PLACES", (None,))
    with pytest.raises(StorageError, match="takes no writes, and there is no room for a copy elsewhere"):
        open_memory(place / "memory.db")


def test_a_log_with_its_index_is_read_where_nothing_can_be_written(small_disk, tmp_path):
    place, _, write_protect = small_disk
    left_by_a_kill(place / "memory.db")
    write_protect()
    with open_memory(place / "memory.db") as memory:
        assert len(list(memory.items())) == 3
        assert memory.doctor().clean
        with pytest.raises(StorageError, match="for writing"):
            memory.remember("A fourth.")


def test_a_damaged_file_that_takes_no_writes_is_named_by_its_own_path(full, monkeypatch):
    flip(full, 4096 * 2, 4096)

    def refused(path, **_):
        with sqlite_errors(path):
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorname = "SQLITE_CANTOPEN"
            raise error

    monkeypatch.setattr("agentlab.memory.store.connect", refused)
    try:
        with open_memory(full) as memory:
            found = [*memory.damage(), *memory.doctor().problems]
    except MemoryStoreError as error:
        found = [str(error)]
    assert found
    assert not any("agentlab-" in problem for problem in found)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE memories SET signature = x'00' WHERE id = 1",
        "DELETE FROM text_index_data WHERE id > 10",
        "UPDATE memories SET generation = 10000000 WHERE id = 2",
    ],
)
def test_nothing_is_written_to_what_an_examination_found_damaged(full, damage):
    with contextlib.closing(sqlite3.connect(full)) as db, db:
        db.execute(damage)
    with open_memory(full) as memory:
        first = memory.doctor()
        assert first.problems
        before = digest(full)
        with pytest.raises(MemoryStoreError, match="is damaged"):
            memory.remember("A fact that was never told.")
        assert memory.doctor().problems == first.problems
    assert digest(full) == before
