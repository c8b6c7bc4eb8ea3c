"""One deterministic repair of an attempt that is not a valid call; no value is invented, changed or dropped."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agentlab.toolformat.calls import Call, parse_calls
from agentlab.toolformat.lenient import Unreadable, read
from agentlab.toolformat.styles import TAGS, CallStyle, Tool
from agentlab.toolformat.validation import validate

_ARGUMENT_KEYS = ("arguments", "parameters")
_IGNORED = {"id", "type"}
_ACTION = re.compile(r"^[ \t]*Action[ \t]*:[ \t]*(.*\S)\s*Action[ _]Input[ \t]*:\s*", re.M | re.I)
_FROM_TEXT = {
    "integer": re.compile(r"-?(0|[1-9][0-9]*)"),
    "number": re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"),
    "boolean": re.compile(r"(?i:true|false)"),
    "null": re.compile(r"null|None"),
    "array": re.compile(r"(?s)\s*\[.*\]\s*"),
    "object": re.compile(r"(?s)\s*\{.*\}\s*"),
}
"""Texts that hold a value of another type."""


def repair(text: str, tools: Sequence[Tool], style: CallStyle = TAGS) -> Call | None:
    """The valid call that `text` attempts, or None. A call that is valid already comes back as it is.

    Repaired are: single quotes, Python's literals, bare keys, trailing commas, brackets left open, missing tags,
    `parameters` for `arguments`, arguments as a JSON string, names that differ in case or underscores, and values
    of another type that holds the same ("5" for an integer). Of several attempts only the first is looked at.
    """
    calls = parse_calls(text, style)
    if calls and not calls[0].malformed:
        name, arguments, attempt = calls[0].name, calls[0].arguments, calls[0].text
        if any(not validate(calls[0], tool) for tool in tools if tool["name"] == name):
            return calls[0]
    else:
        attempt = calls[0].text if calls else text
        try:
            name, arguments = _read(attempt)
        except (ValueError, RecursionError):  # a half of a surrogate pair is a UnicodeError, a ValueError too
            return None
    tool = _same_name(name, {tool["name"]: tool for tool in tools})
    if tool is None:
        return None
    schema = {"type": "object", **(tool.get("parameters") or {})}
    repaired = Call(tool["name"], _fitted(arguments, schema), None, attempt)
    return None if not isinstance(repaired.arguments, dict) or validate(repaired, tool) else repaired


def _read(text: str) -> tuple[str, dict[str, Any]]:
    if action := _ACTION.search(text):
        return action[1], _as_arguments(read(text, action.end())[0])
    start = min((at for at in (text.find("{"), text.find("[{")) if at >= 0), default=-1)
    if start < 0:
        raise Unreadable("no object")
    value, _ = read(text, start)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and isinstance(value.get("function"), dict) and set(value) <= {"function", *_IGNORED}:
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise Unreadable("no name")
    keys = [key for key in _ARGUMENT_KEYS if key in value]
    if len(keys) > 1 or set(value) - {"name", *keys, *_IGNORED}:
        raise Unreadable("keys that are not a call's")
    return value["name"], _as_arguments(value[keys[0]] if keys else {})


def _as_arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        whole = value.strip()
        value, end = read(whole)
        if whole[end:].strip():
            raise Unreadable("something follows the arguments")
    if not isinstance(value, dict):
        raise Unreadable("arguments that are no object")
    return value


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()


def _same_name(name: str, known: Mapping[str, Any]) -> Any:
    """The value under `name`, or under the only key that differs in case, underscores and punctuation alone."""
    if name in known:
        return known[name]
    alike = [key for key in known if _plain(key) == _plain(name) and _plain(name)]
    return known[alike[0]] if len(alike) == 1 else None


def _valid(value: Any, schema: Any) -> bool:
    import jsonschema  # type: ignore[import-untyped]

    return not isinstance(schema, Mapping) or bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def _fitted(value: Any, schema: Any, depth: int = 0) -> Any:
    """`value`, or what holds the same in a type that fits `schema`; where nothing does, `value` unchanged."""
    if not isinstance(schema, Mapping) or "$ref" in schema or depth > 30:
        return value
    if isinstance(value, dict) and (properties := schema.get("properties")):
        value = _renamed(value, properties)
        return {key: _fitted(inner, properties.get(key), depth + 1) for key, inner in value.items()}
    if isinstance(value, list) and "items" in schema:
        return [_fitted(inner, schema["items"], depth + 1) for inner in value]
    if _valid(value, schema):
        return value
    return next((found for found in _others(value, schema, depth) if _valid(found, schema)), value)


def _others(value: Any, schema: Mapping[str, Any], depth: int) -> Iterator[Any]:
    """What holds the same as `value` in the types that `schema` names."""
    for alternative in schema.get("anyOf") or schema.get("oneOf") or ():
        yield _fitted(value, alternative, depth + 1)
    kinds = schema.get("type")
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        found = _converted(value, kind)
        if found is not value:
            yield _fitted(found, schema, depth + 1) if isinstance(found, dict | list) else found
    if isinstance(value, str):
        words = [word for word in schema.get("enum", ()) if isinstance(word, str)]
        alike = [word for word in words if word.casefold() == value.casefold()]
        yield from alike if len(alike) == 1 else ()


def _renamed(value: dict[str, Any], properties: Mapping[str, Any]) -> dict[str, Any]:
    names = {key: _same_name(key, {name: name for name in properties}) or key for key in value}
    return {names[key]: inner for key, inner in value.items()} if len(set(names.values())) == len(names) else value


def _converted(value: Any, kind: Any) -> Any:
    """`value` as a JSON type, if nothing is lost; else `value` itself."""
    if kind == "string" and isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str) or kind not in _FROM_TEXT or not _FROM_TEXT[kind].fullmatch(value):
        return value
    try:
        found, end = read(value.lower() + " ") if kind == "boolean" else read(value + " ")
    except (ValueError, RecursionError):
        return value
    return value if value[end:].strip() else found
