"""The view of the file that recall searches: vectors, text and columns in RAM, caught up by generation."""

import contextlib
import dataclasses
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from agentlab.errors import MemoryStoreError
from agentlab.memory import ranking, tellings
from agentlab.memory.bulk import no_collections
from agentlab.memory.chunks import chunk_is_intact, unpack
from agentlab.memory.columns import Columns, Filter, Slot
from agentlab.memory.postings import Postings
from agentlab.memory.ranking import Weights
from agentlab.memory.records import Hit, MemoryItem
from agentlab.memory.schema import CHUNK_BITS, is_damage
from agentlab.memory.store import Store, tags_of
from agentlab.memory.vectors import Vectors

CANDIDATES = 100  # of each kind, before they are ranked together
_BATCH = 8_192
_REBUILD = 0.25  # share of forgotten slots at which the view is built anew


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A slot with its score and what it is made of."""

    row: int
    start: int
    end: int
    score: float
    parts: dict[str, float]


class Index:
    """Everything recall needs, in RAM. Not thread-safe by itself: the memory holds its store's lock around it."""

    def __init__(self, dimension: int, epoch: str | None = None) -> None:
        self.dimension = dimension
        self.generation = -1
        self.epoch = epoch  # of the vectors: it rises when they become another model's
        self._seen = -1
        self._clear()

    def _clear(self) -> None:
        self.vectors = Vectors(self.dimension)
        self.text = Postings()
        self.columns = Columns()
        self.generation = -1

    def __len__(self) -> int:
        return self.columns.size - self.columns.dead

    # -- catching up --------------------------------------------------------------------------------------------------

    def catch_up(self, store: Store) -> None:
        """Take in what was committed since last time, by whomever."""
        seen = store.changed_elsewhere()
        if seen == self._seen and self.generation >= 0:
            return
        with store.reading(), no_collections():
            if store.meta("epoch") != self.epoch:
                raise MemoryStoreError(f"{store.path} was given vectors of another model; open it again")
            if self.columns.dead > _REBUILD * max(self.columns.size, 4_096):
                self._clear()
            generation = store.number("generation")
            if generation != self.generation:
                self._load(store, self.generation)
            self.generation = generation
        self._seen = seen

    def _load(self, store: Store, after: int) -> None:
        newest = int(self.columns.row[self.columns.size - 1]) if self.columns.size else 0
        try:
            for (row,) in store.db.execute("SELECT row FROM tombstones WHERE generation > ?", (after,)):
                self.bury(row)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            store.damage[f"tombstones: {error}"] = None
        query = (
            "SELECT id, memory_type, source, session_id, importance, created_at, last_accessed, access_count, "
            "validation_count, tags FROM memories WHERE generation > ?"
        )
        try:
            rows = store.db.execute(f"{query} ORDER BY id", (after,)).fetchall()
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            store.damage[str(error)] = None
            rows = store.one_by_one(f"{query} AND id = ?", (after,))
        told_in = tellings.changed_after(store, after)
        for row in rows:
            if row[0] <= newest:
                self._refresh(store, row, told_in.get(row[0], []))
        added = [row for row in rows if row[0] > newest]
        for start in range(0, len(added), _BATCH):
            self._add(store, added[start : start + _BATCH], told_in)
        self.vectors.settle()

    def _refresh(self, store: Store, row: tuple, told_in: list[str]) -> None:  # type: ignore[type-arg]
        number, _, source, session, importance, _, accessed, uses, told, _ = row
        where = self.columns.slots(number)
        if where.start == where.stop:
            return
        if (known := tags_of(row[1:])) is None:
            store.damage[f"memory row {number} holds something that is not what it should be"] = None
            self.bury(number)
            return
        self.columns.update(
            where, importance=importance, told=told, uses=uses, accessed=accessed, tags=known, source=source,
            session_id=session, told_in=told_in,
        )  # fmt: skip

    def _add(
        self, store: Store, rows: Sequence[tuple], told_in: Mapping[int, list[str]]  # type: ignore[type-arg]
    ) -> None:  # fmt: skip
        known = {row[0]: row for row in rows}
        slots, blobs, texts = [], [], []
        bytes_each = 2 * self.dimension
        for key, start, end, terms, vector, checksum in self._chunks(store, rows[0][0], rows[-1][0]):
            row = known.get(key >> CHUNK_BITS)
            if row is None:
                continue
            if not chunk_is_intact(start, end, terms, vector, checksum) or len(vector) != bytes_each:
                store.damage[f"a chunk of memory row {row[0]} does not match its checksum"] = None
                continue
            if (known_tags := tags_of(row[1:])) is None:
                store.damage[f"memory row {row[0]} holds something that is not what it should be"] = None
                continue
            number, kind, source, session, importance, created, accessed, uses, told, _ = row
            slots.append(
                Slot(number, start, end, kind, source, session, importance, created, accessed, uses, told, known_tags,
                     told_in.get(number, ()))
            )  # fmt: skip
            blobs.append(vector)
            texts.append(terms)
        self._append(slots, unpack(blobs, self.dimension), texts)

    def _chunks(self, store: Store, first: int, last: int) -> list[tuple]:  # type: ignore[type-arg]
        columns = 'SELECT id, start, "end", terms, vector, checksum FROM chunks'
        low, high = first << CHUNK_BITS, (last + 1) << CHUNK_BITS
        try:
            return store.db.execute(f"{columns} WHERE id >= ? AND id < ? ORDER BY id", (low, high)).fetchall()
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            store.damage[str(error)] = None
        found = []
        for row in range(first, last + 1):
            with contextlib.suppress(sqlite3.DatabaseError):
                found += store.db.execute(
                    f"{columns} WHERE id >= ? AND id < ? ORDER BY id", (row << CHUNK_BITS, (row + 1) << CHUNK_BITS)
                ).fetchall()
        return found

    def add(self, slots: Sequence[Slot], vectors: np.ndarray, texts: Sequence[str]) -> None:
        """Append slots with their vectors (n, dimension) and terms."""
        self._append(slots, vectors, texts)
        self.vectors.settle()

    def _append(self, slots: Sequence[Slot], vectors: np.ndarray, texts: Sequence[str]) -> None:
        if slots:
            self.vectors.append(vectors)
            self.text.append(texts)
            self.columns.extend(slots)

    def bury(self, row: int) -> None:
        """Forget a memory's slots."""
        where = self.columns.slots(row)
        if where.start < where.stop and self.columns.alive[where.start]:
            self.columns.bury(where)
            for slot in range(where.start, where.stop):
                self.text.forget(slot)

    # -- searching ----------------------------------------------------------------------------------------------------

    def nearest(self, vector: np.ndarray, count: int) -> list[tuple[int, float]]:
        """(row id, cosine) of the memories nearest to a vector, best first."""
        allowed = self.columns.allowed(Filter())
        slots = self._of_several(count, count, lambda depth: self.vectors.search(vector, depth, allowed)[0])
        rows = dict.fromkeys(self.columns.row[slots].tolist())
        cosines = dict(
            zip(self.columns.row[slots[::-1]].tolist(), self.vectors.scores(vector, slots[::-1]), strict=True)
        )
        return [(row, float(cosines[row])) for row in rows][:count]

    def _of_several(self, count: int, depth: int, search: Callable[[int], np.ndarray]) -> np.ndarray:
        """The slots that `search` finds, deeper than `depth` until `count` memories are among them.

        A long memory has many slots, and all of them may be better than the best of any other.
        """
        while True:
            slots = search(depth)
            # `search` may name a slot several times, so that fewer than asked for are not always all
            if len(slots) < depth // 8 or depth >= self.columns.size:
                return slots
            if len(set(self.columns.row[slots].tolist())) >= count:
                return slots
            depth *= 4

    def wordings(self, words: Sequence[str], count: int) -> list[int]:
        """Row ids of the memories that share most with some terms, best first."""
        with self.text.scored(Counter(words)) as (touched, scores, _):
            alive = None if not self.columns.dead else self.columns.alive
            slots = self._of_several(count, count, lambda depth: _best(touched, scores, depth, alive))
        return list(dict.fromkeys(int(row) for row in self.columns.row[slots]))

    def recall(
        self, vector: np.ndarray | None, words: Sequence[str], count: int, wanted: Filter, weights: Weights, now: float
    ) -> list[Ranked]:
        """The `count` memories that answer a query best, each by its best chunk.

        vector: unit (dimension,), or None to rank by text alone; words: the query's terms.
        """
        columns = self.columns
        n = columns.size
        if not n:
            return []
        allowed = columns.allowed(wanted)
        depth = max(CANDIDATES, 4 * count)
        with self.text.scored(dict(Counter(words))) as (touched, scores, limit):
            found = [self._of_several(count, depth, lambda deep: _best(touched, scores, deep, allowed))]
            if vector is not None:
                found.append(
                    self._of_several(count, depth, lambda deep: self.vectors.search(vector, deep, allowed)[0])
                )  # fmt: skip
            slots = np.unique(np.concatenate(found))
            # an answer often stands beside the question that has the words, so neighbours are candidates too
            near = np.concatenate([columns.previous[slots], columns.next[slots], slots])
            slots = np.unique(near[near >= 0])
            if allowed is not None:
                slots = slots[allowed[slots]]
            if not len(slots):
                return []
            before, after = columns.previous[slots], columns.next[slots]
            every = np.concatenate([slots, before, after])
            relevant, cosines, bm25 = self._relevance(vector, every, scores, limit, weights)
        relevant[every < 0] = 0.0
        if columns.dead:
            relevant[~columns.alive[every]] = 0.0
        size = len(slots)
        own = relevant[:size]
        context = weights.before * relevant[size : 2 * size] + weights.after * relevant[2 * size :]
        important = ranking.importance(columns.importance[slots], columns.uses[slots], columns.told[slots])
        recent = ranking.recency(now, columns.created[slots], columns.accessed[slots], weights.half_life_days)
        total = own + context + weights.importance * important + weights.recency * recent
        total /= 1 + weights.before + weights.after + weights.importance + weights.recency
        order = np.lexsort((slots, -total))
        ranked: dict[int, Ranked] = {}
        for i in order:
            row = int(columns.row[slots[i]])
            if row in ranked:
                continue
            parts = {
                "vector": float(cosines[i]), "text": float(bm25[i]), "relevance": float(own[i]),
                "context": float(context[i]), "importance": float(important[i]), "recency": float(recent[i]),
            }  # fmt: skip
            slot = slots[i]
            ranked[row] = Ranked(row, int(columns.start[slot]), int(columns.end[slot]), float(total[i]), parts)
            if len(ranked) == count:
                break
        return list(ranked.values())

    def _relevance(
        self, vector: np.ndarray | None, slots: np.ndarray, scores: np.ndarray, limit: float, weights: Weights
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        bm25 = scores[slots] / limit if limit > 0 else np.zeros(len(slots), dtype=np.float32)
        if vector is None:
            return bm25.copy(), np.zeros_like(bm25), bm25
        cosines = self.vectors.scores(vector, slots)
        return ranking.relevance(cosines, bm25, weights.vector), cosines, bm25


def _best(touched: np.ndarray, scores: np.ndarray, count: int, allowed: np.ndarray | None) -> np.ndarray:
    """The `count` distinct slots with the highest scores; `touched` may name a slot several times."""
    if allowed is not None:
        touched = touched[allowed[touched]]
    if len(touched) > 8 * count:
        values = scores[touched]
        kept = np.argpartition(values, len(values) - 8 * count)[-8 * count :]
        touched = touched[kept]
    touched = np.unique(touched)
    if len(touched) > count:
        values = scores[touched]
        touched = touched[np.argpartition(values, len(values) - count)[-count:]]
    return touched


def to_hit(ranked: Ranked, item: MemoryItem, *, explain: bool) -> Hit:
    """A hit of a ranked slot and its memory."""
    fields = {name: getattr(item, name) for name in
              ("memory_id", "content", "memory_type", "session_id", "source", "created_at", "tags")}  # fmt: skip
    return Hit(**fields, score=ranked.score, start=ranked.start, end=ranked.end, parts=ranked.parts if explain else {})
