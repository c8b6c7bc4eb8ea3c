"""A memory as JSON lines and back; export → import → export gives the same lines."""

import base64
import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agentlab.errors import AgentlabError, MemoryStoreError
from agentlab.files import disk_errors, sync_folder
from agentlab.memory.core import Core
from agentlab.memory.embedding import MAX_CHUNKS, chunk
from agentlab.memory.records import MemoryItem
from agentlab.memory.store import Chunk, pack
from agentlab.memory.words import signature
from agentlab.memory.writing import checked, index_terms

FORMAT = "agentlab-memory"
VERSION = 1
_FIELDS = (
    "memory_id", "content", "memory_type", "importance", "access_count", "last_accessed", "created_at", "tags",
    "session_id", "source", "source_name", "validation_count", "derived_from", "metadata",
)  # fmt: skip
Records = dict[str, list[tuple[int, dict[str, Any]]]]  # kind → (line number, values)
# tables that go as they are: columns that hold JSON are opened
_TABLES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "knowledge": (
        "knowledge", ("knowledge_id", "title", "domain", "confidence", "last_updated", "relationships"),
        ("relationships",),
    ),
    "session": (
        "sessions",
        ("session_id", "user_id", "start_time", "last_activity", "active_memories", "preferences", "summary"),
        ("active_memories", "preferences", "summary"),
    ),
    "turn": (
        "turns",
        ("conversation_id", "session_id", "timestamp", "user_input", "agent_response", "context_used",
         "importance_score", "tags", "metadata", "memory_ids", "echoes"),
        ("context_used", "tags", "metadata", "memory_ids", "echoes"),
    ),
    "tombstone": ("tombstones", ("memory_id", "kind", "forgotten_at", "reason"), ()),
}  # fmt: skip


def lines(core: Core) -> Iterator[str]:
    """The memory, one JSON object a line: a header, memories in the order they came, then the other records."""
    core.write_uses_now()
    with core.store.reading() as db:
        dimension = core.store.meta("dimension")
        yield _line("header", {
            "format": FORMAT, "version": VERSION, "embedding_model": core.model,
            "dimension": None if dimension is None else int(dimension),
        })  # fmt: skip
        for row, item in core.store.items().items():
            vectors = [
                [start, end, base64.b64encode(blob).decode()] for start, end, _, blob in core.store.chunks_of(row)
            ]
            yield _line("memory", {**{name: getattr(item, name) for name in _FIELDS}, "chunks": vectors})
        for kind, (table, columns, packed) in _TABLES.items():
            extra = ", (SELECT conversation_id FROM turns t WHERE t.id = summarised)" if kind == "session" else ""
            order = "id" if kind == "turn" else columns[0]
            for row in db.execute(f"SELECT {', '.join(columns)}{extra} FROM {table} ORDER BY {order}").fetchall():
                value = dict(zip((*columns, "summarised"), row, strict=False))
                yield _line(kind, {key: json.loads(v) if key in packed else v for key, v in value.items()})


def _line(kind: str, value: dict[str, Any]) -> str:
    return json.dumps({"record": kind, **value}, ensure_ascii=False, allow_nan=False)


def export(core: Core, path: Path) -> int:
    """Write the memory to `path` atomically; how many memories went."""
    count = 0
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(scratch, "w", encoding="utf-8") as file:
                for line in lines(core):
                    file.write(line + "\n")
                    count += line.startswith('{"record": "memory"')
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        sync_folder(path.parent)
    return count


def import_(core: Core, path: Path) -> int:
    """Take in an export, all of it or nothing; how many memories were new.

    What is there by id stays as it is, what was forgotten here stays forgotten, the same words merge into the older
    memory. A memory without vectors that was opened without naming a model takes the export's model; in any other,
    vectors of another model are made anew with its own. Raises MemoryStoreError naming the line that is wrong.
    """
    records = _read(path)
    header = next(iter(records.get("header", [])), (0, {}))[1]
    if header.get("format") != FORMAT:
        raise MemoryStoreError(f"{path} is not an export of a memory: its first line is not its header")
    if header.get("version") != VERSION:
        raise MemoryStoreError(f"{path} has format version {header.get('version')}; allowed: {VERSION}")
    items = [(number, _item(path, number, value), value.get("chunks")) for number, value in records.get("memory", [])]
    if isinstance(header.get("embedding_model"), str):
        core.adopt(header["embedding_model"])  # after the lines were checked
    known = header.get("embedding_model") == core.model
    if known and header.get("dimension") is not None:
        core.check_dimension(header["dimension"], f"{path}, made with the memory's own {core.model},")
    ready = [
        (item, _chunks(core, path, number, item, parts if known else None, header)) for number, item, parts in items
    ]
    dimension = len(ready[0][1][0].vector) // 2 if ready else None
    try:
        with core.changing(dimension) as (_, generation):
            added = _store(core, ready, records, generation)
    except (KeyError, TypeError, ValueError, sqlite3.InterfaceError) as error:
        raise MemoryStoreError(f"{path} holds a record that does not fit ({error}); nothing was imported") from None
    core.drop_view()
    return added


