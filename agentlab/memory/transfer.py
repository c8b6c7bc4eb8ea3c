"""A memory as JSON lines and back; export → import → export gives the same lines."""

import base64
import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agentlab.errors import AgentlabError, MemoryStoreError
from agentlab.files import disk_errors, sync_folder
from agentlab.memory import forgetting, sealed, tellings
from agentlab.memory.chunks import Chunk, pack
from agentlab.memory.core import Core
from agentlab.memory.embedding import MAX_CHUNKS, chunk
from agentlab.memory.index import Index
from agentlab.memory.lines import TELLING_FIELDS, checked_record, checked_spans, checked_tellings
from agentlab.memory.records import MemoryItem, check_text
from agentlab.memory.words import signature
from agentlab.memory.writing import checked, index_terms, replaced

FORMAT = "agentlab-memory"
VERSION = 1
_ROUNDING = 0.02  # how far the squared length of a unit vector may be from 1 in float16
_FIELDS = (
    "memory_id", "content", "memory_type", "importance", "access_count", "last_accessed", "created_at", "tags",
    "session_id", "source", "source_name", "validation_count", "derived_from", "metadata",
)  # fmt: skip
Items = list[tuple[MemoryItem, list[Chunk], list[tellings.Telling]]]
Records = dict[str, list[tuple[int, dict[str, Any]]]]  # kind → (line number, values)
_TABLES = {"knowledge": "knowledge", "session": "sessions", "turn": "turns", "tombstone": "tombstones"}


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
            told = [{name: one[name] for name in TELLING_FIELDS} for one in tellings.of(core.store, item.memory_id)]
            fields = {name: getattr(item, name) for name in _FIELDS}
            yield _line("memory", {**fields, **({"tellings": told} if told else {}), "chunks": vectors})
        for kind, table in _TABLES.items():
            # a session's name is no id: elsewhere the same one may be of another talk
            which = "kind != 'session'" if kind == "tombstone" else "1"
            for value in sealed.rows(core.store, table, which, order="id" if kind == "turn" else ""):
                del value["id"]
                if kind == "session":  # turns have other numbers elsewhere
                    query = "SELECT conversation_id FROM turns WHERE id = ?"
                    last = db.execute(query, (value["summarised"],)).fetchone()
                    value["summarised"] = last and last[0]
                yield _line(kind, value)


def _line(kind: str, value: dict[str, Any]) -> str:
    return json.dumps({"record": kind, **value}, ensure_ascii=False, allow_nan=False)


