"""The rows in SQLite: one transaction per step, generations for whoever keeps a view, a checksum on each row."""

import contextlib
import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from agentlab.errors import MemoryStoreError, StorageError
from agentlab.memory import frozen, handles, sealed
from agentlab.memory.chunks import Chunk, chunk_is_intact, unpack
from agentlab.memory.records import MEMORY_TYPES, SOURCES, MemoryItem, Tombstone
from agentlab.memory.schema import BUSY_S, CHUNK_BITS, connect, damaged, is_damage, sqlite_errors

_READERS_MS = 1_000  # how long forgetting waits for readers elsewhere before it leaves the log to a later step
COLUMNS = (
    "id, memory_id, memory_type, content, importance, created_at, session_id, source, source_name, tags, metadata, "
    "checksum, validation_count, access_count, last_accessed"
)


def row_checksum(memory_id: str, memory_type: str, content: str, session_id: str | None, source: str,
                 created_at: float, metadata: str) -> int:  # fmt: skip
    """CRC-32 of what uses do not change in a memory's row."""
    parts = (memory_id, memory_type, content, session_id or "", source, repr(created_at), metadata)
    return zlib.crc32("\x1f".join(parts).encode())


class Store:
    """One memory's file, open in this process. Threads take turns with its connection; processes may be many."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.damage: dict[str, None] = {}  # what was found wrong while reading, one sentence each
        self.frozen: StorageError | None = None  # why it can only be read
        with handles.opening(path) as known:
            try:
                self._take(connect(path, create=create, known=known))
            except StorageError as error:
                if known or not frozen.can_be_read(path, error):
                    raise
                self.frozen = error
                self.db = frozen.state_of(path)
                self._let_go: Callable[[], object] = lambda: None

    def _take(self, connection: sqlite3.Connection) -> None:
        self.db = connection
        self._inode = self.path.stat().st_ino
        self._let_go = handles.hold(self, self.path)

    def _thaw(self) -> None:
        """Take the file itself again, if it can be written by now; raises the StorageError that it still meets."""
        state = self.db
        with handles.opening(self.path) as known:
            self._take(connect(self.path, create=False, known=known))
        state.close()
        self.frozen = None

    def close(self) -> None:
        with self.lock, sqlite_errors(self.path):
            self.db.close()
            self._let_go()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent state for several queries."""
        with self.lock, sqlite_errors(self.path):
            if self.db.in_transaction:
                yield self.db
                return
            self.db.execute("BEGIN")
            try:
                yield self.db
            finally:
                with contextlib.suppress(sqlite3.Error):
                    self.db.execute("COMMIT")

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is durable when the block ends and never was when it raises."""
        with self.lock, sqlite_errors(self.path):
            if self.damage:
                raise damaged(self.path, next(iter(self.damage)))  # writing could make it worse
            if self.frozen is not None and self.db.in_transaction:
                raise self.frozen
            if self.frozen is not None:
                self._thaw()
            if self.db.in_transaction:
                yield self.db
                return
            self.db.execute("BEGIN IMMEDIATE")
            try:
                self._check_place()
                yield self.db
                if self.damage:
                    raise damaged(self.path, next(iter(self.damage)))  # it was found on the way
                self.db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite rolled back by itself where the disk was full
                    self.db.execute("ROLLBACK")
                raise
            if (self.meta("purge") or "").startswith("2"):
                with contextlib.suppress(sqlite3.Error):  # the block's work is done; this is tried again
                    self._cut_log(0)

    def _check_place(self) -> None:
        """Refuse to write into a file that was moved away or replaced: nobody would find it again."""
        try:
            same = self.path.stat().st_ino == self._inode
        except FileNotFoundError:
            same = False
        if not same:
            raise MemoryStoreError(f"{self.path} was replaced or deleted while it was open; open it again")

    # -- facts about the file ---------------------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        with self.lock, sqlite_errors(self.path):
            found = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def number(self, key: str) -> int:
        """A count in the table meta, 0 before the first; raises MemoryStoreError where it is none."""
        value = self.meta(key) or "0"
        if not value.isdecimal():
            raise damaged(self.path, f"{key} is {value!r}")
        return int(value)

    def set_meta(self, key: str, value: str) -> None:
        with self.lock, sqlite_errors(self.path):
            self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @property
    def dimension(self) -> int:
        """The dimension of the vectors in the file; raises MemoryStoreError before the first memory."""
        stored = self.number("dimension")
        if not stored:
            raise MemoryStoreError(f"{self.path} holds no memory yet")
        return stored

    def next_generation(self) -> int:
        """The number of this transaction; every row it touches carries it. Only inside `writing`."""
        self.db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'generation'")
        return self.number("generation")

    def changed_elsewhere(self) -> int:
        """A number that changes when another connection committed; costs microseconds."""
        with self.lock, sqlite_errors(self.path):
            return int(self.db.execute("PRAGMA data_version").fetchone()[0])

    # -- memories -----------------------------------------------------------------------------------------------------

    def insert(self, items: Sequence[tuple[MemoryItem, bytes, Sequence[Chunk]]], generation: int) -> list[int]:
        """Add rows, chunks and text index entries: (item, signature, chunks) each; their row ids."""
        last = self.db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'memories'").fetchone()
        first = (int(last[0]) if last else 0) + 1
        rows, chunks, texts = [], [], []
        for row, (item, signature, parts) in enumerate(items, start=first):
            metadata = json.dumps(item.metadata, ensure_ascii=False, sort_keys=True) if item.metadata else "{}"
            checksum = row_checksum(
                item.memory_id, item.memory_type, item.content, item.session_id, item.source, item.created_at, metadata
            )
            rows.append(
                (row, item.memory_id, generation, item.memory_type, item.content, signature, item.importance,
                 item.created_at, item.session_id, item.source, item.source_name,
                 json.dumps(item.tags, ensure_ascii=False) if item.tags else "[]", metadata, checksum,
                 item.validation_count, item.access_count, item.last_accessed)
            )  # fmt: skip
            for number, part in enumerate(parts):
                key = (row << CHUNK_BITS) + number
                chunks.append((key, part.start, part.end, part.terms, part.vector, part.checksum))
                texts.append((key, part.terms))
        self.db.executemany(f"INSERT INTO memories VALUES ({', '.join('?' * 17)})", rows)
        self.db.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)", chunks)
        self.db.executemany("INSERT INTO text_index(rowid, terms) VALUES (?, ?)", texts)
        for item, _, _ in items:
            sealed.link(self.db, item.memory_id, item.derived_from)
        return list(range(first, first + len(rows)))

    def delete(self, rows: Sequence[int]) -> None:
        """Remove rows, chunks and text index entries; what derives from them is the caller's to decide."""
        for row in rows:
            low, high = row << CHUNK_BITS, (row + 1) << CHUNK_BITS
            parts = self.db.execute("SELECT id, terms FROM chunks WHERE id >= ? AND id < ?", (low, high)).fetchall()
            self.db.executemany("INSERT INTO text_index(text_index, rowid, terms) VALUES ('delete', ?, ?)", parts)
            self.db.execute("DELETE FROM chunks WHERE id >= ? AND id < ?", (low, high))
            self.db.execute("DELETE FROM memories WHERE id = ?", (row,))

    def bury(self, memory_id: str, row: int, generation: int, kind: str, forgotten_at: float, reason: str) -> None:
        """Leave a tombstone; an older one of the same name stays."""
        stone = {"memory_id": memory_id, "kind": kind, "forgotten_at": forgotten_at, "reason": reason}
        sealed.insert(self.db, "tombstones", stone, conflict="IGNORE", row=row, generation=generation)

    def buried(self, memory_ids: Sequence[str]) -> set[str]:
        """Which of these ids belong to something forgotten."""
        if not memory_ids:
            return set()
        query = "SELECT memory_id FROM tombstones WHERE memory_id IN (SELECT value FROM json_each(?))"
        with self.lock, sqlite_errors(self.path):
            if self.db.execute("SELECT 1 FROM tombstones LIMIT 1").fetchone() is None:
                return set()
            return {found for (found,) in self.db.execute(query, (json.dumps(list(memory_ids)),))}

    def items(self, where: str = "1", values: Sequence[Any] = ()) -> dict[int, MemoryItem]:
        """Memories by row id, oldest first, without embeddings; damaged ones are left out and noted in `damage`."""
        with self.reading() as db:
            try:
                found = db.execute(f"SELECT {COLUMNS} FROM memories WHERE {where} ORDER BY id", values).fetchall()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                self.damage[str(error)] = None
                found = self.one_by_one(f"SELECT {COLUMNS} FROM memories WHERE ({where}) AND id = ?", values)
            return self._items(found)

    def items_of(self, rows: Iterable[int]) -> dict[int, MemoryItem]:
        """Memories by row id; ids that are no longer there are left out."""
        wanted = [int(row) for row in rows]
        with self.reading() as db:
            try:
                query = f"SELECT {COLUMNS} FROM memories WHERE id IN ({', '.join('?' * len(wanted))}) ORDER BY id"
                return self._items(db.execute(query, wanted).fetchall())
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                self.damage[str(error)] = None
                return self._items(self.one_by_one(f"SELECT {COLUMNS} FROM memories WHERE id = ?", (), wanted))

    def item_of(self, row: int) -> MemoryItem:
        """The memory at a row id that is there; raises MemoryStoreError that names it when it is damaged."""
        if (item := self.items_of([row]).get(row)) is None:
            raise damaged(self.path, f"memory {self._id_of(row)} does not match its checksum")
        return item

    def _id_of(self, row: int) -> str:
        with contextlib.suppress(sqlite3.DatabaseError):
            if found := self.db.execute("SELECT memory_id FROM memories WHERE id = ?", (row,)).fetchone():
                return str(found[0])
        return f"of row {row}"

    def one_by_one(
        self, query: str, values: Sequence[Any] = (), rows: Iterable[int] | None = None
    ) -> list[tuple[Any, ...]]:
        """What `query` finds for each row id as its last value, leaving out the ids whose pages cannot be read."""
        found = []
        for row in range(1, self._last_row() + 1) if rows is None else rows:
            try:
                found += self.db.execute(query, (*values, row)).fetchall()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
        return found

    def _last_row(self) -> int:
        for query in ("SELECT seq FROM sqlite_sequence WHERE name = 'memories'", "SELECT max(id) FROM memories"):
            with contextlib.suppress(sqlite3.DatabaseError):
                if (last := self.db.execute(query).fetchone()) and last[0]:
                    return int(last[0])
        return 1 << 20

    def _items(self, rows: Sequence[tuple[Any, ...]]) -> dict[int, MemoryItem]:
        found = {}
        sources = self._sources([row[1] for row in rows])
        for row in rows:
            if (item := to_item(row, sources.get(row[1], []))) is None:
                self.damage[f"memory {row[1]} does not match its checksum"] = None
            else:
                found[row[0]] = item
        return found

    def uses_of(self, rows: Iterable[int]) -> list[tuple[int, int, float]]:
        """(row id, times recalled, when last) of memories that were."""
        query = "SELECT id, access_count, last_accessed FROM memories WHERE id IN (SELECT value FROM json_each(?))"
        found = self.db.execute(query, (json.dumps([int(row) for row in rows]),)).fetchall()
        return found

    def row_of(self, memory_id: str) -> int | None:
        with self.lock, sqlite_errors(self.path):
            found = self.db.execute("SELECT id FROM memories WHERE memory_id = ?", (memory_id,)).fetchone()
        return None if found is None else int(found[0])

    def same_wording(self, signature: bytes, item: MemoryItem) -> int | None:
        """The row id of a memory of the same words and type; of a conversation also of the same session."""
        found = self.db.execute(
            "SELECT id FROM memories WHERE signature = ? AND memory_type = ? AND (? OR session_id IS ?) "
            "ORDER BY id LIMIT 1",
            (signature, item.memory_type, item.memory_type != "conversation", item.session_id),
        ).fetchone()
        return None if found is None else int(found[0])

    def wordings_there(self, signatures: Sequence[bytes]) -> set[bytes]:
        """Which of `signatures` some memory has."""
        found: set[bytes] = set()
        for start in range(0, len(signatures), 500):
            part = signatures[start : start + 500]
            query = f"SELECT signature FROM memories WHERE signature IN ({', '.join('?' * len(part))})"
            found.update(mark for (mark,) in self.db.execute(query, part))
        return found

    def rewrite(self, row: int, item: MemoryItem, generation: int) -> None:
        """Set what may change of a memory: its session, source, tags, importance and how often it was told."""
        (metadata,) = self.db.execute("SELECT metadata FROM memories WHERE id = ?", (row,)).fetchone()
        checksum = row_checksum(
            item.memory_id, item.memory_type, item.content, item.session_id, item.source, item.created_at, metadata
        )
        self.db.execute(
            "UPDATE memories SET validation_count = ?, tags = ?, importance = ?, session_id = ?, source = ?, "
            "source_name = ?, checksum = ?, generation = ? WHERE id = ?",
            (item.validation_count, json.dumps(item.tags, ensure_ascii=False), item.importance, item.session_id,
             item.source, item.source_name, checksum, generation, row),
        )  # fmt: skip

    def _sources(self, memory_ids: Sequence[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        try:
            for start in range(0, len(memory_ids), 500):
                part = memory_ids[start : start + 500]
                where = f"derived IN ({', '.join('?' * len(part))})"
                for row in sealed.rows(self, "sources", where, part, order="source"):
                    found.setdefault(row["derived"], []).append(row["source"])
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self.damage[str(error)] = None
        return found

    def sources_of(self, memory_id: str) -> list[str]:
        return [row["source"] for row in sealed.rows(self, "sources", "derived = ?", (memory_id,), order="source")]

    def derived_of(self, memory_id: str) -> list[str]:
        return [row["derived"] for row in sealed.rows(self, "sources", "source = ?", (memory_id,))]

    def vectors_of(self, row: int, dimension: int) -> np.ndarray:
        """float32 (n_chunks, dimension) of one memory."""
        low, high = row << CHUNK_BITS, (row + 1) << CHUNK_BITS
        with self.lock, sqlite_errors(self.path):
            cursor = self.db.execute("SELECT vector FROM chunks WHERE id >= ? AND id < ? ORDER BY id", (low, high))
            blobs = [blob for (blob,) in cursor]
        if not blobs or any(not isinstance(blob, bytes) or len(blob) != 2 * dimension for blob in blobs):
            raise damaged(self.path, f"memory {self._id_of(row)} has no intact vector")
        return unpack(blobs, dimension)

    def chunks_of(self, row: int) -> list[tuple[int, int, str, bytes]]:
        """(start, end, terms, packed vector) of one memory's chunks, in order; none where one of them is damaged."""
        low, high = row << CHUNK_BITS, (row + 1) << CHUNK_BITS
        query = 'SELECT start, "end", terms, vector, checksum FROM chunks WHERE id >= ? AND id < ? ORDER BY id'
        with self.lock, sqlite_errors(self.path):
            found = self.db.execute(query, (low, high)).fetchall()
        if not all(chunk_is_intact(*fields) for fields in found):
            self.damage[f"a chunk of memory row {row} does not match its checksum"] = None
            return []
        return [(start, end, terms, vector) for start, end, terms, vector, _ in found]

    def matching(self, expression: str, count: int) -> list[tuple[int, int, int, float]]:
        """(row id, start, end, BM25 score) of the chunks that FTS5 finds for an expression, best first."""
        with self.reading() as db:
            cursor = db.execute(
                'SELECT c.id, c.start, c."end", -f.rank FROM text_index f JOIN chunks c ON c.id = f.rowid '
                "WHERE text_index MATCH ? ORDER BY f.rank LIMIT ?",
                (expression, count),
            )
            return [(key >> CHUNK_BITS, start, end, score) for key, start, end, score in cursor]

    def rows_with(self, term: str) -> set[int]:
        """Row ids of the memories that have a term."""
        cursor = self.db.execute("SELECT rowid FROM text_index WHERE text_index MATCH ?", (f'"{term}"',))
        return {key >> CHUNK_BITS for (key,) in cursor}

    def tombstones(self) -> list[Tombstone]:
        kinds = ", ".join(f"'{kind}'" for kind in MEMORY_TYPES)  # turns and sessions have theirs, too
        found = sealed.rows(self, "tombstones", f"kind IN ({kinds})", order="forgotten_at, memory_id")
        return [Tombstone(**{name: row[name] for name in sealed.COLUMNS["tombstones"]}) for row in found]

    # -- leaving nothing behind ---------------------------------------------------------------------------------------

    def purge(self) -> bool:
        """Rewrite the file and cut the log, so that deleted bytes are nowhere; False while readers hold the log.

        `secure_delete` zeroes what is deleted, but copies that SQLite left when it moved cells between pages stay in
        unused parts of pages: only VACUUM is certain. `purge` in the table meta says what is left to do: '1-…' both,
        '2-…' cutting the log, '0' nothing; its number tells whether somebody forgot something else meanwhile.
        """
        with self.lock, sqlite_errors(self.path):
            due = self.meta("purge") or "0"
            if not due.startswith("2"):
                self.db.execute("VACUUM")
                self._step("2" + due[1:], due)
            return self._cut_log(_READERS_MS)

    def owe_purge(self) -> None:
        """Note, in the transaction that forgets, that the file must be rewritten."""
        self.db.execute("UPDATE meta SET value = ? WHERE key = 'purge'", (f"1-{time.time_ns()}",))

    @property
    def purge_due(self) -> bool:
        """Whether traces of something forgotten may be in the file or its log."""
        return not self.damage and self.meta("purge") not in (None, "0")

    def _cut_log(self, wait_ms: int) -> bool:
        due = self.meta("purge") or "0"
        if not self._truncate(wait_ms):
            return False
        if due.startswith("2"):
            self._step("0", due)
            self._truncate(wait_ms)
        return True

    def _truncate(self, wait_ms: int) -> bool:
        self.db.execute(f"PRAGMA busy_timeout = {wait_ms}")
        try:
            return not self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            self.db.execute(f"PRAGMA busy_timeout = {1000 * BUSY_S}")

    def _step(self, new: str, old: str) -> None:
        self.db.execute("UPDATE meta SET value = ? WHERE key = 'purge' AND value = ?", (new, old))


def to_item(fields: Sequence[Any], sources: list[str]) -> MemoryItem | None:
    """The memory of a row of `COLUMNS`; None where something in it is not what it was."""
    (_, memory_id, kind, content, importance, created, session, source, name, tags, metadata, checksum, told, uses,
     accessed) = fields  # fmt: skip
    try:
        known = tags_of((kind, source, session, importance, created, accessed, uses, told, tags))
        if known is None or row_checksum(memory_id, kind, content, session, source, created, metadata) != checksum:
            return None
        return MemoryItem(
            memory_id=memory_id, content=content, memory_type=kind, importance=importance, access_count=uses,
            last_accessed=accessed, created_at=created, tags=known, session_id=session, source=source,
            source_name=name, validation_count=told, metadata=json.loads(metadata), derived_from=sources,
        )  # fmt: skip
    except (TypeError, ValueError, AttributeError):
        return None


def tags_of(fields: Sequence[Any]) -> list[str] | None:
    """A row's tags; None where one of its fields, which no checksum covers, is not what it should be.

    fields: type, source, session, importance, when told, when recalled, times recalled, times told, tags.
    """
    kind, source, session, importance, created, accessed, uses, told, tags = fields
    numbers = type(importance) is type(created) is float and (accessed is None or type(accessed) is float)
    numbers = numbers and type(uses) is type(told) is int
    if not numbers or kind not in MEMORY_TYPES or source not in SOURCES or type(session) not in (str, NoneType):
        return None
    if tags == "[]":
        return []
    try:
        found = json.loads(tags)
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, list) and all(isinstance(tag, str) for tag in found) else None


def unknown(path: Path, memory_id: str) -> MemoryStoreError:
    """The error for an id that is not there."""
    return MemoryStoreError(f"no memory {memory_id} in {path}; `agentlab memory search` shows the ids")
