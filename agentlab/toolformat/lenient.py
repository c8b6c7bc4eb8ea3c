"""JSON as models miswrite it: single quotes, Python's literals, bare keys, trailing commas, brackets left open."""

import re
from typing import Any

_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_DEPTH = 50


class Unreadable(ValueError):
    """Text whose value cannot be known for sure."""


def read(text: str, start: int = 0) -> tuple[Any, int]:
    """The value that begins at `start` and where it ends. Raises Unreadable.

    Brackets left open at the end of the text are closed; a string left open or a number that the text ends in is not:
    the rest of it is unknown.
    """
    return _Reader(text, start).value(0)


class _Reader:
    def __init__(self, text: str, position: int) -> None:
        self.text = text
        self.position = position

    def value(self, depth: int) -> tuple[Any, int]:
        found = self._value(depth)
        return found, self.position

    def _peek(self) -> str:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        return self.text[self.position : self.position + 1]

    def _value(self, depth: int) -> Any:
        if depth > _DEPTH:
            raise Unreadable("nested too deeply")
        first = self._peek()
        if first == "{":
            return self._object(depth)
        if first == "[":
            return self._array(depth)
        if first in ("'", '"') and first:
            return self._string(first)
        if word := _WORD.match(self.text, self.position):
            if word[0] not in _WORDS or word.end() == len(self.text):
                raise Unreadable(f"{word[0]} is no value")
            self.position = word.end()
            return _WORDS[word[0]]
        if number := _NUMBER.match(self.text, self.position):
            if number.end() == len(self.text) or self.text[number.end()] in "._eE" or self.text[number.end()].isalnum():
                raise Unreadable("a number is cut short")
            self.position = number.end()
            return self._number(number)
        raise Unreadable("no value")

    @staticmethod
    def _number(found: re.Match[str]) -> Any:
        if len(found[0]) > 300:
            raise Unreadable("a number is too long")
        value = float(found[0]) if found[1] or found[2] else int(found[0])
        if value in (float("inf"), float("-inf")):
            raise Unreadable("a number is too large")
        return value

    def _ends(self, closing: str) -> bool:
        """Whether the container ends here: its bracket, the end of the text, or a tag that follows."""
        following = self._peek()
        if following == closing:
            self.position += 1
            return True
        return not following or self.text.startswith("</", self.position)

    def _comma(self, closing: str) -> None:
        if self._peek() == ",":
            self.position += 1
        elif self._peek() not in (closing, "") and not self.text.startswith("</", self.position):
            raise Unreadable("a comma is missing")

    def _object(self, depth: int) -> dict[str, Any]:
        self.position += 1
        found: dict[str, Any] = {}
        while not self._ends("}"):
            quote = self._peek()
            if quote in ("'", '"'):
                key = self._string(quote)
            elif word := _WORD.match(self.text, self.position):
                key, self.position = word[0], word.end()
            else:
                raise Unreadable("no key")
            if self._peek() != ":":
                raise Unreadable("a colon is missing")
            self.position += 1
            if key in found:
                raise Unreadable("a key is written twice")
            found[key] = self._value(depth + 1)
            self._comma("}")
        return found

    def _array(self, depth: int) -> list[Any]:
        self.position += 1
        found = []
        while not self._ends("]"):
            found.append(self._value(depth + 1))
            self._comma("]")
        return found

    def _string(self, quote: str) -> str:
        parts: list[str] = []
        position = self.position + 1
        while position < len(self.text):
            char = self.text[position]
            if char == quote:
                self.position = position + 1
                return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16")  # joins surrogate pairs
            if char != "\\":
                parts.append(char)
                position += 1
                continue
            escaped = self.text[position + 1 : position + 2]
            if escaped == "u" and re.fullmatch("[0-9a-fA-F]{4}", self.text[position + 2 : position + 6]):
                parts.append(chr(int(self.text[position + 2 : position + 6], 16)))
                position += 6
            elif escaped in _ESCAPES or escaped in ("\\", "/", "'", '"'):
                parts.append(_ESCAPES.get(escaped, escaped))
                position += 2
            else:
                raise Unreadable("an unknown escape")
        raise Unreadable("a string is left open")
