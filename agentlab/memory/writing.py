"""Remembering: check, guard against echoes, embed, merge duplicates, judge novelty, store; no language model."""

import dataclasses
import itertools
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from agentlab.errors import MemoryStoreError
from agentlab.memory import echo, tellings
from agentlab.memory.chunks import Chunk, pack, unpack
from agentlab.memory.columns import Slot
from agentlab.memory.core import Core
from agentlab.memory.embedding import Span, chunk
from agentlab.memory.index import Index
from agentlab.memory.ranking import novelty_importance
from agentlab.memory.records import (
    MEMORY_TYPES,
    SOURCES,
    MemoryItem,
    check_choice,
    check_count,
    check_metadata,
    check_optional,
    check_share,
    check_string,
    check_tags,
    check_text,
    check_time,
    told_again,
)
from agentlab.memory.words import date_terms, signature_and_terms, terms

# ids of one process never meet, those of two meet in the same millisecond with a chance of one in four billion
_start = secrets.randbits(32)
_count = itertools.count()
_SIGNS = "0123456789abcdefghijklmnopqrstuv"
# 80 bits as base32 with digits first, which sorts as the number does, two signs at a time
_PAIRS = [first + second for first in _SIGNS for second in _SIGNS]
_SHIFTS = range(70, -1, -10)
UNJUDGED = -1.0  # importance of an item that novelty is to decide


def new_id(prefix: str = "m") -> str:
    """A short unique id that sorts by time: 48 bits of milliseconds, 32 of chance and a counter."""
    number = (int(time.time() * 1000) << 32) | (_start + next(_count)) & 0xFFFFFFFF
    return f"{prefix}-{''.join([_PAIRS[number >> shift & 1023] for shift in _SHIFTS])}"


@dataclasses.dataclass(frozen=True)
class Told:
    """Under which id something is remembered, and how it came there."""

    memory_id: str
    how: Literal["new", "merged", "echo"]


def checked(item: MemoryItem) -> MemoryItem:
    """`item` with every field as the file holds it; raises MemoryStoreError that names the field that does not fit."""
    check_text("content", item.content)
    check_text("memory_id", item.memory_id)
    check_choice("memory_type", item.memory_type, MEMORY_TYPES)
    check_choice("source", item.source, SOURCES)
    check_string("source_name", item.source_name)
    check_optional("session_id", item.session_id)
    accessed = item.last_accessed
    return replaced(
        item,
        tags=check_tags(item.tags),
        derived_from=check_tags(item.derived_from, "derived_from"),
        importance=item.importance if item.importance == UNJUDGED else check_share("importance", item.importance),
        created_at=check_time("created_at", item.created_at),  # the checksum is over the float that SQLite gives back
        last_accessed=None if accessed is None else check_time("last_accessed", accessed),
        validation_count=check_count("validation_count", item.validation_count),
        access_count=check_count("access_count", item.access_count),
        metadata=check_metadata(item.metadata),
    )


def index_terms(text: str, created_at: float) -> str:
    """What the text index holds of a chunk: its terms and the date it was told, with spaces between."""
    return _joined(terms(text), created_at)


def _joined(found: Sequence[str], created_at: float) -> str:
    return " ".join([*found, *date_terms(created_at)])


def tell(
    core: Core, content: str, *, tags: Sequence[str] = (), metadata: dict[str, Any] | None = None,
    importance: float | None = None, created_at: float | None = None, derived_from: Sequence[str] = (),
    vector: Sequence[float] | np.ndarray | None = None, **fields: Any,
) -> Told:  # fmt: skip
    """Store `content` as `Memory.remember` is asked to; fields: others of a MemoryItem."""
    item = checked(
        MemoryItem(
            memory_id=new_id(), content=content, tags=check_tags(tags), metadata={} if metadata is None else metadata,
            importance=UNJUDGED if importance is None else check_share("importance", importance),
            created_at=time.time() if created_at is None else created_at,
            derived_from=check_tags(derived_from, "derived_from"), **fields,
        )
    )  # fmt: skip
    core.check_usable()
    return remember(core, item, None if vector is None else core.vector(vector))


