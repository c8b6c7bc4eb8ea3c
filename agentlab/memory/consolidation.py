"""Knowledge out of talk: what the person told more than once becomes a KnowledgeItem that names its sources."""

import time
from collections.abc import Iterable

import numpy as np

from agentlab.memory import sealed, tellings
from agentlab.memory.chunks import Chunk
from agentlab.memory.core import Core
from agentlab.memory.index import Index
from agentlab.memory.records import KnowledgeItem, MemoryItem
from agentlab.memory.saying import is_question, same_fact
from agentlab.memory.words import signature
from agentlab.memory.writing import add_to_index, new_id, refresh, replaced

ALIKE = 0.75  # cosine from which on two memories may tell the same; their words decide
_LOOKED_AT = 16
_CLOSE = 0.5  # cosine from which on knowledge is related
_TITLE_WORDS = 8
_TWICE = 2  # how often its sources tell what is knowledge


def confidence(told: int) -> float:
    """How sure a fact is that was told `told` times: 0.5, 0.75, 0.875, …; every telling halves the doubt."""
    return float(1 - 0.5**told)


def consolidate(core: Core) -> list[KnowledgeItem]:
    """Make or strengthen knowledge from what the person told since the last time; what was made or changed.

    A fact counts as told again when another memory of a conversation says the same, or when the same words merged.
    What was told directly in the same words becomes that knowledge. Nothing is removed: sources stay, and forgetting
    one takes along what only they tell.
    """
    told = "generation > ? AND memory_type = 'conversation' AND source = 'person'"
    with core.store.reading():
        now = core.store.number("generation")
        rows = core.store.items(told, (core.store.number("consolidated_at"),))
    changed = consolidate_rows(core, rows)
    if rows:
        with core.store.writing():
            core.store.set_meta("consolidated_at", str(now))
    return [item for item in knowledge(core) if item.knowledge_id in changed]


def consolidate_rows(core: Core, rows: Iterable[int]) -> set[str]:
    """Make or strengthen knowledge of the memories with these row ids; the ids of what was made or changed."""
    return {found for row in rows if (found := _consolidate_one(core, row)) is not None}


def _family(core: Core, index: Index, row: int) -> dict[int, MemoryItem]:
    """The memories that tell what the one at `row` tells, it among them; none where all of them told it once."""
    item = core.store.items_of([row]).get(row)
    if item is None or item.source != "person" or item.memory_type != "conversation" or is_question(item.content):
        return {}
    vector = core.store.vectors_of(row, index.dimension)[0]
    near = [other for other, cosine in index.nearest(vector, _LOOKED_AT) if cosine >= ALIKE and other != row]
    others = {
        other: twin for other, twin in core.store.items_of(near).items()
        if twin.source == "person" and twin.memory_type == "conversation" and same_fact(item.content, twin.content)
        and not is_question(twin.content)
    }  # fmt: skip
    family = {row: item, **others}
    return family if sum(member.validation_count for member in family.values()) > 1 else {}


def _consolidate_one(core: Core, row: int) -> str | None:
    with core.view() as index, core.store.reading():
        if not _family(core, index, row):
            return None  # most are told once, and looking costs no write
    with core.changing() as (index, generation):
        family = _family(core, index, row)  # again: somebody may have forgotten meanwhile
        if not family:
            return None
        sources = [family[key].memory_id for key in sorted(family)]
        known = _knowledge_of(core, sources)
        if known is None:
            return _make(core, index, generation, family, sources)
        before = set(core.store.sources_of(known))
        everything = before | set(sources)
        told = sum(_told(core, memory_id) for memory_id in everything) + _told_directly(core, known)
        if everything == before and told == _told(core, known):
            return None
        sealed.link(core.store.db, known, sorted(everything))
        recount(core, index, generation, known)
        return known


def recount(core: Core, index: Index, generation: int, known: str) -> bool:
    """Count knowledge anew of its sources and of what was told directly; whether there is any of it left.

    What its sources no longer tell twice is no knowledge: it is what was told directly, or goes, which is the caller's.
    """
    store = core.store
    if (row := store.row_of(known)) is None or not tellings.is_knowledge(store, known):
        return True
    item = store.item_of(row)
    parts = tellings.parts_of(store, item)
    if parts[None]["times"] < _TWICE:
        if len(parts) == 1:
            return False
        del parts[None]
        store.db.execute("DELETE FROM knowledge WHERE knowledge_id = ?", (known,))
        store.db.execute("DELETE FROM sources WHERE derived = ?", (known,))
    left = tellings.settle(store, row, item, parts, generation)
    sealed.change(store, "knowledge", known, confidence=confidence(left.validation_count), last_updated=time.time())
    refresh(core, index, row, left)
    return True


