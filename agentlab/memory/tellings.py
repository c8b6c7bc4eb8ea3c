"""In which sessions a memory was told, where they are several: each of them finds it, and the last one takes it along.

A memory that was told in one session alone has no rows here: its own row says which. Of knowledge the rows are what
was told directly; what its sources tell is counted of them (`parts_of`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agentlab.memory import sealed
from agentlab.memory.records import MemoryItem, told_again
from agentlab.memory.store import Store

Telling = dict[str, Any]  # memory_id, session_id ("": outside of any), times, tags, source, source_name
CONSOLIDATION = "consolidation"  # the source_name of knowledge that was made of talk


def of(store: Store, memory_id: str) -> list[Telling]:
    """The tellings of a memory by session; none where it was told in one session alone."""
    return _rows(store, "memory_id = ?", memory_id)


def _rows(store: Store, where: str, *values: str) -> list[Telling]:
    found = sealed.rows(store, "tellings", where, values, order="session_id")
    return [{name: row[name] for name in sealed.COLUMNS["tellings"]} for row in found]


def parts_of(store: Store, item: MemoryItem) -> dict[str | None, Telling]:
    """What a memory's count, tags and source are made of: its tellings by session, and by None those of its sources.

    None is only there for knowledge, of which it is the part that derives; what derives of another memory is the part
    of its own session.
    """
    known: dict[str | None, Telling] = {telling["session_id"]: telling for telling in of(store, item.memory_id)}
    if is_knowledge(store, item.memory_id):
        if "" in known and _is_derived(known[""]):
            del known[""]
        known[None] = _derived(store, item)
    elif (own := item.session_id or "") not in known:
        others = sum(telling["times"] for telling in known.values())
        known[own] = _telling(item) | {"times": max(1, item.validation_count - others)}
    return known


def is_knowledge(store: Store, memory_id: str) -> bool:
    """Whether consolidation made a memory, or found that talk tells it, too."""
    return bool(store.db.execute("SELECT 1 FROM knowledge WHERE knowledge_id = ?", (memory_id,)).fetchone())


def _is_derived(telling: Telling) -> bool:
    """Whether this is what consolidation counted: schema version 3 and its exports have that among the rows."""
    return not telling["session_id"] and telling["source_name"] == CONSOLIDATION


def _derived(store: Store, item: MemoryItem) -> Telling:
    rows = [store.row_of(memory_id) for memory_id in store.sources_of(item.memory_id)]
    sources = store.items_of(row for row in rows if row is not None).values()
    return {
        "memory_id": item.memory_id, "session_id": "", "times": sum(source.validation_count for source in sources),
        "tags": [tag for source in sources for tag in source.tags], "source": "agent", "source_name": CONSOLIDATION,
    }  # fmt: skip


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
    """Add tellings to those of a memory, which is as it was before them; the others are neither read nor written."""
    knowledge = is_knowledge(store, old.memory_id)
    begun = store.db.execute("SELECT 1 FROM tellings WHERE memory_id = ?", (old.memory_id,)).fetchone()
    if not begun and not knowledge:
        own = _telling(old)
        if all(part["session_id"] == own["session_id"] for part in parts):
            return
        insert(store, own)
    for part in parts:
        here = _rows(store, "memory_id = ? AND session_id = ?", old.memory_id, part["session_id"])
        if knowledge:
            if _is_derived(part):  # of other sources, which come along as memories
                continue
            here = [telling for telling in here if not _is_derived(telling)]
        insert(store, (_both(here[0], part) if here else part) | {"memory_id": old.memory_id})


def insert(store: Store, telling: Telling) -> None:
    """Store a telling in the place of an older one of that memory and session."""
    sealed.insert(store.db, "tellings", telling, conflict="REPLACE")


def told_in(store: Store, session_id: str) -> tuple[list[str], list[str]]:
    """Ids of the memories that were told in a session: those told nowhere else, and those told elsewhere, too."""
    query = """
        SELECT memory_id, session_id IS NOT ?1
            OR EXISTS (SELECT 1 FROM tellings t WHERE t.memory_id = m.memory_id AND t.session_id != ?1)
            OR EXISTS (SELECT 1 FROM knowledge k WHERE k.knowledge_id = m.memory_id)
        FROM memories m
        WHERE session_id = ?1 OR memory_id IN (SELECT memory_id FROM tellings WHERE session_id = ?1) ORDER BY id
    """
    alone: list[str] = []
    shared: list[str] = []
    for memory_id, elsewhere in store.db.execute(query, (session_id,)).fetchall():
        (shared if elsewhere else alone).append(memory_id)
    return alone, shared


def leave(store: Store, row: int, session_id: str, generation: int) -> MemoryItem:
    """Take what a session told out of the memory at `row`: what it is now.

    Only for a memory that was told elsewhere, too. Its number of tellings, tags and source become those of the rest.
    """
    old = store.item_of(row)
    known = parts_of(store, old)
    known.pop(session_id, None)
    if session_id == (old.session_id or "") and None not in known:  # the others told it by themselves
        store.db.execute("DELETE FROM sources WHERE derived = ?", (old.memory_id,))
    return settle(store, row, old, known, generation)


def once_less(store: Store, row: int, session_id: str, generation: int) -> MemoryItem:
    """Take back one of the tellings of the memory at `row`, one of a session: what it is now."""
    old = store.item_of(row)
    known = parts_of(store, old)
    name = session_id if session_id in known else old.session_id or ""
    if (here := known.get(name)) is None:
        return old
    if here["times"] <= 1 and len(known) > 1:
        return leave(store, row, name, generation)
    known[name] = here | {"times": max(1, here["times"] - 1)}
    if len(known) > 1:
        insert(store, known[name])
    return settle(store, row, old, known, generation)


def settle(
    store: Store, row: int, old: MemoryItem, known: Mapping[str | None, Telling], generation: int
) -> MemoryItem:  # fmt: skip
    """Make the memory at `row` what these parts of it tell: what it is now."""
    own = old.session_id or ""
    if own not in known:
        own = "" if None in known else min(name for name in known if name is not None)
    tags = {tag for telling in known.values() for tag in telling["tags"]}
    first = min(known.values(), key=lambda telling: telling["source"] != "person")
    kept = [] if known.keys() == {own} else [name for name in known if name is not None]
    store.db.execute(
        "DELETE FROM tellings WHERE memory_id = ? AND session_id NOT IN (SELECT value FROM json_each(?))",
        (old.memory_id, json.dumps(kept)),
    )
    left = MemoryItem(**{
        **vars(old), "session_id": own or None, "tags": [tag for tag in old.tags if tag in tags],
        "validation_count": max(1, sum(telling["times"] for telling in known.values())),
        "source": first["source"], "source_name": first["source_name"],
    })  # fmt: skip
    store.rewrite(row, left, generation)
    return left


def _telling(item: MemoryItem) -> Telling:
    return {
        "memory_id": item.memory_id, "session_id": item.session_id or "", "times": item.validation_count,
        "tags": item.tags, "source": item.source, "source_name": item.source_name,
    }  # fmt: skip


def _both(one: Telling, other: Telling) -> Telling:
    first = other if other["source"] == "person" != one["source"] else one
    return {
        **one, "times": one["times"] + other["times"], "tags": list(dict.fromkeys([*one["tags"], *other["tags"]])),
        "source": first["source"], "source_name": first["source_name"],
    }  # fmt: skip
