"""What the memory holds, as plain records. Times are seconds since the epoch; scores lie in [0, 1]."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from agentlab.errors import MemoryStoreError

MemoryType = Literal["conversation", "knowledge", "pattern", "preference"]
Source = Literal["person", "agent", "tool"]
MEMORY_TYPES: tuple[str, ...] = get_args(MemoryType)
SOURCES: tuple[str, ...] = get_args(Source)
_FIRST_S, _LAST_S = -62_135_596_800, 253_402_300_799  # years 1 to 9999, which dates can be made of


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryItem:
    """One thing remembered. `embedding` is float32 (n_chunks, dim), only filled where it was asked for."""

    memory_id: str
    content: str
    memory_type: str = "conversation"
    importance: float = 0.5
    access_count: int = 0
    last_accessed: float | None = None
    created_at: float = 0.0
    embedding: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    related_memories: list[str] = dataclasses.field(default_factory=list)
    tags: list[str] = dataclasses.field(default_factory=list)
    session_id: str | None = None
    source: str = "person"
    source_name: str = ""  # which agent or tool, where that is known
    validation_count: int = 1  # how often it was told; duplicates merge and count here
    derived_from: list[str] = dataclasses.field(default_factory=list)  # memory ids; they take this one along
    told_in: list[str] = dataclasses.field(default_factory=list)  # sessions, where they are several; filled by `get`
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnowledgeItem:
    """A fact that several memories tell; its text is found by `recall` as the memory `knowledge_id`."""

    knowledge_id: str
    title: str
    content: str
    domain: str = ""
    confidence: float = 0.5
    source_conversations: list[str] = dataclasses.field(default_factory=list)  # memory ids
    validation_count: int = 1
    last_updated: float = 0.0
    embedding: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    relationships: list[str] = dataclasses.field(default_factory=list)  # knowledge ids that say something close


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationItem:
    """One turn: what the person said and what the agent answered. `context_used` are the ids it was answered with."""

    conversation_id: str
    session_id: str
    timestamp: float
    user_input: str
    agent_response: str
    context_used: list[str] = dataclasses.field(default_factory=list)
    importance_score: float = 0.5
    tags: list[str] = dataclasses.field(default_factory=list)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionContext:
    """A session as it was left. `summary` is of the turns that no longer stand in the window."""

    session_id: str
    user_id: str = ""
    start_time: float = 0.0
    last_activity: float = 0.0
    conversation_count: int = 0
    active_memories: list[str] = dataclasses.field(default_factory=list)  # ids last answered with, newest last
    preferences: dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hit:
    """One recalled memory, best first. `parts` says what made the score, filled with `explain=True`.

    `start` and `end` are the characters of `content` that matched best: the whole text unless it was chunked.
    """

    memory_id: str
    content: str
    score: float
    memory_type: str
    session_id: str | None
    source: str
    created_at: float
    tags: list[str]
    start: int
    end: int
    parts: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tombstone:
    """What stays of a forgotten memory: its id and when, never a word of it."""

    memory_id: str
    kind: str
    forgotten_at: float
    reason: str = ""


def check_choice(what: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value` if it is one of `allowed`; raises MemoryStoreError that lists them."""
    if value not in allowed:
        raise MemoryStoreError(f"{what}: {value!r:.80}; allowed: {', '.join(allowed)}")
    return value


def check_share(what: str, value: float) -> float:
    """`value` as a float in [0, 1]; raises MemoryStoreError."""
    numbers = int | float | np.integer | np.floating
    if isinstance(value, bool) or not isinstance(value, numbers) or not 0 <= value <= 1:
        raise MemoryStoreError(f"{what}: {value!r}; allowed: a number from 0 to 1")
    return float(value)


