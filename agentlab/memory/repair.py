"""Repair: the file gets a new content of what is intact, in one transaction; a copy of the damaged one stays beside it.

Nobody else can have the file open meanwhile. Everything is read from a copy, so that trying costs nothing, and SQLite
itself puts the new content in the place of the old: a kill leaves the one or the other.
"""

import contextlib
import glob
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from agentlab.errors import MemoryStoreError
from agentlab.files import disk_errors, sync_folder
from agentlab.memory import handles, sealed
from agentlab.memory.chunks import Chunk, pack
from agentlab.memory.core import Core
from agentlab.memory.doctor import Report, examine
from agentlab.memory.embedding import DEFAULT, Embedder, chunk
from agentlab.memory.records import MemoryItem
from agentlab.memory.salvage import Salvage, salvage
from agentlab.memory.schema import APPLICATION_ID, VERSION, check_file, missing_bytes, sqlite_errors
from agentlab.memory.words import signature
from agentlab.memory.writing import index_terms

_ALONE_S = 2.0  # how long repair waits for who has the file open
_NEEDS = "its vectors are of a model that is no longer known; name it: agentlab memory doctor --repair --model NAME"


def repair(path: Path, model: str | None, embedder: Embedder | None) -> Report:
    """Make the memory at `path` whole again; what it was stays beside it as `<name>.damaged-<time>`.

    A memory whose vector is damaged is embedded anew; what is lost is named in `problems`. Raises MemoryStoreError
    where the file is open anywhere or is no memory, and leaves it as it is.
    """
    scratch = path.with_name(f"{path.name}.repair-{os.getpid()}")
    copy, made = scratch.with_name(f"{scratch.name}-old"), scratch.with_name(f"{scratch.name}-new")
    with _alone(path) as (place, file), _scratch(path, copy, made):
        short = missing_bytes(path, file)
        _copy(path, file, copy, short)
        try:
            with contextlib.closing(Core(copy, model, embedder, create=False)) as old:
                found = examine(old)
            if found.clean and not short:
                return found
            problems = found.problems
        except (MemoryStoreError, ValueError, OverflowError) as error:
            # of the copy, with what to do about it, which is being done
            problems = [str(error).replace(str(copy), str(path)).split("; `agentlab memory doctor")[0]]
        intact = salvage(copy)
        with contextlib.closing(Core(made, *_model_of(intact, model, embedder))) as new:
            done = _fill(new, intact)
            report = examine(new)
            kept = _keep(path, file)
            with sqlite_errors(path):
                new.store.db.backup(place)
    sync_folder(path.parent)
    said = [*problems, *done, f"the damaged file is kept as {kept}; what is forgotten from now on is still in there"]
    return Report(report.memories, report.chunks, [*intact.lost, *report.problems], said)


def kept_files(path: Path) -> list[Path]:
    """The damaged files that repairs of the memory at `path` kept, and what one that was killed left."""
    name = glob.escape(path.name)
    return sorted([*path.parent.glob(f"{name}.damaged-*"), *path.parent.glob(f"{name}.repair-*")])


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[tuple[sqlite3.Connection, BinaryIO]]:
    """A connection that keeps all others out of the file, and the file; raises where somebody has it open."""
    busy = MemoryStoreError(f"{path} is open in some program; close it there, so that nothing it writes is lost")
    check_file(path, create=False)
    with handles.alone(path) as alone:
        if not alone:
            raise busy
        with open(path, "rb") as file:  # closing it drops the lock, so it is closed last
            head = file.read(100)
            if int.from_bytes(head[68:72], "big") != APPLICATION_ID or int.from_bytes(head[60:64], "big") > VERSION:
                raise MemoryStoreError(f"{path} is not a memory, or one of a newer agentlab; it was left untouched")
            try:
                with contextlib.closing(
                    sqlite3.connect(path, timeout=_ALONE_S, isolation_level=None, check_same_thread=False)
                ) as db:
                    for statement in (
                        "PRAGMA locking_mode = EXCLUSIVE",
                        "PRAGMA writable_schema = ON",  # first: damaged schema, missing end are no reasons to stop
                        "PRAGMA synchronous = FULL", "BEGIN EXCLUSIVE", "COMMIT",
                    ):  # fmt: skip
                        db.execute(statement)
                    yield db, file
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                    raise busy from None
                raise MemoryStoreError(
                    f"{path} cannot be repaired: {error}; restore it from a copy or import an export"
                ) from error