def _told_directly(core: Core, known: str) -> int:
    """How often the knowledge itself was told."""
    if (row := core.store.row_of(known)) is None:
        return 0
    parts = tellings.parts_of(core.store, core.store.item_of(row))
    return sum(telling["times"] for name, telling in parts.items() if name is not None)


def _told(core: Core, memory_id: str) -> int:
    found = core.store.db.execute("SELECT validation_count FROM memories WHERE memory_id = ?", (memory_id,)).fetchone()
    return int(found[0]) if found else 0


def _knowledge_of(core: Core, sources: Iterable[str]) -> str | None:
    for source in sources:
        for derived in core.store.derived_of(source):
            if tellings.is_knowledge(core.store, derived):
                return derived
    return None


def _make(core: Core, index: Index, generation: int, family: dict[int, MemoryItem], sources: list[str]) -> str:
    """The id of a new KnowledgeItem from the member that the others are nearest to, in its own words and vector.

    Where just these words were told directly as knowledge, that becomes it, if it derives from nothing else.
    """
    store = core.store
    rows = sorted(family)
    vectors = np.stack([store.vectors_of(row, index.dimension)[0] for row in rows])
    middle = rows[int(np.argmax((vectors @ vectors.T).sum(axis=1)))]
    chosen = family[middle]
    tags = [tag for member in family.values() for tag in member.tags]
    domain = max(sorted(set(tags)), key=tags.count) if tags else ""
    now, told = time.time(), sum(member.validation_count for member in family.values())
    item = MemoryItem(
        memory_id=new_id("k"), content=chosen.content, memory_type="knowledge",
        importance=max(member.importance for member in family.values()), created_at=now,
        tags=list(dict.fromkeys(tags)), source="agent", source_name=tellings.CONSOLIDATION, validation_count=told,
        derived_from=sources,
    )  # fmt: skip
    related = [
        store.item_of(other).memory_id
        for other, cosine in index.nearest(vectors[rows.index(middle)], _LOOKED_AT)
        if cosine >= _CLOSE and _is_knowledge(core, other)
    ]
    made = {
        "knowledge_id": item.memory_id, "title": " ".join(chosen.content.split()[:_TITLE_WORDS]), "domain": domain,
        "confidence": confidence(told), "last_updated": now, "relationships": related,
    }  # fmt: skip
    mark = signature(item.content)
    older = store.same_wording(mark, item)
    if older is not None and not store.item_of(older).derived_from:
        return _take_over(core, index, generation, older, made, item)
    parts = [Chunk(start, end, words, blob) for start, end, words, blob in store.chunks_of(middle)]
    sealed.insert(store.db, "knowledge", made)
    row = store.insert([(item, mark, parts)], generation)[0]
    add_to_index(index, [(row, item, parts)], index.dimension)
    return item.memory_id


def _take_over(core: Core, index: Index, generation: int, row: int, made: sealed.Row, item: MemoryItem) -> str:
    """Make the memory at `row` the knowledge that `made` and `item` describe; what told it so far told it directly."""
    store = core.store
    older = store.item_of(row)
    for name, telling in tellings.parts_of(store, older).items():
        if name is not None:
            tellings.insert(store, telling)
    sealed.insert(store.db, "knowledge", made | {"knowledge_id": older.memory_id}, conflict="REPLACE")
    sealed.link(store.db, older.memory_id, item.derived_from)
    store.rewrite(row, replaced(older, tags=list(dict.fromkeys([*older.tags, *item.tags]))), generation)
    recount(core, index, generation, older.memory_id)
    return older.memory_id


def _is_knowledge(core: Core, row: int) -> bool:
    return core.store.db.execute(
        "SELECT 1 FROM knowledge k JOIN memories m ON m.memory_id = k.knowledge_id WHERE m.id = ?", (row,)
    ).fetchone() is not None  # fmt: skip


def knowledge(core: Core) -> list[KnowledgeItem]:
    """All knowledge, oldest first."""
    with core.store.reading():
        rows = sealed.rows(core.store, "knowledge")
        facts = {row["knowledge_id"]: {name: row[name] for name in sealed.COLUMNS["knowledge"]} for row in rows}
        items = core.store.items("memory_id IN (SELECT knowledge_id FROM knowledge)")
        return [
            KnowledgeItem(
                **facts[item.memory_id] | {"confidence": confidence(item.validation_count)}, content=item.content,
                source_conversations=item.derived_from, validation_count=item.validation_count,
                embedding=core.store.vectors_of(row, core.store.dimension)[0],
            )
            for row, item in items.items() if item.memory_id in facts
        ]  # fmt: skip
