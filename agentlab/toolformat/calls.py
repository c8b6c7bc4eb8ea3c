"""How calls are written and read, in the style of the model that answers."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentlab.toolformat.styles import TAGS, CallStyle

OPEN, CLOSE = TAGS.open, TAGS.close
_UNTAGGED = re.compile(r'\{\s*"name"\s*:')
_ACTION = re.compile(r"^[ \t]*Action:[ \t]*(.*\S)[ \t]*$", re.MULTILINE)
_INPUT = re.compile(r"\s*Action Input:\s*")


@dataclass(frozen=True)
class Call:
    """One tool call found in a text. `malformed` says what is wrong with an attempt that is not a call; else None."""

    name: str
    arguments: dict[str, Any]
    malformed: str | None = None
    text: str = ""


def render_call(name: str, arguments: Mapping[str, Any], style: CallStyle = TAGS, thought: str = "") -> str:
    """The call as text; ReAct puts the thought before it. Raises ValueError for what JSON cannot hold (NaN, infinity).

    Tags inside the arguments are escaped as JSON allows: a stop string or a search for tags meets only real ones.
    """
    if style.kind == "react":
        if name != name.strip() or "\n" in name or not name:
            raise ValueError(f"a name that ReAct's one line cannot hold: {name!r}")
        line = f"Thought: {' '.join(thought.split())}\n" if thought else ""
        return line + style.begin(name) + dumps(dict(arguments))
    body = dumps({"name": name, style.arguments_key: dict(arguments)})
    for tag in (style.end, style.marker):
        if tag.startswith("</"):
            body = body.replace(tag, "<\\/" + tag[2:])
        elif tag.startswith("<"):
            body = body.replace(tag, "\\u003c" + tag[1:])
    return style.open + body + style.close


def dumps(value: Any) -> str:
    """JSON as calls are written: separators with a space, no escapes that are not needed. ValueError for NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