def remember(core: Core, item: MemoryItem, vector: np.ndarray | None) -> Told:
    """Store one checked item; the id under which it is found is an older one's if it merged or was an echo."""
    if heard := echo.guard(core, item):
        known, rest = heard
        if known is not None:
            return Told(known, "echo")
        if vector is None:  # a vector from outside is of the whole text
            item = rest
    spans, vectors = _embedded(core, item.content, vector)
    mark, found = signature_and_terms(item.content)
    chunks = _chunks(item, spans, pack(vectors), found)
    with core.changing(vectors.shape[1]) as (index, generation):
        check_forgotten(core, item.derived_from)
        older = core.store.same_wording(mark, item)
        if older is not None:
            return Told(_merge(core, index, older, item, generation), "merged")
        if item.importance == UNJUDGED:
            nearest = max((index.nearest(row, 1) for row in vectors), key=lambda hit: hit[0][1] if hit else 0.0)
            item = replaced(item, importance=novelty_importance(nearest[0][1] if nearest else 0.0))
        row = core.store.insert([(item, mark, chunks)], generation)[0]
        add_to_index(index, [(row, item, chunks)], core.store.dimension)
    return Told(item.memory_id, "new")


def check_forgotten(core: Core, memory_ids: Sequence[str]) -> None:
    """Raise MemoryStoreError where one of the ids was forgotten: what derives from it would bring it back."""
    if gone := core.store.buried(memory_ids):
        raise MemoryStoreError(
            f"{', '.join(sorted(gone))} was forgotten: neither it nor what derives from it is remembered"
        )


def remember_many(core: Core, items: Sequence[MemoryItem], vectors: np.ndarray | None) -> list[str]:
    """Store checked items in one transaction; their ids. Duplicates merge; novelty is not looked up (importance 0.5).

    vectors: unit float32 (n, dimension), one per item, or None to embed. What agents and tools repeat of memories that
    were there before is left out, as in `remember`; what the person tells is not compared.
    """
    known: dict[int, str] = {}
    told = []
    for number, item in enumerate(items):
        if item.source != "person" and (heard := echo.guard(core, item)):
            if heard[0] is not None:
                known[number] = heard[0]
                continue
            told.append(heard[1] if vectors is None else item)
        else:
            told.append(item)
    if vectors is not None and known:
        vectors = np.delete(vectors, list(known), axis=0)
    ids = iter(_remember_many(core, told, vectors))
    return [known[number] if number in known else next(ids) for number in range(len(items))]


