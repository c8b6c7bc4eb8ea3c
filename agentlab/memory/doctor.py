"""Is the file whole? `examine` reads every row; `repair` makes a new file of what is intact and keeps the old one."""

import contextlib
import dataclasses
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from agentlab.errors import MemoryStoreError
from agentlab.files import disk_errors, sync_folder
from agentlab.memory import sealed
from agentlab.memory.core import Core
from agentlab.memory.embedding import Embedder, chunk
from agentlab.memory.schema import CHUNK_BITS, missing_bytes
from agentlab.memory.store import Chunk, Store, chunk_checksum, is_damage, pack
from agentlab.memory.words import signature
from agentlab.memory.writing import index_terms

_SHOWN = 20  # sentences per kind of problem
_OTHER_TABLES = ("knowledge", "sessions", "turns", "tombstones", "sources")


@dataclasses.dataclass(frozen=True)
class Report:
    """What an examination found. `problems` are sentences, none when the file is whole; `repaired` what was done."""

    memories: int
    chunks: int
    problems: list[str]
    repaired: list[str]

    @property
    def clean(self) -> bool:
        return not self.problems


def examine(core: Core) -> Report:
    """Check pages, checksums, dimensions, the text index, and that no row refers to one that is not there."""
    store, problems = core.store, []
    with store.reading() as db:
        try:
            for (text,) in db.execute("PRAGMA integrity_check(20)"):
                if text != "ok":
                    problems.append(f"SQLite: {' '.join(text.split())}")
        except sqlite3.DatabaseError as error:
            problems.append(f"SQLite: {error}")
        items = store.items()
        dimension = store.meta("dimension")
        chunks, bad = _chunks(store, 0 if dimension is None else int(dimension))
        problems += list(store.damage) + bad[:_SHOWN]
        without = [items[row].memory_id for row in items if row not in chunks]
        problems += [f"memory {memory_id} has no intact vector" for memory_id in without[:_SHOWN]]
        problems += [f"vectors without a memory: row {row}" for row in sorted(set(chunks) - set(items))[:_SHOWN]]
        for row, item in items.items():
            if any(part.terms != index_terms(item.content[part.start : part.end], item.created_at)
                   for part in chunks.get(row, [])):  # fmt: skip
                problems.append(f"memory {item.memory_id} is indexed under other words than its own")
        problems += _references(store, {item.memory_id for item in items.values()})
    problems += _text_index(store)
    return Report(len(items), sum(map(len, chunks.values())), list(dict.fromkeys(problems)), [])


def _chunks(store: Store, dimension: int) -> tuple[dict[int, list[Chunk]], list[str]]:
    columns = 'SELECT id, start, "end", terms, vector, checksum FROM chunks'
    try:
        rows = store.db.execute(f"{columns} ORDER BY id").fetchall()
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        store.damage[str(error)] = None
        rows = store.one_by_one(f"{columns} WHERE id >> {CHUNK_BITS} = ?")
    found: dict[int, list[Chunk]] = {}
    bad = []
    for key, start, end, terms, vector, checksum in rows:
        row = key >> CHUNK_BITS
        try:
            intact = chunk_checksum(start, end, terms, vector) == checksum and len(vector) == 2 * dimension
        except TypeError:
            intact = False
        if intact and np.isfinite(np.frombuffer(vector, "<f2")).all():
            found.setdefault(row, []).append(Chunk(start, end, terms, vector))
        else:
            bad.append(f"a chunk of memory row {row} does not match its checksum")
    return found, bad


def _references(store: Store, there: set[str]) -> list[str]:
    problems = []
    with contextlib.suppress(sqlite3.DatabaseError):
        known = {table: sealed.rows(store, table) for table in sealed.COLUMNS}
        for row in known["knowledge"]:
            if row["knowledge_id"] not in there:
                problems.append(f"knowledge {row['knowledge_id']} has no text")
        for row in known["sources"]:
            if row["derived"] not in there:
                problems.append(f"sources are noted for {row['derived']}, which is not there")
        for row in known["tombstones"]:
            if row["memory_id"] in there:
                problems.append(f"memory {row['memory_id']} was forgotten and is still there")
        generation = store.number("generation")
        (newest,) = store.db.execute("SELECT coalesce(max(generation), 0) FROM memories").fetchone()
        if newest > generation:
            problems.append(f"a memory of generation {newest} is newer than the file's {generation}")
        for memory_id, content, mark in store.db.execute("SELECT memory_id, content, signature FROM memories"):
            if memory_id in there and mark != signature(content):
                problems.append(f"memory {memory_id} has the signature of other words, so telling it again doubles it")
    return problems + [problem for problem in store.damage if not problem.startswith("memory ")]


