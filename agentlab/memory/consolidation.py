"""Knowledge out of talk: what the person told more than once becomes a KnowledgeItem that names its sources."""

import json
import time
from collections.abc import Iterable

import numpy as np

from agentlab.memory.core import Core
from agentlab.memory.echo import repeats
from agentlab.memory.index import Index
from agentlab.memory.records import KnowledgeItem, MemoryItem
from agentlab.memory.store import Chunk
from agentlab.memory.words import overlap, signature, terms
from agentlab.memory.writing import add_to_index, new_id

ALIKE = 0.75  # cosine from which on two memories may tell the same; their words decide
_LOOKED_AT = 16
_CLOSE = 0.5  # cosine from which on knowledge is related
_TITLE_WORDS = 8


def confidence(told: int) -> float:
    """How sure a fact is that was told `told` times: 0.5, 0.75, 0.875, …; every telling halves the doubt."""
    return float(1 - 0.5**told)


def same_fact(one: str, other: str) -> bool:
    """Whether two texts tell the same: all content words of one are in the other, which adds nearly nothing.

    What it adds is neither a name nor a number, and both deny or neither does.
    """
    short, long = sorted((one, other), key=lambda text: len(set(terms(text))))
    return overlap(terms(short), terms(long)) == 1.0 and repeats(long, short)


def consolidate(core: Core) -> list[KnowledgeItem]:
    """Make or strengthen knowledge from what the person told since the last time; what was made or changed.

    A fact counts as told again when another memory of a conversation says the same, or when the same words merged.
    Nothing is removed: sources stay, and forgetting one takes the knowledge along.
    """
    done = int(core.store.meta("consolidated") or 0)
    changed: dict[str, None] = {}
    with core.view():
        fresh = core.store.items("id > ? AND memory_type = 'conversation' AND source = 'person'", (done,))
        again = core.store.items(
            "id <= ? AND memory_type = 'conversation' AND source = 'person' AND validation_count > 1", (done,)
        )
    for row, item in {**again, **fresh}.items():
        if found := _consolidate_one(core, row, item):
            changed[found] = None
    if fresh:
        core.store.set_meta("consolidated", str(max(fresh)))
    return [item for item in knowledge(core) if item.knowledge_id in changed]


def _consolidate_one(core: Core, row: int, item: MemoryItem) -> str | None:
    if not core.store.meta("dimension"):
        return None
    dimension = core.store.dimension
    vector = core.store.vectors_of(row, dimension)[0]
    with core.changing() as (index, generation):
        near = [other for other, cosine in index.nearest(vector, _LOOKED_AT) if cosine >= ALIKE and other != row]
        others = {
            other: twin for other, twin in core.store.items_of(near).items()
            if twin.source == "person" and twin.memory_type == "conversation"
            and same_fact(item.content, twin.content)
        }  # fmt: skip
        family = {row: item, **others}
        told = sum(member.validation_count for member in family.values())
        if told < 2:
            return None
        sources = [family[key].memory_id for key in sorted(family)]
        known = _knowledge_of(core, sources)
        if known is None:
            return _make(core, index, generation, family, sources, told, dimension)
        before = set(core.store.sources_of(known))
        everything = before | set(sources)
        told = sum(_told(core, memory_id) for memory_id in everything)
        stored = core.store.db.execute(
            "SELECT validation_count FROM memories WHERE memory_id = ?", (known,)
        ).fetchone()[0]
        if everything == before and told == stored:
            return None
        core.store.db.executemany(
            "INSERT OR IGNORE INTO sources VALUES (?, ?)", [(known, source) for source in sorted(everything)]
        )
        core.store.db.execute(
            "UPDATE memories SET validation_count = ?, generation = ? WHERE memory_id = ?", (told, generation, known)
        )
        core.store.db.execute(
            "UPDATE knowledge SET confidence = ?, last_updated = ? WHERE knowledge_id = ?",
            (confidence(told), time.time(), known),
        )
        row_known = core.store.row_of(known)
        if row_known is not None:
            index.columns.told[index.columns.slots(row_known)] = told
        return known


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
    core.store.db.execute(
        "INSERT INTO knowledge VALUES (?, ?, ?, ?, ?, ?)",
        (item.memory_id, " ".join(chosen.content.split()[:_TITLE_WORDS]), domain, confidence(told), now,
         json.dumps(related)),
    )  # fmt: skip
    row = core.store.insert([(item, signature(item.content), parts)], generation)[0]
    add_to_index(index, [(row, item, parts)], dimension)
    return item.memory_id


def _is_knowledge(core: Core, row: int) -> bool:
    return core.store.db.execute(
        "SELECT 1 FROM knowledge k JOIN memories m ON m.memory_id = k.knowledge_id WHERE m.id = ?", (row,)
    ).fetchone() is not None  # fmt: skip


def knowledge(core: Core) -> list[KnowledgeItem]:
    """All knowledge, oldest first."""
    with core.store.reading() as db:
        rows = db.execute(
            "SELECT m.id, k.knowledge_id, k.title, m.content, k.domain, k.confidence, m.validation_count, "
            "k.last_updated, k.relationships FROM knowledge k JOIN memories m ON m.memory_id = k.knowledge_id "
            "ORDER BY m.id"
        ).fetchall()
        return [
            KnowledgeItem(
                knowledge_id=knowledge_id, title=title, content=content, domain=domain, confidence=sure,
                source_conversations=core.store.sources_of(knowledge_id), validation_count=told, last_updated=updated,
                embedding=core.store.vectors_of(row, core.store.dimension)[0], relationships=json.loads(related),
            )
            for row, knowledge_id, title, content, domain, sure, told, updated, related in rows
        ]  # fmt: skip