class _Unreadable(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Unreadable("a key is written twice")
    return result


def _no_constant(name: str) -> Any:
    raise _Unreadable(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Unreadable("a number is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def decode_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `start` and where it ends.

    Raises ValueError for anything that is not strict JSON: NaN, a key written twice, text that cannot be UTF-8,
    nesting too deep to read.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
        text[start:end].encode()
        if "\\u" in text[start:end]:
            dumps(value).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos - start}") from None
    except UnicodeEncodeError:
        raise ValueError("a half of a surrogate pair") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, end


def parse_calls(text: str, style: CallStyle = TAGS) -> list[Call]:
    """The calls in `text` in order, attempts that are not calls included with `malformed` set. Never raises.

    Tolerated: whitespace around the JSON, other text around a call, and a missing closing tag at the end of the text
    (generation often stops at it). Everything else is an attempt, not a call: broken JSON, keys other than `name` and
    the style's key for arguments, a closing tag alone, an opening tag cut short at the end, a call object without tags.
    """
    if style.kind == "react":
        return [call for _, call in _react_parts(text) if call is not None]
    if style.is_list:
        return _list_calls(text, style)
    if not style.marker:
        return _bare_calls(text, style)
    calls: list[Call] = []
    position = 0
    while (found := text.find(style.marker, position)) >= 0:
        calls += _outside(text[position:found], style)
        call, position = _read_call(text, found, style)
        calls.append(call)
    return calls + _outside(text[position:], style)


def parse_thought(text: str) -> str:
    """The thoughts of a ReAct answer: what stands before its first action, without the word `Thought:`."""
    before = _ACTION.split(text, maxsplit=1)[0]
    return before.strip().removeprefix("Thought:").strip()


def _react_parts(text: str) -> list[tuple[str, Call | None]]:
    parts: list[tuple[str, Call | None]] = []
    position = 0
    while found := _ACTION.search(text, position):
        thought, name = text[position : found.start()], found[1].strip()
        inputs = _INPUT.match(text, found.end())
        if inputs is None:
            position = found.end()
            call = Call("", {}, "no line Action Input: after the action", found[0].strip())
        else:
            position = inputs.end()
            try:
                value, position = decode_json(text, inputs.end())
                problem = None if isinstance(value, dict) else "the action's input must be a JSON object"
            except ValueError as error:
                value, problem = {}, str(error)
                after = _ACTION.search(text, position)
                position = after.start() if after else len(text)
            whole = text[found.start() : position].strip()
            call = Call("", {}, problem, whole) if problem else Call(name, value, None, whole)
        parts.append((thought, call))
    return parts


def _bare_calls(text: str, style: CallStyle) -> list[Call]:
    """Calls that are JSON objects and nothing else around them, like Llama 3's; a list of such objects counts too."""
    calls: list[Call] = []
    position = 0
    while found := _UNTAGGED.search(text, position):
        try:
            value, position = decode_json(text, found.start())
        except ValueError as error:
            position = found.end()
            if f'"{style.arguments_key}"' in text[position:]:
                calls.append(Call("", {}, str(error), text[found.start() :]))
                position = len(text)
            continue
        if style.arguments_key in value:
            calls.append(_checked(value, style, text[found.start() : position]))
    return calls


def _list_calls(text: str, style: CallStyle) -> list[Call]:
    found = text.find(style.marker) if style.marker else text.find("[")
    if found < 0:
        return []
    start = found + len(style.marker)
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        values, end = decode_json(text, start)
    except ValueError as error:
        return [Call("", {}, str(error), text[found:])]
    if not isinstance(values, list) or not values:
        return [Call("", {}, "calls are the items of a list", text[found:end])]
    return [_checked(value, style, text[found:end]) for value in values]


def _read_call(text: str, found: int, style: CallStyle) -> tuple[Call, int]:
    start = found + len(style.marker)
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        value, end = decode_json(text, start)
    except ValueError as error:
        return _attempt(text, found, start, style, str(error))
    rest = text[end:].lstrip()
    if style.end and rest.startswith(style.end):
        end = len(text) - len(rest) + len(style.end)
    elif rest and style.end:
        return _attempt(text, found, end, style, f"something other than {style.end} follows the call")
    return _checked(value, style, text[found:end]), end


def _checked(value: Any, style: CallStyle, text: str) -> Call:
    if problem := _problem(value, style):
        return Call("", {}, problem, text)
    return Call(value["name"], value[style.arguments_key], None, text)


def _attempt(text: str, found: int, start: int, style: CallStyle, problem: str) -> tuple[Call, int]:
    ends = [end for tag in (style.end, style.marker) if tag and (end := text.find(tag, start)) >= 0]
    end = min(ends, default=len(text))
    if style.end and text.startswith(style.end, end):
        end += len(style.end)
    return Call("", {}, problem, text[found:end]), end


def _problem(value: Any, style: CallStyle) -> str | None:
    key = style.arguments_key
    if not isinstance(value, dict):
        return "a call is a JSON object"
    if not isinstance(value.get("name"), str) or not value["name"]:
        return "key name must be a tool's name"
    if not isinstance(value.get(key), dict):
        return f"key {key} must be an object"
    if extra := sorted(set(value) - {"name", key, *style.ignored_keys}):
        return f"unknown key {extra[0]}; allowed: name, {key}"
    return None


def _outside(text: str, style: CallStyle) -> list[Call]:
    """Attempts in text without an opening tag."""
    attempts = []
    if style.end and style.end in text:
        attempts.append(Call("", {}, f"{style.end} without {style.marker}", text))
    elif _cut_short(text, style.marker):
        attempts.append(Call("", {}, f"{style.marker} is cut short", text))
    elif _UNTAGGED.search(text) and f'"{style.arguments_key}"' in text:
        attempts.append(Call("", {}, f"a call without {style.marker}", text))
    return attempts


def _cut_short(text: str, marker: str) -> bool:
    tail = text.rstrip()
    return any(tail.endswith(marker[:length]) for length in range(min(5, len(marker)), len(marker)))