def _remember_many(core: Core, items: Sequence[MemoryItem], vectors: np.ndarray | None) -> list[str]:
    if not items:
        return []
    if vectors is None:
        spans = [chunk(item.content, core.embedder) for item in items]
        pieces = [item.content[start:end] for item, cuts in zip(items, spans, strict=True) for start, end in cuts]
        vectors = core.embedder.embed(pieces)
    else:
        spans = [[(0, len(item.content))] for item in items]
    packed = pack(vectors)
    ids: list[str] = []
    fresh: list[tuple[MemoryItem, bytes, list[Chunk]]] = []
    at = 0
    known: dict[tuple[bytes, str, str | None], int] = {}
    elsewhere: list[tuple[int, MemoryItem]] = []  # what another session of the batch told first, and at which place
    worded = [signature_and_terms(item.content) for item in items]
    marks = [mark for mark, _ in worded]
    with core.changing(vectors.shape[1]) as (index, generation):
        told = core.store.wordings_there(marks)
        check_forgotten(core, [one for item in items for one in (item.memory_id, *item.derived_from)])
        for item, cuts, (mark, found) in zip(items, spans, worded, strict=True):
            parts = _chunks(item, cuts, packed[at : at + len(cuts)], found)
            at += len(cuts)
            key = (mark, item.memory_type, item.session_id if item.memory_type == "conversation" else None)
            if (place := known.get(key)) is not None:  # told twice in one batch: the first stands, the second counts
                ids.append(fresh[place][0].memory_id)
                if fresh[place][0].session_id == item.session_id:
                    fresh[place] = (told_again(fresh[place][0], item), *fresh[place][1:])
                else:
                    elsewhere.append((place, item))
                continue
            if mark in told and (older := core.store.same_wording(mark, item)) is not None:
                ids.append(_merge(core, index, older, item, generation))
                continue
            if item.importance == UNJUDGED:
                item = replaced(item, importance=0.5)  # noqa: PLW2901
            known[key] = len(fresh)
            fresh.append((item, mark, parts))
            ids.append(item.memory_id)
        rows = core.store.insert(fresh, generation)
        added = [(row, item, parts) for row, (item, _, parts) in zip(rows, fresh, strict=True)]
        add_to_index(index, added, core.store.dimension)
        for place, item in elsewhere:
            _merge(core, index, rows[place], item, generation)
    return ids


def replaced(item: MemoryItem, **changes: object) -> MemoryItem:
    """`item` with some fields changed; a tenth of what `dataclasses.replace` takes, which many memories feel."""
    made = object.__new__(MemoryItem)
    vars(made).update(vars(item), **changes)
    return made


def _embedded(core: Core, content: str, vector: np.ndarray | None) -> tuple[list[Span], np.ndarray]:
    if vector is not None:
        return [(0, len(content))], vector.reshape(1, -1)
    spans = chunk(content, core.embedder)
    return spans, core.embedder.embed([content[start:end] for start, end in spans])


def _chunks(item: MemoryItem, spans: Sequence[Span], blobs: Sequence[bytes], found: list[str]) -> list[Chunk]:
    """found: the terms of the whole text, which is what a single span is of."""
    return [
        Chunk(start, end, _joined(found if len(spans) == 1 else terms(item.content[start:end]), item.created_at), blob)
        for (start, end), blob in zip(spans, blobs, strict=True)
    ]


def _merge(core: Core, index: Index, row: int, item: MemoryItem, generation: int) -> str:
    """Count `item` as one more telling of the memory at `row`, and give that its tags."""
    told = tellings.retell(core.store, row, item, generation)
    several = () if told.session_id == item.session_id else (told.session_id, item.session_id)
    _show(index, row, told, [name for name in several if name], more=True)
    return told.memory_id


def refresh(core: Core, index: Index, row: int, item: MemoryItem) -> None:
    """Bring what was changed of a memory into the view."""
    _show(index, row, item, tellings.sessions_of(core.store, item.memory_id))


def _show(index: Index, row: int, item: MemoryItem, told_in: Sequence[str], *, more: bool = False) -> None:
    index.columns.update(
        index.columns.slots(row), importance=item.importance, told=item.validation_count, uses=item.access_count,
        accessed=item.last_accessed, tags=item.tags, source=item.source, session_id=item.session_id,
        told_in=told_in, more=more,
    )  # fmt: skip


def add_to_index(index: Index, added: Sequence[tuple[int, MemoryItem, Sequence[Chunk]]], dimension: int) -> None:
    """Bring new rows into the view, after they were inserted."""
    slots = [
        Slot(row, part.start, part.end, item.memory_type, item.source, item.session_id, item.importance,
             item.created_at, item.last_accessed, item.access_count, item.validation_count, item.tags, ())
        for row, item, parts in added for part in parts
    ]  # fmt: skip
    blobs = [part.vector for _, _, parts in added for part in parts]
    # the rounded vectors, as every other process reads them
    index.add(slots, unpack(blobs, dimension), [part.terms for _, _, parts in added for part in parts])
