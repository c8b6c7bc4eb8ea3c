"""Is the file whole? Every page, row and reference is read and checked."""

import contextlib
import dataclasses
import sqlite3

import numpy as np

from agentlab.memory import sealed
from agentlab.memory.chunks import Chunk, chunk_is_intact
from agentlab.memory.core import Core
from agentlab.memory.schema import CHUNK_BITS, is_damage
from agentlab.memory.store import Store
from agentlab.memory.words import signature
from agentlab.memory.writing import index_terms

_SHOWN = 20  # sentences per kind of problem


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
    store.damage.update(dict.fromkeys(problems))  # from now on nothing is written to it
    return Report(len(items), sum(map(len, chunks.values())), list(store.damage), [])


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
        intact = chunk_is_intact(start, end, terms, vector, checksum) and len(vector) == 2 * dimension
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
        for row in known["tellings"]:
            if row["memory_id"] not in there:
                problems.append(f"a telling is noted of {row['memory_id']}, which is not there")
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
        if (getattr(error, "sqlite_errorname", None) or "").startswith("SQLITE_READONLY"):
            return []  # who may only read cannot ask
        if not is_damage(error):
            raise
        return ["the text index does not agree with the memories"]
    return []
