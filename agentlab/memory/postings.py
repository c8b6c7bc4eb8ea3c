"""Text index in RAM: BM25 over the terms of every slot, appended to while it is searched.

FTS5 in the memory's file holds the same terms and is what survives; it cannot weigh terms or score 10,000 matches in a
millisecond, so recall ranks here.
"""

import contextlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

# How soon repeating a term stops helping, and how much a long text is held against it: the defaults of Anserini
# (Yang, Fang & Lin 2017), which suit short texts better than 1.2 and 0.75.
K1 = 0.9
B = 0.4
_TAIL = 1024  # slots appended one by one before they are merged into the arrays
_ENOUGH = 20_000  # matches after which the remaining, more frequent terms only rank what was found


class Postings:
    """Which slots hold which term, how often. Slots are 0, 1, 2, … in the order of `append`."""

    def __init__(self) -> None:
        self._ids: defaultdict[str, int] = defaultdict()
        self._ids.default_factory = self._ids.__len__  # a new term gets the next number
        self._starts = np.zeros(1, dtype=np.int64)  # (n_terms + 1,): where each term's postings begin
        self._slots = np.zeros(0, dtype=np.int32)
        self._counts = np.zeros(0, dtype=np.float32)
        self._parts = np.zeros(0, dtype=np.float32)  # what each posting adds to a score, at that average length:
        self._parts_average = 0.0
        self._tail: dict[int, list[tuple[int, int]]] = {}
        self._tail_slots = 0
        self._lengths = np.zeros(1024, dtype=np.float32)
        self._scratch = np.zeros(1024, dtype=np.float32)
        self._dead = np.zeros(1024, dtype=np.bool_)
        self._total_length = 0.0
        self.size = 0
        self.dead = 0

    def append(self, texts: Iterable[str]) -> None:
        """Add slots, each given by its terms with spaces between."""
        words = [text.split(" ") if text else [] for text in texts]
        lengths = np.array([len(part) for part in words], dtype=np.int64)
        first, self.size = self.size, self.size + len(words)
        self._grow(self.size)
        self._lengths[first : self.size] = lengths
        self._total_length += float(lengths.sum())
        if self._tail_slots + len(words) <= _TAIL:
            self._tail_slots += len(words)
            for slot, part in enumerate(words, start=first):
                for word, count in Counter(part).items():
                    self._tail.setdefault(self._ids[word], []).append((slot, count))
            return
        terms = np.fromiter(map(self._ids.__getitem__, itertools.chain.from_iterable(words)), dtype=np.int64)
        keys, counts = np.unique(terms << 32 | np.repeat(np.arange(first, self.size), lengths), return_counts=True)
        self._merge(keys >> 32, keys & 0xFFFFFFFF, counts)

    def forget(self, slot: int) -> None:
        """Leave a slot out of every score and count; its postings stay until the index is rebuilt."""
        self._total_length -= float(self._lengths[slot])
        self._dead[slot] = True
        self.dead += 1

    def _grow(self, needed: int) -> None:
        if needed > len(self._lengths):
            more = np.zeros(max(needed, 2 * len(self._lengths)) - len(self._lengths), dtype=np.float32)
            self._lengths = np.concatenate([self._lengths, more])
            self._dead = np.concatenate([self._dead, more > 0])
            self._scratch = np.zeros(len(self._lengths), dtype=np.float32)

    def _merge(self, terms: np.ndarray, slots: np.ndarray, counts: np.ndarray) -> None:
        """Move the tail and what was just added into the arrays; slots only grow, so each term's go to its end."""
        late = [(term, slot, count) for term, rows in self._tail.items() for slot, count in rows]
        added = np.array(late, dtype=np.int64).reshape(-1, 3)
        terms = np.concatenate([added[:, 0], terms])
        order = np.argsort(terms, kind="stable")
        terms = terms[order]
        slots = np.concatenate([added[:, 1], slots])[order].astype(np.int32)
        counts = np.concatenate([added[:, 2], counts])[order].astype(np.float32)
        ends = self._starts[np.minimum(terms + 1, len(self._starts) - 1)]
        grown = np.bincount(terms, minlength=len(self._ids))
        grown[: len(self._starts) - 1] += np.diff(self._starts)
        self._slots = np.insert(self._slots, ends, slots)
        self._counts = np.insert(self._counts, ends, counts)
        self._starts = np.concatenate([[0], np.cumsum(grown)])
        self._parts_average = 0.0
        self._tail, self._tail_slots = {}, 0

    def _average(self) -> float:
        """The mean length, in steps of two per cent, so that what postings add to scores is seldom computed anew."""
        exact = max(self._total_length / max(self.size - self.dead, 1), 1.0)
        return float(2 ** (round(32 * math.log2(exact)) / 32))

    def _saturated(self, slots: np.ndarray, counts: np.ndarray, average: float) -> np.ndarray:
        """BM25's share of a term's weight that so many of it add, by the slots' lengths, in [0, 1)."""
        return np.asarray(counts / (counts + K1 * (1 - B + B / average * self._lengths[slots])), dtype=np.float32)

    def _postings(self, term: str, average: float) -> tuple[np.ndarray, np.ndarray]:
        """The slots that have a term, and what it adds to each."""
        number = self._ids.get(term)
        slots, parts = self._slots[:0], self._parts[:0]
        if number is None:
            return slots, parts
        if number < len(self._starts) - 1:
            if self._parts_average != average:
                self._parts, self._parts_average = self._saturated(self._slots, self._counts, average), average
            of_term = slice(self._starts[number], self._starts[number + 1])
            slots, parts = self._slots[of_term], self._parts[of_term]
        if late := self._tail.get(number):
            rows = np.array(late, dtype=np.int32)
            slots = np.concatenate([slots, rows[:, 0]])
            parts = np.concatenate([parts, self._saturated(rows[:, 0], rows[:, 1].astype(np.float32), average)])
        return slots, parts

    @contextlib.contextmanager
    def scored(self, weights: Mapping[str, float]) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        """BM25 of every slot for a query: slots that share a term with it, scores by slot, the score none can exceed.

        weights: how much each query term counts. The slots come in no order, some twice; the scores are an array over
        all slots that is valid inside the block only.
        """
        found, alive, average = [], self.size - self.dead, self._average()
        for term, weight in weights.items():
            slots, parts = self._postings(term, average)
            if self.dead:
                living = ~self._dead[slots]
                slots, parts = slots[living], parts[living]
            idf = math.log1p((alive - len(slots) + 0.5) / (len(slots) + 0.5))
            found.append((weight * idf * (K1 + 1), slots, parts))
        found.sort(key=lambda each: len(each[1]))
        scores = self._scratch
        touched, matches = [self._slots[:0]], 0
        for weight, slots, parts in found:
            if matches <= _ENOUGH:
                scores[slots] += np.float32(weight) * parts
                touched.append(slots)
            else:
                before = scores[slots]
                scores[slots] = before + np.float32(weight) * parts * (before > 0)
            matches += len(slots)
        try:
            yield np.concatenate(touched), scores, sum(weight for weight, _, _ in found)
        finally:
            scores[: self.size] = 0
