"""What the lines of an export may hold: every record checked before anything of it is stored."""

from collections.abc import Callable
from typing import Any

from agentlab.errors import MemoryStoreError
from agentlab.memory.records import (
    SOURCES,
    check_choice,
    check_count,
    check_metadata,
    check_optional,
    check_share,
    check_string,
    check_tags,
    check_text,
    check_time,
)

Value = dict[str, Any]


def checked_record(kind: str, value: Value) -> Value:
    """The record with every field as the file holds it; raises MemoryStoreError or KeyError naming what is wrong."""
    checks = _CHECKS[kind]
    return {name: check(name, value[name] if name in value else _DEFAULTS[name]) for name, check in checks.items()}


def checked_tellings(value: Value) -> list[Value]:
    """The tellings of a memory's record, none where it has none; raises MemoryStoreError or KeyError."""
    given = value.get("tellings", [])
    if not isinstance(given, list) or not all(isinstance(part, dict) for part in given):
        raise MemoryStoreError(f"tellings: {given!r}; allowed: a list of {{session_id, times, tags, source, …}}")
    told = [{name: check(name, part[name]) for name, check in _TELLING.items()} for part in given]
    names = [part["session_id"] for part in told]
    if len(set(names)) < len(names):
        raise MemoryStoreError(f"tellings: sessions {names}; allowed: each once")
    return told


def checked_spans(content: str, spans: list[tuple[int, int]]) -> None:
    """Raise MemoryStoreError unless the (start, end) are pieces of `content`, in order, that leave no word out."""
    before = reach = 0
    for start, end in spans:
        if not before <= start < end <= len(content):
            raise MemoryStoreError(f"chunk: characters {start} to {end}; allowed: pieces in order of {len(content)}")
        _no_word(content, reach, start)
        before, reach = start, max(reach, end)
    _no_word(content, reach, len(content))


def _no_word(content: str, start: int, end: int) -> None:
    if any(sign.isalnum() for sign in content[start:end]):
        raise MemoryStoreError(f"chunks: characters {start} to {end} are in none; allowed: pieces that cover all")


def _ids(what: str, value: Any) -> list[str]:
    check_tags(value, what)
    return list(value)


def _parts(what: str, value: Any) -> list[Value]:
    if not isinstance(value, list) or not all(isinstance(part, dict) and set(part) == _PART for part in value):
        raise MemoryStoreError(f"{what}: {value!r}; allowed: a list of {{text, sources}}")
    return [{"text": check_text(what, part["text"]), "sources": _ids(what, part["sources"])} for part in value]


def _dict(what: str, value: Any) -> Value:
    try:
        return check_metadata(value)
    except MemoryStoreError as error:
        raise MemoryStoreError(str(error).replace("metadata", what, 1)) from None


_PART = {"text", "sources"}
_DEFAULTS: Value = {"retold": []}  # what exports of older versions lack
_TELLING: dict[str, Callable[[str, Any], Any]] = {
    "session_id": check_string, "times": check_count, "tags": lambda what, value: check_tags(value, what),
    "source": lambda what, value: check_choice(what, value, SOURCES), "source_name": check_string,
}  # fmt: skip
TELLING_FIELDS = tuple(_TELLING)
_CHECKS: dict[str, dict[str, Callable[[str, Any], Any]]] = {
    "turn": {
        "conversation_id": check_text, "session_id": check_text, "timestamp": check_time, "user_input": check_text,
        "agent_response": check_text, "context_used": _ids, "importance_score": check_share, "tags": _ids,
        "metadata": _dict, "memory_ids": _ids, "echoes": _ids, "retold": _ids,
    },
    "session": {
        "session_id": check_text, "user_id": check_string, "start_time": check_time, "last_activity": check_time,
        "active_memories": _ids, "preferences": _dict, "summary": _parts, "summarised": check_optional,
    },
    "knowledge": {
        "knowledge_id": check_text, "title": check_text, "domain": check_string, "confidence": check_share,
        "last_updated": check_time, "relationships": _ids,
    },
    "tombstone": {"memory_id": check_text, "kind": check_text, "forgotten_at": check_time, "reason": check_string},
}  # fmt: skip