def export(core: Core, path: Path) -> int:
    """Write the memory to `path` atomically; how many memories went.

    Raises MemoryStoreError where a file of the memory's own or something that is no file would be lost.
    """
    if path.exists() and not path.is_file():
        raise MemoryStoreError(f"{path} is no file; give the path of a file to export to, like memory.jsonl")
    path = path.resolve()  # a link stays one
    own = core.store.path.resolve()
    if path in (own, *(own.with_name(own.name + end) for end in ("-wal", "-shm", "-journal"))):
        raise MemoryStoreError(f"{path} is the memory itself; give another file to export to")
    count = 0
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path, resumes=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
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

    What is there by id stays as it is, the same words merge into the older memory. What was forgotten here stays
    forgotten, and so does what derives from it in the export: turns, answers, sentences of summaries. A memory without
    vectors that was opened without naming a model takes the export's model; in any other, vectors of another model are
    made anew with its own. Raises MemoryStoreError naming the line that is wrong.
    """
    records = _read(path)
    header = next(iter(records.get("header", [])), (0, {}))[1]
    if header.get("format") != FORMAT:
        raise MemoryStoreError(f"{path} is not an export of a memory: its first line is not its header")
    if header.get("version") != VERSION:
        raise MemoryStoreError(f"{path} has format version {header.get('version')}; allowed: {VERSION}")
    if header.get("embedding_model") is not None:
        check_text(f"{path}, line 1: embedding_model", header["embedding_model"])
    for kind in _TABLES:
        records[kind] = [(number, _checked(path, number, kind, value)) for number, value in records.get(kind, [])]
    items = [
        (number, *_item(path, number, value), value.get("chunks")) for number, value in records.get("memory", [])
    ]  # fmt: skip
    if isinstance(header.get("embedding_model"), str):
        core.adopt(header["embedding_model"])  # after the lines were checked
    known = header.get("embedding_model") == core.model
    if known and header.get("dimension") is not None:
        core.check_dimension(header["dimension"], f"{path}, made with the memory's own {core.model},")
    ready = [
        (item, _chunks(core, path, number, item, parts if known else None, header), told)
        for number, item, told, parts in items
    ]
    dimension = len(ready[0][1][0].vector) // 2 if ready else None
    with core.changing(dimension) as (index, generation):
        added, dropped = _Import(core, index, generation).store(ready, records)
    core.drop_view()
    if dropped is not None:
        forgetting.finish(core, dropped)
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
                except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
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


def _checked(path: Path, number: int, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    try:
        return checked_record(kind, value)
    except KeyError as error:
        raise MemoryStoreError(f"{path}, line {number} lacks {error}; nothing was imported") from None
    except AgentlabError as error:
        raise MemoryStoreError(f"{path}, line {number}: {error}; nothing was imported") from None


def _item(path: Path, number: int, value: dict[str, Any]) -> tuple[MemoryItem, list[tellings.Telling]]:
    try:
        return checked(MemoryItem(**{name: value[name] for name in _FIELDS})), checked_tellings(value)
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
            made = [(_whole(start), _whole(end), base64.b64decode(blob, validate=True)) for start, end, blob in parts]
            if len(made) > MAX_CHUNKS:
                raise MemoryStoreError(f"{len(made)} vectors; allowed: up to {MAX_CHUNKS}")
            checked_spans(item.content, [(start, end) for start, end, _ in made])
            fit = all(len(blob) == 2 * header.get("dimension", 0) and _of_length_one(blob) for _, _, blob in made)
        except (TypeError, ValueError):
            fit = False
        except MemoryStoreError as error:
            raise MemoryStoreError(f"{path}, line {number}: {error}; nothing was imported") from None
        if not fit:
            raise MemoryStoreError(
                f"{path}, line {number}: its vectors are not {header.get('dimension')} float16 of length 1 each; "
                "nothing was imported"
            )
    return [Chunk(start, end, index_terms(item.content[start:end], item.created_at), blob) for start, end, blob in made]


def _whole(place: Any) -> int:
    """`place` if it is a whole number; raises TypeError."""
    if type(place) is not int:
        raise TypeError
    return place


def _of_length_one(blob: bytes) -> bool:
    vector = np.frombuffer(blob, "<f2").astype(np.float32)
    return bool(abs(float(np.vecdot(vector, vector)) - 1) < _ROUNDING)


class _Import:
    """One import, inside its transaction. Ids of merged memories are replaced wherever they are named."""

    def __init__(self, core: Core, index: Index, generation: int) -> None:
        self.core, self.index, self.generation = core, index, generation
        self.rows, self.db = core.store, core.store.db
        stones = sealed.rows(core.store, "tombstones")
        self.forgotten = {stone["memory_id"]: float(stone["forgotten_at"]) for stone in stones}
        # imported id → the older memory that it merged into, now or in an earlier import
        self.merged = {row["memory_id"]: row["stands_for"] for row in sealed.rows(core.store, "aliases")}
        self.turns: dict[str, int] = {}  # those that are new: id → number
        self.talked: set[str] = set()  # sessions of new turns

    def store(self, ready: Items, records: Records) -> tuple[int, forgetting.Dropped | None]:
        """Insert what is new: how many memories that were, and what went again because it was forgotten here."""
        there = {memory_id for (memory_id,) in self.db.execute("SELECT memory_id FROM memories")}
        fresh = self._memories(ready, there)
        present = there | fresh.keys()
        for kind, insert in (("knowledge", self._knowledge), ("turn", self._turn), ("session", self._session)):
            for _, value in records[kind]:
                insert(value, present)
        for _, value in records["tombstone"]:
            if value["memory_id"] not in present:
                sealed.insert(self.db, "tombstones", value, conflict="IGNORE", row=0, generation=self.generation)
        self._summarised(records)
        asked = [one for one, item in fresh.items() if {one, *item.derived_from} & self.forgotten.keys()]
        within = forgetting.Within(set(self.turns.values()), set(fresh))
        if not asked:
            return len(fresh), None
        # they came in with the rest, so that what derives from them is found as in forgetting, and go with it again
        gone, turns = forgetting.closure(self.core, asked, within)
        dropped = forgetting.drop(self.core, self.index, self.generation, gone, turns, "forgotten before")
        return len(fresh) - len(gone), dropped

    def _memories(self, ready: Items, there: set[str]) -> dict[str, MemoryItem]:
        fresh: dict[str, tuple[MemoryItem, bytes, list[Chunk]]] = {}
        for item, parts, told in ready:
            if item.memory_id in there or item.memory_id in self.merged:
                continue
            mark = signature(item.content)
            found = None if item.memory_id in self.forgotten else self.rows.same_wording(mark, item)
            if found is None:
                fresh[item.memory_id] = (item, mark, parts)
                for telling in told:
                    tellings.insert(self.rows, telling | {"memory_id": item.memory_id})
                continue
            known = tellings.retell(self.rows, found, item, self.generation, told).memory_id
            self.merged[item.memory_id] = known
            # another import of it is no further telling, and forgetting the one forgets the other
            sealed.insert(self.db, "aliases", {"memory_id": item.memory_id, "stands_for": known})
        named = [
            (replaced(item, derived_from=self._renamed(item.derived_from)), mark, parts)
            for item, mark, parts in fresh.values()
        ]
        self.rows.insert(named, self.generation)
        return {item.memory_id: item for item, _, _ in named}

    def _renamed(self, ids: list[str]) -> list[str]:
        return [self.merged.get(one, one) for one in ids]

    def _knowledge(self, value: dict[str, Any], present: set[str]) -> None:
        if value["knowledge_id"] in present:
            value["relationships"] = self._renamed(value["relationships"])
            sealed.insert(self.db, "knowledge", value, conflict="IGNORE")

    def _turn(self, value: dict[str, Any], _: set[str]) -> None:
        known = self.db.execute("SELECT 1 FROM turns WHERE conversation_id = ?", (value["conversation_id"],)).fetchone()
        if known or value["conversation_id"] in self.forgotten:
            return
        for name in ("context_used", "memory_ids", "echoes", "retold"):
            value[name] = self._renamed(value[name])
        sealed.insert(self.db, "turns", value)
        (self.turns[value["conversation_id"]],) = self.db.execute("SELECT last_insert_rowid()").fetchone()
        self.talked.add(value["session_id"])

    def _session(self, value: dict[str, Any], _: set[str]) -> None:
        if value["start_time"] <= self.forgotten.get(forgetting.session_mark(value["session_id"]), -math.inf):
            if value["session_id"] not in self.talked:
                return
            # another memory's talk of that name: its turns come in, what was forgotten of the session does not
            value |= {"user_id": "", "preferences": {}, "summary": [], "active_memories": []}
        parts = [part for part in value["summary"] if not self.forgotten.keys() & set(part["sources"])]
        active = self._renamed(value["active_memories"])
        row = value | {"summarised": 0, "summary": parts, "active_memories": active}
        value["known"] = sealed.row(self.rows, "sessions", value["session_id"]) is not None
        sealed.insert(self.db, "sessions", row, conflict="IGNORE")

    def _summarised(self, records: Records) -> None:
        """Say in new sessions how far their summary reaches: to the last turn that came in of those that it covers."""
        place = {value["conversation_id"]: number for number, (_, value) in enumerate(records["turn"])}
        of_session: dict[str, list[str]] = {}
        for _, value in records["turn"]:
            of_session.setdefault(value["session_id"], []).append(value["conversation_id"])
        for _, value in records["session"]:
            if value.get("known", True) or value["summarised"] not in place:
                continue
            last = place[value["summarised"]]
            covered = [one for one in of_session.get(value["session_id"], []) if place[one] <= last]
            numbers = [self.turns.get(one, 0) for one in covered]
            sealed.change(self.rows, "sessions", value["session_id"], summarised=max(numbers, default=0))