def _text_index(store: Store) -> list[str]:
    """FTS5's own check against the rows; it is a statement that writes nothing but needs the write lock."""
    if store.damage:
        return []
    try:
        store.db.execute("INSERT INTO text_index(text_index, rank) VALUES ('integrity-check', 1)")
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return ["the text index does not agree with the memories"]
    return []


def repair(path: Path, model: str | None, embedder: Embedder | None) -> Report:
    """A new file at `path` with everything intact of the old one, which stays beside it as `<name>.damaged-<time>`.

    A memory whose vector is damaged is embedded anew; one whose text is damaged is left out and named in `problems`.
    """
    with _whole_length(path) as source:
        return _repair(path, source, model, embedder)


@contextlib.contextmanager
def _whole_length(path: Path) -> Iterator[Path]:
    """`path`, or where its end is missing a copy with zeros instead, because SQLite reads nothing of a short file."""
    if not path.exists() or not missing_bytes(path):
        yield path
        return
    padded = path.with_name(f"{path.name}.padded-{os.getpid()}")
    try:
        with disk_errors(padded):
            shutil.copyfile(path, padded)
            with open(padded, "r+b") as file:
                file.truncate(path.stat().st_size + missing_bytes(path))
        yield padded
    finally:
        for leftover in path.parent.glob(f"{padded.name}*"):
            leftover.unlink()


def _repair(path: Path, source: Path, model: str | None, embedder: Embedder | None) -> Report:
    core = Core(source, model, embedder, create=False)
    copy = path.with_name(f"{path.name}.repair-{os.getpid()}")
    try:
        found = examine(core)
        if found.clean and source == path:
            return found
        for leftover in path.parent.glob(f"{copy.name}*"):
            leftover.unlink()
        new = Core(copy, core.model, embedder if embedder is not None else None)
        try:
            lost, done = _salvage(core, new)
            new.store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            new.close()
    finally:
        with contextlib.suppress(MemoryStoreError):
            core.store.close()
    kept = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(path.with_name(path.name + suffix), kept.with_name(kept.name + suffix))
    os.replace(path, kept)
    os.replace(copy, path)
    sync_folder(path.parent)
    return Report(found.memories, found.chunks, lost, [*found.problems, *done, f"the damaged file is kept as {kept}"])


def _salvage(old: Core, new: Core) -> tuple[list[str], list[str]]:
    store = old.store
    items = store.items()
    dimension = store.meta("dimension")
    chunks, _ = _chunks(store, int(dimension or 0))
    done, ready = [], []
    for row, item in items.items():
        parts = [(part.start, part.end, part.vector) for part in chunks.get(row, [])]
        if not _covers(parts, item.content):
            spans = chunk(item.content, old.embedder)
            blobs = pack(old.embedder.embed([item.content[start:end] for start, end in spans]))
            parts = [(start, end, blob) for (start, end), blob in zip(spans, blobs, strict=True)]
            done.append(f"memory {item.memory_id} was embedded anew")
        whole = [Chunk(a, b, index_terms(item.content[a:b], item.created_at), blob) for a, b, blob in parts]
        ready.append((item, signature(item.content), whole))
    there = {item.memory_id for item in items.values()}
    lost = [problem for problem in store.damage if problem.startswith("memory ")]
    with new.changing(None if dimension is None else int(dimension)) as (_, generation):
        new.store.insert(ready, generation)
        for table in _OTHER_TABLES:
            rows = []
            try:
                for values in store.db.execute(f"SELECT * FROM {table}"):
                    rows.append(values)
            except sqlite3.DatabaseError as error:
                lost.append(f"{table}: {len(rows)} rows were readable, then {error}")
            for values in rows:
                if table in ("knowledge", "sources") and values[0] not in there:
                    continue
                if table == "tombstones":
                    if values[0] in there:
                        continue
                    # rows were numbered anew: an old number would bury whoever has it now
                    values = (values[0], 0, generation, *values[3:])  # noqa: PLW2901
                marks = ", ".join("?" * len(values))
                new.store.db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", values)
    return lost, done


def _covers(parts: list[tuple[int, int, bytes]], content: str) -> bool:
    """Whether intact chunks reach over all of a memory's text."""
    reach = 0
    for start, end, _ in parts:
        if start > reach + 1:
            return False
        reach = max(reach, end)
    return bool(parts) and reach >= len(content.rstrip())
