"""Rows beside the memories, such as turns, sessions and tombstones: read and written with a checksum each."""

import json
import sqlite3
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentlab.memory.schema import damaged, is_damage

if TYPE_CHECKING:
    from agentlab.memory.store import Store

Row = dict[str, Any]
# What a table's checksum covers; the first column names the row. Numbers of rows in views are not covered.
COLUMNS: dict[str, tuple[str, ...]] = {
    "turns": (
        "conversation_id", "session_id", "timestamp", "user_input", "agent_response", "context_used",
        "importance_score", "tags", "metadata", "memory_ids", "echoes", "retold",
    ),
    "sessions": (
        "session_id", "user_id", "start_time", "last_activity", "active_memories", "preferences", "summary",
        "summarised",
    ),
    "knowledge": ("knowledge_id", "title", "domain", "confidence", "last_updated", "relationships"),
    "sources": ("derived", "source"),
    "tombstones": ("memory_id", "kind", "forgotten_at", "reason"),
    "aliases": ("memory_id", "stands_for"),
    "tellings": ("memory_id", "session_id", "times", "tags", "source", "source_name"),
}  # fmt: skip
KEYS = {table: 2 if table in ("sources", "tellings") else 1 for table in COLUMNS}  # how many columns name a row
JSON_COLUMNS = frozenset(
    ("context_used", "tags", "metadata", "memory_ids", "echoes", "retold", "active_memories", "preferences", "summary",
     "relationships")
)  # fmt: skip
NAMES = {
    "turns": "turn", "sessions": "session", "knowledge": "knowledge", "sources": "a source of",
    "tombstones": "tombstone", "aliases": "alias", "tellings": "a telling of",
}  # fmt: skip


def empty_session(session_id: str, user_id: str, start_time: float, last_activity: float) -> Row:
    """A session's row before anything is known of it; times in seconds since 1970."""
    return {
        "session_id": session_id, "user_id": user_id, "start_time": start_time, "last_activity": last_activity,
        "active_memories": [], "preferences": {}, "summary": [], "summarised": 0,
    }  # fmt: skip


def seal(table: str, values: Sequence[Any]) -> int:
    """CRC-32 of a table's name and a row's values as the file holds them, in the order of `COLUMNS`.

    The name, because a page found by itself does not say whose it is, and tables have rows of one shape.
    """
    parts = ("" if value is None else value if isinstance(value, str) else repr(value) for value in values)
    return zlib.crc32("\x1f".join([table, *parts]).encode())


def packed(table: str, row: Row) -> list[Any]:
    """A row's values as the file holds them: JSON as text."""
    return [
        json.dumps(row[name], ensure_ascii=False, sort_keys=name in ("metadata", "preferences"))
        if name in JSON_COLUMNS else row[name]
        for name in COLUMNS[table]
    ]  # fmt: skip


def opened(table: str, values: Sequence[Any], checksum: Any) -> Row | None:
    """The row that `values` hold; None where they do not match the checksum or are not JSON where they should be."""
    try:
        if seal(table, values) != checksum:
            return None
        return {
            name: json.loads(value) if name in JSON_COLUMNS else value
            for name, value in zip(COLUMNS[table], values, strict=True)
        }
    except (TypeError, ValueError):
        return None


def rows(store: "Store", table: str, where: str = "1", values: Sequence[Any] = (), *, order: str = "") -> list[Row]:
    """Rows that match, turns with their number as `id`; damaged ones are left out and noted in the store's `damage`.

    Where a page is broken they end there: whoever writes afterwards is refused because of the damage.
    """
    names = COLUMNS[table]
    with store.reading() as db:
        number = "id" if table == "turns" else "0"
        query = f"SELECT {number}, checksum, {', '.join(names)} FROM {table} WHERE {where}"
        found = []
        try:
            for row_id, checksum, *fields in db.execute(f"{query} ORDER BY {order or names[0]}", values):
                if (intact := opened(table, fields, checksum)) is None:
                    store.damage[f"{NAMES[table]} {fields[0]} does not match its checksum"] = None
                else:
                    found.append({"id": row_id, **intact})
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            store.damage[f"{table}: {error}"] = None
        return found


def row(store: "Store", table: str, key: str) -> Row | None:
    """The row of that name, None where it is not there; raises MemoryStoreError where it is damaged."""
    with store.reading():
        known, store.damage = store.damage, {}  # a row that was found damaged before is so again
        try:
            found = rows(store, table, f"{COLUMNS[table][0]} = ?", (key,))
            here = list(store.damage)
        finally:
            store.damage = known | store.damage
        if here and not found:
            raise damaged(store.path, here[0])
    return found[0] if found else None


def insert(
    db: sqlite3.Connection, table: str, values: Row, *, conflict: str = "ABORT", **beside: int
) -> None:  # fmt: skip
    """Add a row; `conflict` says what happens when its name is there; `beside`: columns that no checksum covers."""
    whole = packed(table, values)
    names = [*COLUMNS[table], "checksum", *beside]
    db.execute(
        f"INSERT OR {conflict} INTO {table}({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
        [*whole, seal(table, whole), *beside.values()],
    )


def change(store: "Store", table: str, key: str, **changes: Any) -> None:
    """Set columns of the row of that name, where it is there; a damaged one raises instead of being sealed anew."""
    old = row(store, table, key)
    if old is None or all(old[name] == value for name, value in changes.items()):
        return
    values = packed(table, old | changes)
    names = COLUMNS[table]
    store.db.execute(
        f"UPDATE {table} SET {', '.join(f'{name} = ?' for name in names)}, checksum = ? WHERE {names[0]} = ?",
        [*values, seal(table, values), key],
    )


def link(db: sqlite3.Connection, derived: str, sources: Sequence[str]) -> None:
    """Note that a memory derives from others."""
    for source in sources:
        insert(db, "sources", {"derived": derived, "source": source}, conflict="IGNORE")


def seal_all(db: sqlite3.Connection) -> None:
    """Give every row its checksum: what schema version 2 adds to a file of version 1."""
    for table, names in COLUMNS.items():
        count = KEYS[table]
        key = " AND ".join(f"{name} IS ?" for name in names[:count])
        found = db.execute(f"SELECT {', '.join(names)} FROM {table}").fetchall()
        db.executemany(
            f"UPDATE {table} SET checksum = ? WHERE {key}", [(seal(table, values), *values[:count]) for values in found]
        )
