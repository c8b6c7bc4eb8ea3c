"""What every part of the memory works on: the file, the view of it in RAM, the embedding model, loaded when needed."""

import contextlib
import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentlab.errors import MemoryStoreError, StorageError
from agentlab.memory.embedding import DEFAULT, Embedder, SentenceEmbedder
from agentlab.memory.index import Index
from agentlab.memory.store import Store
from agentlab.memory.words import sentences, signature

_USES_KEPT = 512  # recalled memories whose uses are counted in RAM before they are written
_RECALLED_KEPT = 2_048  # sentences of recalled memories that the echo guard knows


class Core:
    """One open memory. Takes its store's lock for every step; embedding happens outside of it."""

    def __init__(self, path: Path, model: str | None, embedder: Embedder | None, *, create: bool = True) -> None:
        self.store = Store(path, create=create)
        self.path = path
        self._pid = os.getpid()
        self._embedder = embedder
        self._loading = threading.Lock()
        self._index: Index | None = None
        self._uses: dict[int, int] = {}
        self._heard: OrderedDict[int, str] = OrderedDict()
        self._recalled: OrderedDict[bytes, int] = OrderedDict()
        self.closed = False
        try:
            self._epoch = self.store.meta("epoch")  # before the model: what changes between the two is noticed later
            self._model_named = model is not None or embedder is not None
            self.model = self._agreed_model(model if embedder is None else embedder.model_id)
            if embedder is not None:
                self.check_dimension(embedder.dimension, f"the embedding model {embedder.model_id}")
            self._purge_if_due()
        except BaseException:
            self.store.close()
            raise

    def _agreed_model(self, asked: str | None) -> str:
        stored = self.store.meta("embedding_model")
        if stored is not None and asked is not None and asked != stored:
            raise MemoryStoreError(
                f"{self.path} holds vectors of {stored}, not of {asked}; open it with {stored}, or change all its "
                f"vectors with: agentlab memory reembed {self.path} --model {asked}"
            )
        return stored or asked or DEFAULT

    @property
    def empty(self) -> bool:
        """Whether nothing was ever stored, so that nothing has to be loaded to answer."""
        return self._index is None and self.store.meta("dimension") is None

    def adopt(self, model: str) -> None:
        """Take the model of vectors that come from outside, where the memory has none and nobody named one."""
        with self.store.lock, self._loading:
            if not self._model_named and self._embedder is None and self.store.meta("dimension") is None:
                self.model = model

    def check_dimension(self, dimension: int, whose: str) -> None:
        """Raise when `dimension` is not that of the vectors in the file or, before the first, of the model."""
        # a view knows it without asking the file; one of another model's vectors is refused when it is caught up
        stored = self._index.dimension if self._index is not None else self.store.number("dimension")
        theirs = f"the vectors in {self.path}"
        if not stored and self._embedder is not None:
            stored, theirs = self._embedder.dimension, f"the embedding model of {self.path}"
        if stored and stored != dimension:
            raise MemoryStoreError(f"{whose} has {dimension} dimensions; allowed: {stored}, as {theirs}")

    def check_usable(self) -> None:
        if self.closed:
            raise MemoryStoreError(f"{self.path} was closed; open it again")
        if os.getpid() != self._pid:
            raise MemoryStoreError(f"{self.path} was opened by another process; open it anew after a fork")

    # -- embedding ----------------------------------------------------------------------------------------------------

    @property
    def embedder(self) -> Embedder:
        """The embedding model, loaded on first use."""
        with self._loading:
            if self._embedder is None:
                loaded = SentenceEmbedder(self.model)
                self.check_dimension(loaded.dimension, f"the embedding model {self.model}")
                self._embedder = loaded
            return self._embedder

    def vector(self, given: Sequence[float] | np.ndarray) -> np.ndarray:
        """A vector from outside as unit float32 (dimension,); refuses a wrong length, NaN and zero."""
        array = as_floats(given, "the vector is no list of numbers")
        array = array[0] if array.ndim == 2 and len(array) == 1 else array
        if array.ndim != 1:
            raise MemoryStoreError(f"the vector has the shape {array.shape}; allowed: one dimension")
        self.check_dimension(len(array), "the vector")
        length = float(np.linalg.norm(array))
        if not np.isfinite(length) or length == 0:
            raise MemoryStoreError("the vector is zero or not finite; allowed: any direction")
        return np.asarray(array / length)

    def embed(self, text: str) -> np.ndarray:
        """float32 (dimension,) of one text."""
        return np.asarray(self.embedder.embed([text])[0])

    # -- the view -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def view(self) -> Iterator[Index]:
        """The index, caught up, with the lock held; an empty one before the first memory."""
        with self.store.lock:
            self.check_usable()
            if self._index is None:
                stored = self.store.meta("dimension")
                if stored is None:
                    yield Index(1)
                    return
                self._check_model()
                self._index = Index(self.store.dimension, self._epoch)
            self._index.catch_up(self.store)
            yield self._index

    def _check_model(self) -> None:
        """Raise when somebody else gave the file another model since it was opened."""
        stored = self.store.meta("embedding_model")
        if stored not in (None, self.model) or self.store.meta("epoch") != self._epoch:
            raise MemoryStoreError(f"{self.path} was given vectors of another model; open it again")

    @contextlib.contextmanager
    def changing(self, dimension: int | None = None) -> Iterator[tuple[Index, int]]:
        """A write transaction with the index caught up inside it, and its generation.

        What the block adds to the index must be added after its last SQL statement. If the transaction fails, the
        index is built anew on next use. dimension: fixes the file's on the first write.
        """
        with self.store.lock:
            self.check_usable()
            index = None
            try:
                with self.store.writing() as db:
                    if dimension is not None and self.store.meta("dimension") is None:
                        db.execute("INSERT INTO meta VALUES ('dimension', ?)", (str(dimension),))
                        db.execute("INSERT OR REPLACE INTO meta VALUES ('embedding_model', ?)", (self.model,))
                    with self.view() as index:
                        if dimension is not None:
                            self.check_dimension(dimension, "each vector")
                        generation = self.store.next_generation()
                        yield index, generation
            except BaseException:
                self._index = None
                raise
            index.generation = generation

    def drop_view(self) -> None:
        """Build the index anew on next use."""
        self._index = None

    def use(self, embedder: Embedder) -> None:
        """Go on with another model, after every vector was changed to it."""
        with self.store.lock:
            self._embedder, self.model, self._index = embedder, embedder.model_id, None
            self._epoch = self.store.meta("epoch")

    # -- uses ---------------------------------------------------------------------------------------------------------

    def count_uses(self, index: Index, rows: Sequence[int], now: float) -> None:
        """Count that memories were recalled, in the view at once, in the file when enough came together or at close."""
        for row in rows:
            self._uses[row] = self._uses.get(row, 0) + 1
        index.columns.count_use(rows, now)

    def uncounted(self, row: int) -> int:
        """Uses of a memory that are not written yet."""
        return self._uses.get(row, 0)

    def uses_due(self) -> bool:
        return len(self._uses) >= _USES_KEPT

    def write_uses(self, now: float) -> None:
        """Store the counted uses; they are the only thing that a kill or a full disk may lose."""
        with self.store.lock:
            if not self._uses or self.store.damage or self.store.frozen:
                return
            counted, self._uses = self._uses, {}
            self.aside(lambda: self._write_uses(counted, now), "some uses of memories are not counted")

    def _write_uses(self, counted: dict[int, int], now: float) -> None:
        with self.changing() as (index, generation):
            self.store.db.executemany(
                "UPDATE memories SET access_count = access_count + ?, last_accessed = max(?, "
                "coalesce(last_accessed, 0)), generation = ? WHERE id = ?",
                [(count, now, generation, row) for row, count in counted.items()],
            )
            for row, uses, accessed in self.store.uses_of(counted):
                index.columns.use(index.columns.slots(row), uses, accessed)

    def aside(self, write: Callable[[], object], lost: str) -> None:
        """A write that nobody asked for: where it fails that is a warning, so that it costs no result."""
        try:
            write()
        except (StorageError, MemoryStoreError) as error:
            warnings.warn(f"{lost}: {error}", RuntimeWarning, stacklevel=2)

    def _purge_if_due(self) -> None:
        """Finish what somebody who forgot could not, because another process was reading or it was killed."""
        if self.store.purge_due and not self.store.frozen:
            self.aside(self.store.purge, f"traces of what was forgotten stay in {self.path}")

    def write_uses_now(self) -> None:
        """`write_uses` at this moment."""
        self.write_uses(time.time())

    def note_recalled(self, row: int, content: str) -> None:
        """Tell the echo guard what was recalled; it is cut into sentences when the guard asks."""
        self._heard[row] = content
        self._heard.move_to_end(row)
        while len(self._heard) > _RECALLED_KEPT:
            self._heard.popitem(last=False)

    def recalled(self) -> dict[bytes, int]:
        """Signature of each recently recalled sentence → the row id of the memory that says it."""
        with self.store.lock:
            while self._heard:
                row, content = self._heard.popitem(last=False)
                for sentence in sentences(content):
                    mark = signature(sentence)
                    self._recalled[mark] = row
                    self._recalled.move_to_end(mark)
            while len(self._recalled) > _RECALLED_KEPT:
                self._recalled.popitem(last=False)
            return self._recalled

    def unhear(self, rows: set[int]) -> None:
        """Let the echo guard forget memories."""
        with self.store.lock:
            for mark in [mark for mark, row in self.recalled().items() if row in rows]:
                del self._recalled[mark]

    def close(self) -> None:
        with self.store.lock:
            if not self.closed:
                try:
                    self.write_uses_now()
                    self._purge_if_due()
                finally:
                    self.closed = True
                    self.store.close()


def as_floats(given: Any, otherwise: str) -> np.ndarray:
    """`given` as a float32 array; raises MemoryStoreError that begins with `otherwise` where it is none."""
    try:
        return np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        raise MemoryStoreError(f"{otherwise}: {given!r:.80}") from None
