"""In which sessions a memory was told, where they are several: each of them finds it, and the last one takes it along.

A memory that was told in one session alone has no rows here: its own row says which.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from agentlab.memory import sealed
from agentlab.memory.records import MemoryItem, told_again
from agentlab.memory.store import Store

Telling = dict[str, Any]  # memory_id, session_id ("": outside of any), times, tags, source, source_name


def of(store: Store, memory_id: str) -> list[Telling]:
    """The tellings of a memory by session; none where it was told in one session alone."""
    found = sealed.rows(store, "tellings", "memory_id = ?", (memory_id,), order="session_id")
    return [{name: row[name] for name in sealed.COLUMNS["tellings"]} for row in found]


def sessions_of(store: Store, memory_id: str) -> list[str]:
    """The sessions in which a memory was told, where they are several."""
    return [telling["session_id"] for telling in of(store, memory_id) if telling["session_id"]]


def changed_after(store: Store, generation: int) -> dict[int, list[str]]:
    """Row id → sessions of the memories that were told in several and written after a generation."""
    newer = "memory_id IN (SELECT memory_id FROM memories WHERE generation > ?)"
    found: dict[str, list[str]] = {}
    for row in sealed.rows(store, "tellings", newer, (generation,), order="memory_id, session_id"):
        found.setdefault(row["memory_id"], []).append(row["session_id"])
    rows = ((store.row_of(memory_id), names) for memory_id, names in found.items())
    return {row: [name for name in names if name] for row, names in rows if row is not None}


def retell(
    store: Store, row: int, again: MemoryItem, generation: int, parts: Iterable[Telling] = ()
) -> MemoryItem:  # fmt: skip
    """Count that the memory at `row` was told again: what it is now. parts: the tellings of `again`, if it has some."""
    old = store.item_of(row)
    told = told_again(old, again)
    note(store, old, list(parts) or [_telling(again)])
    store.rewrite(row, told, generation)
    return told


def note(store: Store, old: MemoryItem, parts: Sequence[Telling]) -> None:
    """Add tellings to those of a memory, which is as it was before them."""
    known = {telling["session_id"]: telling for telling in of(store, old.memory_id)}
    if not known:
        own = _telling(old)
        if all(part["session_id"] == own["session_id"] for part in parts):
            return
        known[own["session_id"]] = own
    for part in parts:
        known[part["session_id"]] = _both(known.get(part["session_id"]), part)
    for telling in known.values():
        insert(store, telling | {"memory_id": old.memory_id})


def insert(store: Store, telling: Telling) -> None:
    """Store a telling in the place of an older one of that memory and session."""
    sealed.insert(store.db, "tellings", telling, conflict="REPLACE")


def told_in(store: Store, session_id: str) -> tuple[list[str], list[str]]:
    """Ids of the memories that were told in a session: those told nowhere else, and those told elsewhere, too."""
    query = (
        "SELECT memory_id, session_id FROM memories WHERE session_id = ?1 OR memory_id IN "
        "(SELECT memory_id FROM tellings WHERE session_id = ?1) ORDER BY id"
    )
    alone: list[str] = []
    shared: list[str] = []
    for memory_id, own in store.db.execute(query, (session_id,)).fetchall():
        elsewhere = {own or "", *(telling["session_id"] for telling in of(store, memory_id))} - {session_id}
        (shared if elsewhere else alone).append(memory_id)
    return alone, shared


def leave(store: Store, memory_id: str, session_id: str, generation: int) -> tuple[int, MemoryItem]:
    """Take what a session told of a memory out of it: its row id, and what it is now.

    Only for a memory that was told elsewhere, too. Its number of tellings, tags and source become those of the rest.
    """
    row = store.row_of(memory_id)
    assert row is not None, "it was found in this transaction"
    old = store.item_of(row)
    known = {telling["session_id"]: telling for telling in of(store, memory_id)}
    gone = known.pop(session_id, None)
    store.db.execute("DELETE FROM tellings WHERE memory_id = ? AND session_id = ?", (memory_id, session_id))
    own = old.session_id or ""
    if own == session_id:
        own = min(known)
    now: dict[str, Any] = {"session_id": own or None}
    if gone is not None:
        tags = {tag for telling in known.values() for tag in telling["tags"]}
        sources = sorted(known.values(), key=lambda telling: telling["source"] != "person")
        now |= {
            "validation_count": max(1, old.validation_count - gone["times"]),
            "tags": [tag for tag in old.tags if tag in tags],
            "source": sources[0]["source"], "source_name": sources[0]["source_name"],
        }  # fmt: skip
    if len(known) == 1:
        store.db.execute("DELETE FROM tellings WHERE memory_id = ?", (memory_id,))
    left = MemoryItem(**{**vars(old), **now})
    store.rewrite(row, left, generation)
    return row, left


def once_less(store: Store, item: MemoryItem, session_id: str, generation: int) -> tuple[int, MemoryItem]:
    """Take back one of several tellings of a memory, that of a session: its row id, and what it is now."""
    known = {telling["session_id"]: telling for telling in of(store, item.memory_id)}
    if (here := known.get(session_id)) is not None and here["times"] <= 1:
        return leave(store, item.memory_id, session_id, generation)
    if here is not None:
        insert(store, here | {"times": here["times"] - 1})
    row = store.row_of(item.memory_id)
    assert row is not None, "it was found in this transaction"
    left = MemoryItem(**{**vars(item), "validation_count": item.validation_count - 1})
    store.rewrite(row, left, generation)
    return row, left


def _telling(item: MemoryItem) -> Telling:
    return {
        "memory_id": item.memory_id, "session_id": item.session_id or "", "times": item.validation_count,
        "tags": item.tags, "source": item.source, "source_name": item.source_name,
    }  # fmt: skip


def _both(one: Telling | None, other: Telling) -> Telling:
    if one is None:
        return other
    first = other if other["source"] == "person" != one["source"] else one
    return {
        **one, "times": one["times"] + other["times"], "tags": list(dict.fromkeys([*one["tags"], *other["tags"]])),
        "source": first["source"], "source_name": first["source_name"],
    }  # fmt: skip
