"""A memory's pieces, each with a vector, as the file holds them: what covers them, and float32 to float16 and back."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_BLOCK = 1_024  # vectors that stay in the processor's cache while they are unpacked


class Chunk(NamedTuple):
    """A piece of a memory: its characters, its terms with spaces between, its vector as float16 bytes."""

    start: int
    end: int
    terms: str
    vector: bytes

    @property
    def checksum(self) -> int:
        return chunk_checksum(self.start, self.end, self.terms, self.vector)


def chunk_checksum(start: int, end: int, terms: str, vector: bytes) -> int:
    return zlib.crc32(f"{start}\x1f{end}\x1f{terms}".encode(), zlib.crc32(vector))


def chunk_is_intact(start: Any, end: Any, terms: Any, vector: Any, checksum: Any) -> bool:
    """Whether a chunk is as it was stored; damage may have made anything of its fields."""
    try:
        return bool(isinstance(vector, bytes) and chunk_checksum(start, end, terms, vector) == checksum)
    except (TypeError, UnicodeError):
        return False


def pack(vectors: np.ndarray) -> list[bytes]:
    """Each row as float16 bytes: half the file, and the exact top 10 stays what it was (docs/MEMORY.md)."""
    half = np.ascontiguousarray(vectors, dtype="<f2")
    return [row.tobytes() for row in half]


def unpack(blobs: Sequence[bytes], dimension: int) -> np.ndarray:
    """float32 (n, dimension) unit rows of packed vectors."""
    vectors = np.empty((len(blobs), dimension), dtype=np.float32)
    for start in range(0, len(blobs), _BLOCK):
        part = blobs[start : start + _BLOCK]
        rows = vectors[start : start + _BLOCK]
        rows[:] = np.frombuffer(b"".join(part), dtype="<f2").reshape(len(part), dimension)
        rows /= np.maximum(np.sqrt(np.vecdot(rows, rows)), 1e-12)[:, None]
    return vectors