@contextlib.contextmanager
def _scratch(path: Path, *names: Path) -> Iterator[None]:
    """Remove what a killed repair left, and in the end what this one made."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.repair-*"):
        leftover.unlink()
    try:
        yield
    finally:
        for name in names:
            for leftover in name.parent.glob(f"{glob.escape(name.name)}*"):
                leftover.unlink()


def _copy(path: Path, file: BinaryIO, to: Path, short: int) -> None:
    """Copy the file, its log too; where its end is missing with zeros, because SQLite reads nothing of a short one."""
    with disk_errors(to, resumes=False):
        file.seek(0)
        _written(file, to, path.stat().st_size + short)
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            with open(log, "rb") as newest:
                _written(newest, to.with_name(to.name + "-wal"))


def _written(source: BinaryIO, to: Path, size: int | None = None) -> None:
    """Copy what `source` holds durably, for its owner alone, with zeros up to `size`."""
    with open(os.open(to, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        if size is not None:
            copy.truncate(size)
        copy.flush()
        os.fsync(copy.fileno())


def _keep(path: Path, file: BinaryIO) -> Path:
    stamp = f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = len(list(path.parent.glob(f"{glob.escape(stamp)}*")))
    kept = path.with_name(stamp + (f"-{taken + 1}" if taken else ""))
    _copy(path, file, kept, 0)
    sync_folder(path.parent)
    return kept


def _model_of(intact: Salvage, model: str | None, embedder: Embedder | None) -> tuple[str | None, Embedder | None]:
    stored = intact.meta.get("embedding_model")
    asked = embedder.model_id if embedder is not None else model
    if stored is not None and asked is not None and asked != stored:
        raise MemoryStoreError(f"the vectors are of {stored}, not of {asked}; repair with {stored}, then reembed")
    if model or embedder:
        return model, embedder
    sizes = {len(part.vector) // 2 for parts in intact.chunks.values() for part in parts}
    if stored is None and sizes and sizes != {384}:
        raise MemoryStoreError(_NEEDS)
    return stored or DEFAULT, None


def _fill(new: Core, intact: Salvage) -> list[str]:
    """Store what is intact in a new memory; what was made anew on the way."""
    done, ready = [], []
    bytes_each = next((len(part.vector) for parts in intact.chunks.values() for part in parts), 0)
    for row, item in sorted(intact.memories.items()):
        parts = intact.chunks.get(row, [])
        if not _covers(parts, item):
            spans = chunk(item.content, new.embedder)
            blobs = pack(new.embedder.embed([item.content[start:end] for start, end in spans]))
            parts = [Chunk(start, end, "", blob) for (start, end), blob in zip(spans, blobs, strict=True)]
            bytes_each = bytes_each or len(blobs[0])
            done.append(f"memory {item.memory_id} was embedded anew")
        whole = [
            Chunk(part.start, part.end, index_terms(item.content[part.start : part.end], item.created_at), part.vector)
            for part in parts
        ]
        ready.append((item, signature(item.content), whole))
    there = {item.memory_id for item in intact.memories.values()}
    with new.changing(bytes_each // 2 or None) as (_, generation):
        db = new.store.db
        new.store.insert(ready, generation)
        for table, rows in intact.beside.items():
            for values in rows:
                about = values["stands_for" if table == "aliases" else sealed.COLUMNS[table][0]]
                if table in ("knowledge", "sources", "aliases", "tellings") and about not in there:
                    continue
                beside = {"id": values["id"]} if table == "turns" else {}
                if table == "tombstones":  # rows are numbered anew: an old number would bury whoever has it now
                    beside = {"row": 0, "generation": generation}
                sealed.insert(db, table, values, conflict="IGNORE", **beside)
        done += _sessions_anew(new, intact)
    new.store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return done


def _sessions_anew(new: Core, intact: Salvage) -> list[str]:
    """Give turns whose session is lost a session without a summary, so that their talk goes on."""
    known = {row["session_id"] for row in intact.beside["sessions"]}
    times: dict[str, list[float]] = {}
    for turn in intact.beside["turns"]:
        if turn["session_id"] not in known:
            times.setdefault(turn["session_id"], []).append(turn["timestamp"])
    for session_id, moments in times.items():
        sealed.insert(new.store.db, "sessions", sealed.empty_session(session_id, "", min(moments), max(moments)))
    return [f"session {session_id} begins anew with its turns" for session_id in times]


def _covers(parts: list[Chunk], item: MemoryItem) -> bool:
    """Whether intact chunks reach over all of a memory's text."""
    reach = 0
    for part in parts:
        if part.start > reach + 1:
            return False
        reach = max(reach, part.end)
    return bool(parts) and reach >= len(item.content.rstrip())
