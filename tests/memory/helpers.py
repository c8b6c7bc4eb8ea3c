"""A real embedding model that needs no download and no torch, and what several tests of the memory look at."""

import hashlib
import zlib

import numpy as np

from agentlab.memory import Memory
from agentlab.memory.words import terms, tokens


class HashingEmbedder:
    """Feature hashing of a text's terms (Weinberger et al. 2009): similar words, similar vectors. Window in words."""

    def __init__(self, dimension=64, window=64, model_id="hashing-64"):
        self.dimension, self.window, self.model_id = dimension, window, model_id

    def embed(self, texts):
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for term in terms(text) or tokens(text) or [text]:
                code = zlib.crc32(term.encode())
                row[code % self.dimension] += 1 if code & 0x10000 else -1
            if not row.any():
                row[0] = 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def spans(self, text):
        found, at = [], 0
        for word in text.split():
            start = text.index(word, at)
            at = start + len(word)
            found.append((start, at))
        return found


def open_memory(path, **options):
    return Memory.open(path, embedder=HashingEmbedder(), **options)


def everything(path):
    """The bytes of all files of the memory at `path`."""
    return {file.name: file.read_bytes() for file in path.parent.glob(f"{path.name}*")}


def contents(hits):
    return [hit.content for hit in hits]


def flip(path, offset, count=1):
    """Turn over all bits of so many of the file's bytes."""
    data = bytearray(path.read_bytes())
    for place in range(offset, offset + count):
        data[place] ^= 0xFF
    path.write_bytes(data)


def digest(path):
    """Hex sha256 of the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
