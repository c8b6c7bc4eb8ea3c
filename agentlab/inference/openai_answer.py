"""One chat's answer while a server streams it: text, thoughts, calls and counts, in each of the usual forms."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from agentlab.toolformat import TAGS


@dataclasses.dataclass
class _Call:
    index: int | None
    key: str
    name: str = ""
    arguments: str = ""

    def written(self) -> str:
        """The call in the project's tags."""
        try:
            arguments = json.dumps(json.loads(self.arguments or "{}"), ensure_ascii=False)
        except ValueError:
            arguments = self.arguments  # whoever reads calls says what is wrong with it
        return f"{TAGS.begin(self.name)}{arguments}{TAGS.finish}"


class Growing:
    """An answer as far as it has come. `usage` has the server's counts, those of them that are numbers."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: str | None = None
        self.empty = True  # whether nothing came that has the form of an answer
        self.usage: dict[str, int] = {}
        self._calls: list[_Call] = []
        self._thinking = False

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take in a chunk. Raises TypeError, KeyError, ValueError or AttributeError for one of an unknown form."""
        self.usage = _counts(chunk.get("usage")) or self.usage
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            self.empty = False
            thought = _text(delta.get("reasoning_content") or delta.get("reasoning"))
            content = _text(delta.get("content"))
            if thought and not self._thinking:
                self.text, self._thinking = self.text + "<think>", True
            self.text += thought
            if self._thinking and (content or delta.get("tool_calls") or choice.get("finish_reason")):
                self.text, self._thinking = self.text + "</think>", False
            self.text += content
            for piece in delta.get("tool_calls") or []:
                self._add_call(piece)
            self.tokens += choice.get("token_ids") or []
            self.logprobs += [float(row["logprob"]) for row in (choice.get("logprobs") or {}).get("content") or []]
            self.finish = choice.get("finish_reason") or self.finish

    def _add_call(self, piece: Mapping[str, Any]) -> None:
        function = piece.get("function") or {}
        name, arguments = _text(function.get("name")), function.get("arguments")
        call = self._call_of(piece.get("index"), str(piece.get("id") or ""), named=bool(name))
        call.name = call.name or name  # some repeat it with every piece
        call.arguments += json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else _text(arguments)

    def _call_of(self, index: int | None, key: str, named: bool) -> _Call:
        """The call that a piece belongs to: that of its index, else of its id, else the last one; or a new one.

        A name under another id begins a new call, though the index be the same. An id alone does not: there are
        servers that make one for every piece.
        """
        if index is not None:
            known = next((call for call in reversed(self._calls) if call.index == index), None)
            if known is not None and named and key and known.key not in ("", key):
                known = None
        else:
            known = next((call for call in self._calls if key and call.key == key), None)
            if known is None and not named and self._calls:
                known = self._calls[-1]
        if known is None:
            known = _Call(index, key)
            self._calls.append(known)
        known.key = known.key or key
        return known

    def whole(self) -> str:
        """The text with the calls that the server has read, in the project's tags."""
        return "\n".join(filter(None, [self.text, *(call.written() for call in self._calls)]))


def _text(value: Any) -> str:
    """A text as it is, a list of parts as the text of all."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.80} is no text")
    return "".join(part if isinstance(part, str) else _text(part["text"]) for part in value)


def _counts(usage: Any) -> dict[str, int]:
    found = usage if isinstance(usage, dict) else {}
    return {name: count for name, count in found.items() if isinstance(count, int)}
