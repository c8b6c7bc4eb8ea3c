"""What can still be read of a damaged file: through SQLite where its trees hold, else page by page."""

import contextlib
import dataclasses
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from agentlab.memory import sealed
from agentlab.memory.chunks import Chunk, chunk_is_intact
from agentlab.memory.leaves import records
from agentlab.memory.records import MemoryItem
from agentlab.memory.schema import CHUNK_BITS, MIGRATIONS, VERSION, migrate, text_of
from agentlab.memory.store import COLUMNS, to_item

Rows = dict[Any, tuple[Any, ...]]
_META = ("dimension", "embedding_model", "generation", "epoch", "purge", "consolidated_at", "consolidated")
_MEMORIES = [name.strip() for name in COLUMNS.split(",")]


@dataclasses.dataclass
class Salvage:
    """The intact rows of a file, and what is known to be missing, one sentence each."""

    meta: dict[str, str]
    memories: dict[int, MemoryItem]
    chunks: dict[int, list[Chunk]]
    beside: dict[str, list[sealed.Row]]
    lost: list[str]


def salvage(copy: Path) -> Salvage:
    """Read a copy of a damaged file that nobody else uses; brings it to this schema where that can be done."""
    with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as db:
        db.text_factory = text_of
        db.execute("PRAGMA writable_schema = ON")  # a damaged schema is no reason to read nothing
        with contextlib.suppress(sqlite3.DatabaseError, ValueError, OverflowError):  # then it is read as it is
            if db.execute("PRAGMA user_version").fetchone()[0] < VERSION:
                migrate(db)
        with contextlib.suppress(sqlite3.DatabaseError):
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return _Reader(db, copy).read()


