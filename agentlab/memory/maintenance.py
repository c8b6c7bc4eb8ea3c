"""What a memory is made of, in numbers, and changing its embedding model."""

import sqlite3
from typing import Any

from agentlab.memory.chunks import chunk_checksum, pack
from agentlab.memory.core import Core
from agentlab.memory.doctor import examine
from agentlab.memory.embedding import Embedder, chunk
from agentlab.memory.records import MemoryItem
from agentlab.memory.schema import CHUNK_BITS, damaged
from agentlab.memory.writing import index_terms

_BATCH = 256


def stats(core: Core) -> dict[str, Any]:
    """Counts by kind, sizes in MB, times of the oldest and newest memory, the model, and what was found damaged."""
    store = core.store
    with store.reading() as db:
        kinds = dict(db.execute("SELECT memory_type, count(*) FROM memories GROUP BY memory_type ORDER BY memory_type"))
        sources = dict(db.execute("SELECT source, count(*) FROM memories GROUP BY source ORDER BY source"))
        oldest, newest, uses = db.execute(
            "SELECT min(created_at), max(created_at), coalesce(sum(access_count), 0) FROM memories"
        ).fetchone()
        counts = {
            name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
            for name in ("chunks", "knowledge", "sessions", "turns")
        }
        counts["tombstones"] = len(store.tombstones())
        version = db.execute("PRAGMA user_version").fetchone()[0]
    log = core.path.with_name(core.path.name + "-wal")
    return {
        "path": str(core.path), "schema_version": version, "sqlite": sqlite3.sqlite_version,
        "embedding_model": core.model, "dimension": store.meta("dimension"), "memories": sum(kinds.values()),
        "by_type": kinds, "by_source": sources, **counts, "recalled": uses, "oldest": oldest, "newest": newest,
        "file_mb": round(core.path.stat().st_size / 1e6, 2),
        "log_mb": round(log.stat().st_size / 1e6, 2) if log.exists() else 0.0, "damage": list(store.damage),
    }  # fmt: skip


def reembed(core: Core, embedder: Embedder) -> int:
    """Give every memory vectors of another model, in one transaction; how many memories there are.

    Memories that were written between the embedding and the transaction are embedded inside it. Raises MemoryStoreError
    where the file is not whole: what is read of it would be written as if it were right.
    """
    vectors: dict[int, list[tuple[int, int, str, bytes]]] = {}
    if not (report := examine(core)).clean:
        raise damaged(core.path, report.problems[0])
    _embed(core.store.items(), vectors, embedder)
    with core.store.writing() as db:
        there = core.store.items()
        _embed({row: item for row, item in there.items() if row not in vectors}, vectors, embedder)
        db.execute("INSERT INTO text_index(text_index) VALUES ('delete-all')")
        db.execute("DELETE FROM chunks")
        for row in sorted(there):
            for number, (start, end, words, blob) in enumerate(vectors[row]):
                key = (row << CHUNK_BITS) + number
                db.execute(
                    "INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)",
                    (key, start, end, words, blob, chunk_checksum(start, end, words, blob)),
                )
                db.execute("INSERT INTO text_index(rowid, terms) VALUES (?, ?)", (key, words))
        db.execute("INSERT OR REPLACE INTO meta VALUES ('embedding_model', ?)", (embedder.model_id,))
        db.execute("INSERT OR REPLACE INTO meta VALUES ('dimension', ?)", (str(embedder.dimension),))
        db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'epoch'")
        core.store.next_generation()
    core.use(embedder)
    return len(there)


def _embed(
    items: dict[int, MemoryItem], into: dict[int, list[tuple[int, int, str, bytes]]], embedder: Embedder
) -> None:
    rows = list(items)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        spans = {row: chunk(items[row].content, embedder) for row in batch}
        blobs = iter(pack(embedder.embed([items[row].content[a:b] for row in batch for a, b in spans[row]])))
        for row in batch:
            item = items[row]
            into[row] = [(a, b, index_terms(item.content[a:b], item.created_at), next(blobs)) for a, b in spans[row]]
