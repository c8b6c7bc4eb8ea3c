"""Knowledge out of talk: what the person told more than once becomes a KnowledgeItem that names its sources."""

import time
from collections.abc import Iterable

import numpy as np

from agentlab.memory import sealed, tellings
from agentlab.memory.chunks import Chunk
from agentlab.memory.core import Core
from agentlab.memory.echo import is_question, same_fact
from agentlab.memory.index import Index
from agentlab.memory.records import KnowledgeItem, MemoryItem
from agentlab.memory.words import signature
from agentlab.memory.writing import add_to_index, new_id

ALIKE = 0.75  # cosine from which on two memories may tell the same; their words decide
_LOOKED_AT = 16
_CLOSE = 0.5  # cosine from which on knowledge is related
_TITLE_WORDS = 8


def confidence(told: int) -> float:
    """How sure a fact is that was told `told` times: 0.5, 0.75, 0.875, …; every telling halves the doubt."""
    return float(1 - 0.5**told)


def consolidate(core: Core) -> list[KnowledgeItem]:
    """Make or strengthen knowledge from what the person told since the last time; what was made or changed.

    A fact counts as told again when another memory of a conversation says the same, or when the same words merged.
    Nothing is removed: sources stay, and forgetting one takes the knowledge along.
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
        dimension = index.dimension
        told = sum(member.validation_count for member in family.values())
        sources = [family[key].memory_id for key in sorted(family)]
        known = _knowledge_of(core, sources)
        if known is None:
            return _make(core, index, generation, family, sources, told, dimension)
        before = set(core.store.sources_of(known))
        everything = before | set(sources)
        told = sum(_told(core, memory_id) for memory_id in everything) + _told_directly(core, known, everything)
        stored = core.store.db.execute(
            "SELECT validation_count FROM memories WHERE memory_id = ?", (known,)
        ).fetchone()[0]
        if everything == before and told == stored:
            return None
        sealed.link(core.store.db, known, sorted(everything))
        core.store.db.execute(
            "UPDATE memories SET validation_count = ?, generation = ? WHERE memory_id = ?", (told, generation, known)
        )
        sealed.change(core.store, "knowledge", known, confidence=confidence(told), last_updated=time.time())
        row_known = core.store.row_of(known)
        if row_known is not None:
            index.columns.told[index.columns.slots(row_known)] = told
        return known


def _told_directly(core: Core, known: str, sources: Iterable[str]) -> int:
    """How often sessions told the knowledge itself; what its sources told is written down beside them."""
    several = tellings.of(core.store, known)
    for telling in several:
        if not telling["session_id"]:  # its own, by which it was made
            times = sum(_told(core, memory_id) for memory_id in sources)
            tellings.insert(core.store, telling | {"times": times})
    return sum(telling["times"] for telling in several if telling["session_id"])


def _told(core: Core, memory_id: str) -> int:
    found = core.store.db.execute("SELECT validation_count FROM memories WHERE memory_id = ?", (memory_id,)).fetchone()
    return int(found[0]) if found else 0


def _knowledge_of(core: Core, sources: Iterable[str]) -> str | None:
    for source in sources:
        for derived in core.store.derived_of(source):
            if core.store.db.execute("SELECT 1 FROM knowledge WHERE knowledge_id = ?", (derived,)).fetchone():
                return derived
    return None


def _make(
    core: Core, index: Index, generation: int, family: dict[int, MemoryItem], sources: list[str], told: int,
    dimension: int,
) -> str:  # fmt: skip
    """A new KnowledgeItem from the member that the others are nearest to, in its own words and with its own vector."""
    rows = sorted(family)
    vectors = np.stack([core.store.vectors_of(row, dimension)[0] for row in rows])
    middle = rows[int(np.argmax((vectors @ vectors.T).sum(axis=1)))]
    chosen = family[middle]
    tags = [tag for member in family.values() for tag in member.tags]
    domain = max(sorted(set(tags)), key=tags.count) if tags else ""
    now = time.time()
    item = MemoryItem(
        memory_id=new_id("k"), content=chosen.content, memory_type="knowledge",
        importance=max(member.importance for member in family.values()), created_at=now,
        tags=list(dict.fromkeys(tags)), source="agent", source_name="consolidation", validation_count=told,
        derived_from=sources,
    )  # fmt: skip
    parts = [
        Chunk(start, end, words, blob)
        for start, end, words, blob in core.store.chunks_of(middle)
    ]  # fmt: skip
    related = [
        core.store.item_of(other).memory_id
        for other, cosine in index.nearest(vectors[rows.index(middle)], _LOOKED_AT)
        if cosine >= _CLOSE and _is_knowledge(core, other)
    ]
    sealed.insert(core.store.db, "knowledge", {
        "knowledge_id": item.memory_id, "title": " ".join(chosen.content.split()[:_TITLE_WORDS]), "domain": domain,
        "confidence": confidence(told), "last_updated": now, "relationships": related,
    })  # fmt: skip
    row = core.store.insert([(item, signature(item.content), parts)], generation)[0]
    add_to_index(index, [(row, item, parts)], dimension)
    return item.memory_id


def _is_knowledge(core: Core, row: int) -> bool:
    return core.store.db.execute(
        "SELECT 1 FROM knowledge k JOIN memories m ON m.memory_id = k.knowledge_id WHERE m.id = ?", (row,)
    ).fetchone() is not None  # fmt: skip


def knowledge(core: Core) -> list[KnowledgeItem]:
    """All knowledge, oldest first."""
    with core.store.reading():
        facts = {row["knowledge_id"]: row for row in sealed.rows(core.store, "knowledge")}
        items = core.store.items("memory_id IN (SELECT knowledge_id FROM knowledge)")
        return [
            KnowledgeItem(
                **{name: facts[item.memory_id][name] for name in sealed.COLUMNS["knowledge"]}, content=item.content,
                source_conversations=item.derived_from, validation_count=item.validation_count,
                embedding=core.store.vectors_of(row, core.store.dimension)[0],
            )
            for row, item in items.items() if item.memory_id in facts
        ]  # fmt: skip