def model_of(path: Path) -> str | None:
    """The embedding model that an export's vectors are of; None where its first line does not say."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(path, encoding="utf-8") as file:
        model = json.loads(file.readline()).get("embedding_model")
        return model if isinstance(model, str) else None
    return None


def _read(path: Path) -> Records:
    found: Records = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                    kind = value.pop("record")
                except (ValueError, AttributeError, KeyError, TypeError):
                    raise MemoryStoreError(
                        f"{path}, line {number} is not a record of a memory; nothing was imported"
                    ) from None
                if kind not in ("header", "memory", *_TABLES):
                    raise MemoryStoreError(f"{path}, line {number}: unknown record {kind!r}; nothing was imported")
                found.setdefault(kind, []).append((number, value))
    except FileNotFoundError:
        raise MemoryStoreError(f"no file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MemoryStoreError(f"{path} cannot be read: {error}") from None
    return found


def _item(path: Path, number: int, value: dict[str, Any]) -> MemoryItem:
    try:
        return checked(MemoryItem(**{name: value[name] for name in _FIELDS}))
    except (KeyError, TypeError) as error:
        raise MemoryStoreError(f"{path}, line {number} lacks or mistypes {error}; nothing was imported") from None
    except AgentlabError as error:
        raise MemoryStoreError(f"{path}, line {number}: {error}; nothing was imported") from None


def _chunks(
    core: Core, path: Path, number: int, item: MemoryItem, parts: Any, header: dict[str, Any]
) -> list[Chunk]:  # fmt: skip
    if not parts:
        spans = chunk(item.content, core.embedder)
        blobs = pack(core.embedder.embed([item.content[start:end] for start, end in spans]))
        made = [(start, end, blob) for (start, end), blob in zip(spans, blobs, strict=True)]
    else:
        try:
            made = [(int(start), int(end), base64.b64decode(blob, validate=True)) for start, end, blob in parts]
            fits = all(len(blob) == 2 * header["dimension"] for _, _, blob in made)
            if len(made) > MAX_CHUNKS:
                raise MemoryStoreError(f"{path}, line {number}: {len(made)} vectors; allowed: up to {MAX_CHUNKS}")
            finite = fits and all(np.isfinite(np.frombuffer(blob, "<f2")).all() for _, _, blob in made)
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise MemoryStoreError(f"{path}, line {number}: its vectors are not {header['dimension']} float16 each")
    return [Chunk(start, end, index_terms(item.content[start:end], item.created_at), blob) for start, end, blob in made]


def _store(core: Core, ready: list[tuple[MemoryItem, list[Chunk]]], records: Records, generation: int) -> int:
    """Insert what is new; how many memories that were. Ids of merged ones are replaced wherever they are named."""
    db = core.store.db
    forgotten = {memory_id for (memory_id,) in db.execute("SELECT memory_id FROM tombstones")}
    there = {memory_id for (memory_id,) in db.execute("SELECT memory_id FROM memories")}
    merged: dict[str, str] = {}  # imported id → the older memory that it merged into
    fresh: list[tuple[MemoryItem, bytes, list[Chunk]]] = []
    for item, parts in ready:
        if item.memory_id in forgotten or item.memory_id in there:
            continue
        mark = signature(item.content)
        found = core.store.same_wording(mark, item)
        if found is None:
            fresh.append((item, mark, parts))
            continue
        merged[item.memory_id] = core.store.retell(found, item, generation).memory_id
    core.store.insert(fresh, generation)
    for derived, source in db.execute("SELECT derived, source FROM sources").fetchall():
        if source in merged:
            db.execute("INSERT OR IGNORE INTO sources VALUES (?, ?)", (derived, merged[source]))
            db.execute("DELETE FROM sources WHERE derived = ? AND source = ?", (derived, source))
    present = there | {item.memory_id for item, _, _ in fresh}
    known_sessions = {session for (session,) in db.execute("SELECT session_id FROM sessions")}
    for kind in _TABLES:
        for _, value in records.get(kind, []):
            if kind == "knowledge" and value["knowledge_id"] not in present:
                continue
            if kind == "tombstone" and value["memory_id"] in present:
                continue
            _insert_record(db, kind, value, merged, generation)
    for _, value in records.get("session", []):
        if value["session_id"] not in known_sessions:
            db.execute(
                "UPDATE sessions SET summarised = coalesce((SELECT id FROM turns WHERE conversation_id = ?), 0) "
                "WHERE session_id = ?",
                (value.get("summarised"), value["session_id"]),
            )
    return len(fresh)


def _insert_record(
    db: sqlite3.Connection, kind: str, value: dict[str, Any], merged: dict[str, str], generation: int
) -> None:
    table, columns, packed = _TABLES[kind]
    row = {key: value[key] for key in columns}
    for key in packed:
        if isinstance(row[key], list):
            row[key] = [merged.get(part, part) if isinstance(part, str) else part for part in row[key]]
        row[key] = json.dumps(row[key], ensure_ascii=False, sort_keys=key in ("metadata", "preferences"))
    if kind == "tombstone":
        row |= {"row": 0, "generation": generation}
    if kind == "session":
        row["summarised"] = 0
    names, marks = ", ".join(row), ", ".join("?" * len(row))
    db.execute(f"INSERT OR IGNORE INTO {table}({names}) VALUES ({marks})", list(row.values()))
