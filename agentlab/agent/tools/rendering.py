"""Any Python value → a short text that a model can read and JSON can hold."""

import dataclasses
import enum
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = 200
_HEAD_SHARE = 2 / 3
# One character for one: control characters as their pictures (␛), halves of surrogate pairs as the replacement mark.
_VISIBLE = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421, 0x0D: 0x0A}
_VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
del _VISIBLE[0x0A], _VISIBLE[0x09]


def visible(text: str) -> str:
    """`text` with control characters shown instead of sent, and without halves of surrogate pairs."""
    return text.replace("\r\n", "\n").translate(_VISIBLE) if not text.isprintable() else text


class BoundedText:
    """Collects text of any length in at most `limit` characters: the head, the tail, and how much lies between."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        room = max(limit - 50, limit // 2)  # 50: the note on what was left out
        self._head_room = int(room * _HEAD_SHARE)
        self._tail_room = room - self._head_room
        self._head = ""  # up to `limit`, as long as everything fits
        self._tail = ""

    def write(self, text: str) -> None:
        """Take `text` in; cheap however much there is."""
        self.total += len(text)
        space = self.limit - len(self._head)
        if space > 0:
            self._head += text[:space]
            text = text[space:]
        if text:
            self._tail = (self._tail + text)[-self._tail_room :]

    @property
    def truncated(self) -> bool:
        """Whether something was left out."""
        return self.total > self.limit

    def text(self) -> str:
        """What was written, at most `limit` characters of it."""
        if not self.truncated:
            return self._head
        # the last characters are those of the tail, and of the head's end where the tail is short
        tail = (self._head[self._head_room :] + self._tail)[-self._tail_room :]
        left_out = self.total - self._head_room - len(tail)
        return f"{self._head[: self._head_room]}\n[… {left_out} characters left out …]\n{tail}"


def bounded(text: str, limit: int) -> tuple[str, bool]:
    """(`text` in at most about `limit` characters, whether something was left out)."""
    collected = BoundedText(limit)
    collected.write(text)
    return collected.text(), collected.truncated


def render(value: Any) -> str:
    """The text of a tool's result: str as it is, everything else as JSON where JSON can, else a short repr.

    NaN and infinity are written as such, bytes as their number and beginning, cycles as "cyclic".
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply to show"
    except ValueError as error:
        return f"a {type(value).__name__} that cannot be shown: {error}"
    except TypeError:  # keys that are no strings
        return short_repr(value)


def _plain(value: Any) -> Any:  # noqa: PLR0911 - one line per kind of value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist") and getattr(value, "size", math.inf) <= 100_000:
        return value.tolist()  # arrays and their scalars
    return str(value)[:1000]


def _bytes(value: bytes | bytearray | memoryview) -> str:
    return f"{len(value)} bytes: {short_repr(bytes(value[:60]))}" if len(value) else "0 bytes"


def short_repr(value: Any) -> str:
    """A repr of at most some hundred characters; also of an object whose repr fails."""
    try:
        return _SHORT_REPR.repr(value)
    except BaseException as error:
        return f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"


def describe_error(error: BaseException) -> str:
    """One line: the exception's class and message; also of an exception whose text fails."""
    try:
        message = " ".join(str(error)[:2000].split())
    except BaseException:
        message = "(its message cannot be shown)"
    return f"{type(error).__name__}: {message[:500]}" if message else type(error).__name__