class _Reader:
    def __init__(self, db: sqlite3.Connection, copy: Path) -> None:
        self.db, self.copy = db, copy
        self.lost: list[str] = []
        self.failed: set[str] = set()  # tables that SQLite cannot read to their end
        with open(copy, "rb") as file:
            self.version = int.from_bytes(file.read(64)[60:], "big")
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
            for step in MIGRATIONS[: max(1, self.version)]:
                fresh.executescript(step)
            self.columns = {
                table: [(name, kind) for _, name, kind, *_ in fresh.execute(f"PRAGMA table_info({table})")]
                for table in ("meta", "memories", "chunks", *sealed.COLUMNS)
            }
        self._scanned: dict[int, list[tuple[int | None, tuple[Any, ...]]]] | None = None

    def read(self) -> Salvage:
        rows = {table: self._rows(table) for table in self.columns if self.columns[table]}
        meta = {row["key"]: row["value"] for row in rows["meta"] if row["key"] in _META}
        beside = {table: self._sealed(table, rows.get(table, [])) for table in sealed.COLUMNS}
        buried = {row["memory_id"] for row in beside["tombstones"]}
        memories: dict[int, MemoryItem] = {}
        for row in rows["memories"]:
            item = to_item([row[name] for name in _MEMORIES], [])
            if item is not None and item.memory_id not in buried:
                memories.setdefault(row["id"], item)
        chunks = self._chunks(rows["chunks"])
        self._missing_memories(rows["memories"], memories, chunks, beside, buried)
        return Salvage(meta, memories, chunks, beside, self.lost)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, table: str) -> list[dict[str, Any]]:
        """All rows that can be read, those of SQLite first; from both ends, because a broken page stops a reading."""
        names = [name for name, _ in self.columns[table]]
        found: dict[tuple[Any, ...], None] = {}
        for order in ("", " DESC"):
            key = ", ".join(f'"{name}"{order}' for name in names[: sealed.KEYS.get(table, 1)])
            quoted = ", ".join(f'"{name}"' for name in names)
            try:
                for row in self.db.execute(f"SELECT {quoted} FROM {table} ORDER BY {key}"):
                    found[row] = None
                break
            except sqlite3.DatabaseError:
                self.failed.add(table)
        # records of other tables are told apart by their checksums, which version 1 has for two tables only
        if table in self.failed and (self.version > 1 or table in ("meta", "memories", "chunks")):
            for row in self._of_shape(table):
                found[row] = None
        return [dict(zip(names, row, strict=True)) for row in found]

    def _of_shape(self, table: str) -> list[tuple[Any, ...]]:
        """Records of any table that have as many values as this one's, as SQLite would give them."""
        if self._scanned is None:
            self._scanned = {}
            for number, values in records(self.copy.read_bytes()):
                self._scanned.setdefault(len(values), []).append((number, values))
        kinds = [kind for _, kind in self.columns[table]]
        numbered = self.columns[table][0] == ("id", "INTEGER")
        found = []
        for number, values in self._scanned.get(len(kinds), []):
            if numbered != (number is not None) or (numbered and values[0] is not None):
                continue
            row = (number, *values[1:]) if numbered else values
            # a REAL without a fraction is stored as an integer
            found.append(tuple(
                float(value) if kind == "REAL" and isinstance(value, int) else value
                for value, kind in zip(row, kinds, strict=True)
            ))  # fmt: skip
        return found

    def _sealed(self, table: str, rows: list[dict[str, Any]]) -> list[sealed.Row]:
        names, found, bad = sealed.COLUMNS[table], {}, set()
        for row in rows:
            values = [row.get(name, "[]") for name in names]  # version 1 has no `retold`
            checksum = row["checksum"] if "checksum" in row else sealed.seal(table, values)
            key = tuple(values[: sealed.KEYS[table]])
            intact = sealed.opened(table, values, checksum)
            if intact is not None:
                found[key] = intact | {"id": row.get("id", 0)}
            elif table not in self.failed:
                bad.add(str(values[0]))
        self.lost += [f"{sealed.NAMES[table]} {key} does not match its checksum and is lost" for key in sorted(bad)]
        if table in self.failed and not (table == "turns" and self._turns_named({str(key[0]) for key in found})):
            self.lost.append(f"{table}: {len(found)} were readable; what stood on damaged pages is lost")
        return list(found.values())

    def _turns_named(self, there: set[str]) -> bool:
        """Name the turns that their index still knows; whether it knows all."""
        known, complete = self._index("turns", "conversation_id")
        if lost := sorted(set(known.values()) - there):
            self.lost.append(f"{len(lost)} turns are lost: {_listed(lost)}")
        return complete

    def _index(self, table: str, name: str) -> tuple[dict[int, str], bool]:
        """Row id → name, by the index of a table's names, which stands on other pages; whether all of it is whole."""
        known: dict[int, str] = {}
        for order in ("", " DESC"):
            with contextlib.suppress(sqlite3.DatabaseError):
                query = f"SELECT id, {name} FROM {table} INDEXED BY sqlite_autoindex_{table}_1 ORDER BY {name}{order}"
                for number, found in self.db.execute(query):
                    known[number] = str(found)
                return known, True
        return known, False

    def _chunks(self, rows: list[dict[str, Any]]) -> dict[int, list[Chunk]]:
        intact: dict[int, Chunk] = {}
        sizes: Counter[int] = Counter()
        for row in rows:
            part = Chunk(row["start"], row["end"], row["terms"], row["vector"])
            if chunk_is_intact(part.start, part.end, part.terms, part.vector, row["checksum"]):
                intact.setdefault(row["id"], part)
                sizes[len(part.vector)] += 1
        usual = sizes.most_common(1)[0][0] if sizes else 0
        found: dict[int, list[Chunk]] = {}
        for key in sorted(intact):
            if len(intact[key].vector) == usual:
                found.setdefault(key >> CHUNK_BITS, []).append(intact[key])
        return found

    # -- what is missing ----------------------------------------------------------------------------------------------

    def _missing_memories(
        self, rows: list[dict[str, Any]], memories: dict[int, MemoryItem], chunks: dict[int, list[Chunk]],
        beside: dict[str, list[sealed.Row]], buried: set[str],
    ) -> None:  # fmt: skip
        """Name memories that something else in the file still knows: their index, their vectors, their turns."""
        known = dict.fromkeys(chunks, "") | {row["id"]: str(row["memory_id"]) for row in rows}
        indexed, complete = self._index("memories", "memory_id")
        known |= indexed
        there = {item.memory_id for item in memories.values()}
        lost = {known[row] or f"of row {row}" for row in known.keys() - memories.keys()}
        lost |= {one for row in beside["turns"] for one in row["memory_ids"]}
        lost = {one for one in lost if one not in there and one not in buried}
        if lost:
            self.lost.insert(0, f"{len(lost)} memories are lost: {_listed(sorted(lost))}")
        elif "memories" in self.failed and not complete:
            self.lost.insert(0, f"pages of memories and of their index are damaged: {len(memories)} were readable, "
                             "how many there were is not known")  # fmt: skip


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