def check_text(what: str, value: str) -> str:
    """`value` if it is text that SQLite and JSON can hold and that is not empty; raises MemoryStoreError."""
    if not isinstance(value, str):
        raise MemoryStoreError(f"{what}: {value!r:.80}; allowed: text")
    if not value.strip():
        raise MemoryStoreError(f"{what} is empty; allowed: text with at least one visible character")
    if "\x00" in value:
        raise MemoryStoreError(f"{what} contains a NUL character, which text cannot hold")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise MemoryStoreError(f"{what} contains half a surrogate pair, which UTF-8 cannot hold") from None
    return value


def check_string(what: str, value: str) -> str:
    """`check_text` that also takes an empty string, which says that there is none."""
    return "" if isinstance(value, str) and value == "" else check_text(what, value)


def check_optional(what: str, value: str | None) -> str | None:
    """`check_text` that also takes None."""
    return None if value is None else check_text(what, value)


def check_number(what: str, value: int, least: int) -> int:
    """`value` if it is a whole number from `least`; raises MemoryStoreError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= 1 << 53:
        raise MemoryStoreError(f"{what}: {value!r}; allowed: a whole number from {least} to 2**53")
    return int(value)


def check_path(path: str | Path) -> Path:
    """The path with ~ replaced, absolute; raises MemoryStoreError for what no file system takes."""
    if isinstance(path, str | Path) and str(path) and "\x00" not in str(path):
        with contextlib.suppress(UnicodeEncodeError, RuntimeError):
            str(path).encode(errors="surrogateescape")  # names that are no UTF-8 are read so
            return Path(path).expanduser().absolute()
    raise MemoryStoreError(f"{path!r:.80} is no path; allowed: the path of a file, like memory.db")


def told_again(old: MemoryItem, again: MemoryItem) -> MemoryItem:
    """A memory after the same words were told once more. What a person tells, too, is told by the person."""
    raised = again.source == "person" != old.source
    return dataclasses.replace(
        old, validation_count=old.validation_count + again.validation_count,
        tags=list(dict.fromkeys([*old.tags, *again.tags])), importance=max(old.importance, again.importance),
        source=again.source if raised else old.source, source_name=again.source_name if raised else old.source_name,
    )  # fmt: skip


def check_tags(tags: Any, what: str = "tags") -> list[str]:
    """Distinct texts in their order; a plain string is refused, because it would become its letters."""
    if type(tags) is list and not tags:
        return []
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise MemoryStoreError(f"{what}: {tags!r}; allowed: a list of texts, like ['work']")
    return list(dict.fromkeys(check_text(f"one of {what}", tag) for tag in tags))


def check_time(what: str, value: Any) -> float:
    """`value` as float seconds since 1970, of the years 1 to 9999; raises MemoryStoreError."""
    if type(value) is float and _FIRST_S <= value <= _LAST_S:
        return value
    # NumPy's numbers are no int or float, but become one
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if _FIRST_S <= float(value) <= _LAST_S:
                return float(value)
    raise MemoryStoreError(f"{what}: {value!r}; allowed: seconds since 1970 (not milliseconds), in the years 1 to 9999")


def check_count(what: str, value: Any) -> int:
    """`value` as an int from 0 to 2**53, so that sums of some stay what SQLite holds; raises MemoryStoreError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= 1 << 53:
        raise MemoryStoreError(f"{what}: {value!r}; allowed: a whole number from 0 to 2**53")
    return int(value)


def check_metadata(value: Any) -> dict[str, Any]:
    """`value` if it is a dict that UTF-8 JSON can hold, so without NaN; raises MemoryStoreError that says why not."""
    if not isinstance(value, dict):
        raise MemoryStoreError(f"metadata: {value!r}; allowed: a dict of what JSON can hold")
    if not value:
        return {}
    try:
        json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        reason = "half a surrogate pair" if isinstance(error, UnicodeError) else str(error)
        raise MemoryStoreError(f"metadata: {reason}; allowed: a dict of what JSON can hold, without NaN") from None
    return dict(value)
