"""Vectors in RAM: exact search over a few, FAISS's 4-bit fast scan with exact refinement over many.

The scan reads a sixteenth of the bytes of a float32 matrix and only has to bring the true nearest among the first
few hundred; those are then compared exactly, so scores are always exact cosines.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

EXACT_LIMIT = 8_192  # up to here comparing all vectors takes less than a millisecond
REFINE = 500  # scanned candidates that are compared exactly
_TRAIN = 1_024  # vectors that the scan's 16 centroids per pair of dimensions are found from; more find no better ones
_MANY_ADDED = 1_024  # vectors outside the scan before they are added to it


class Vectors:
    """Unit vectors by slot: 0, 1, 2, … in the order of `append`."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.size = 0
        self._matrix = np.zeros((256, dimension), dtype=np.float32)
        self._scan: Any = None
        self._scanned = 0  # slots that the scan holds
        self._trained_on = 0

    def append(self, vectors: np.ndarray) -> None:
        """Add float32 (n, dimension) rows of length 1; `settle` when there are no more for now."""
        needed = self.size + len(vectors)
        if needed > len(self._matrix):
            grown = np.zeros((max(needed, 2 * len(self._matrix)), self.dimension), dtype=np.float32)
            grown[: self.size] = self._matrix[: self.size]
            self._matrix = grown
        self._matrix[self.size : needed] = vectors
        self.size = needed

    def settle(self) -> None:
        """Bring the scan up to date where enough was added; once after many additions, because it may train anew."""
        if self.size > EXACT_LIMIT and self.size - self._scanned > _MANY_ADDED:
            self._extend_scan()

    def __getitem__(self, slots: np.ndarray) -> np.ndarray:
        """The vectors of some slots, float32 (len(slots), dimension)."""
        return np.asarray(self._matrix[slots])

    def scores(self, query: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Exact cosines of `query` with some slots."""
        return _cosines(self._matrix[slots], query)

    def search(self, query: np.ndarray, count: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The `count` slots nearest to `query`, best first, and their cosines.

        allowed: mask (size,) of the slots that may come back. Fewer come back where fewer are allowed.
        """
        if self.size == 0 or count <= 0:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        if self._scan is None:
            return self._best(query, np.arange(self.size) if allowed is None else np.flatnonzero(allowed), count)
        if allowed is not None:
            possible = int(np.count_nonzero(allowed))
            if possible <= EXACT_LIMIT:
                return self._best(query, np.flatnonzero(allowed), count)
        wide = max(REFINE, 2 * count)
        slots = self._scan_for(query, wide)
        if allowed is not None:
            # the share that a filter lets through is not known to be even, so the scan widens until enough came
            while np.count_nonzero(allowed[slots]) < min(REFINE, 10 * count) and wide < self._scanned:
                wide = min(4 * wide, self._scanned)
                slots = self._scan_for(query, wide)
            slots = slots[allowed[slots]]
        return self._best(query, slots, count)

    def _scan_for(self, query: np.ndarray, count: int) -> np.ndarray:
        found = self._scan.search(query.reshape(1, -1), min(count, self._scanned))[1][0]
        return np.concatenate([found[found >= 0], np.arange(self._scanned, self.size)])

    def _best(self, query: np.ndarray, slots: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self._matrix[: self.size] if len(slots) == self.size else self._matrix[slots]
        scores = _cosines(rows, query)
        if len(slots) == self.size:
            slots = np.arange(self.size)
        if len(slots) > count:
            kept = np.argpartition(scores, len(scores) - count)[-count:]
            slots, scores = slots[kept], scores[kept]
        order = np.lexsort((slots, -scores))
        return slots[order], scores[order]

    def _extend_scan(self) -> None:
        if self.dimension % 2 or self.dimension < 16:  # two dimensions share a 4-bit code
            return
        import faiss

        if self._scan is None or self.size > 4 * self._trained_on:
            codes = self.dimension // 2
            self._scan = faiss.IndexPQFastScan(self.dimension, codes, 4, faiss.METRIC_INNER_PRODUCT)
            self._scan.pq.cp.niter = 10
            with _one_thread():
                self._scan.train(self._matrix[: self.size : max(1, self.size // _TRAIN)])
            self._trained_on, self._scanned = self.size, 0
        self._scan.add(self._matrix[self._scanned : self.size])  # in as many parts as there are threads
        self._scanned = self.size


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS on one thread: training is thousands of tiny steps, and threads that wait for each other at every one of
    them take a hundred times as long when another program uses the cores.
    """
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _cosines(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(n,) products of unit rows (n, dimension) with `query`, on one thread for the same reason."""
    return np.asarray(np.vecdot(rows, query))
