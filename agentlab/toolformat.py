"""How tools are shown to a model and how its calls are written and read: one format for suites, training and the agent.

A tool is a dict {"name", "description", "parameters"}, the last a JSON schema object. It is shown as one line,
`get_weather(city: str, days: int = 1) - Weather forecast`, because four tools as schemas are several times the tokens
of four such lines. A call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NO_TOOL = "No tool applies."
"""What a model is taught to say when no tool fits."""

Tool = Mapping[str, Any]
_TYPES = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "array": "list",
    "object": "dict",
    "null": "null",
}
_UNTAGGED = re.compile(r'\{\s*"name"\s*:')


@dataclass(frozen=True)
class Call:
    """One tool call found in a text. `malformed` says what is wrong with an attempt that is not a call; else None."""

    name: str
    arguments: dict[str, Any]
    malformed: str | None = None
    text: str = ""


def signature(tool: Tool) -> str:
    """One line for a model to read; `days?: int` may be left out, `days: int = 1` says what that means.

    An enum is written as its JSON values with `|` between them.
    """
    parameters = tool.get("parameters") or {}
    required = set(parameters.get("required", ()))
    arguments = ", ".join(
        _argument(name, schema, name in required) for name, schema in parameters.get("properties", {}).items()
    )
    description = " ".join(str(tool.get("description", "")).split())
    return f"{tool['name']}({arguments})" + (f" - {description}" if description else "")


def _argument(name: str, schema: Mapping[str, Any], required: bool) -> str:
    if "default" in schema:
        return f"{name}: {_type(schema)} = {_dumps(schema['default'])}"
    return f"{name}{'' if required else '?'}: {_type(schema)}"


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "|".join(_dumps(value) for value in schema["enum"])
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return "|".join(_type(alternative) for alternative in alternatives)
    kind = schema.get("type")
    if isinstance(kind, list):
        return "|".join(_TYPES.get(name, "any") for name in kind)
    if kind == "array" and schema.get("items"):
        return f"list[{_type(schema['items'])}]"
    if kind == "object" and schema.get("properties"):
        required = set(schema.get("required", ()))
        fields = (_argument(name, inner, name in required) for name, inner in schema["properties"].items())
        return "{" + ", ".join(fields) + "}"
    return _TYPES.get(kind, "any") if isinstance(kind, str) else "any"


def system_prompt(tools: Iterable[Tool]) -> str:
    """What a model has to know to call `tools`: the format, what to say when none applies, one signature a line."""
    lines = "\n".join(signature(tool) for tool in tools)
    return f'Call one tool as {OPEN}{{"name": ..., "arguments": {{...}}}}{CLOSE} or say: {NO_TOOL}\n{lines}'


def render_call(name: str, arguments: Mapping[str, Any]) -> str:
    """The call as text. Raises ValueError for what JSON cannot hold (NaN, infinity).

    Tags inside the arguments are escaped as JSON allows: a stop string or a search for tags meets only real ones.
    """
    body = _dumps({"name": name, "arguments": dict(arguments)})
    return OPEN + body.replace(CLOSE, "<\\/tool_call>").replace(OPEN, "\\u003ctool_call>") + CLOSE


def _dumps(value: Any) -> str:
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
            _dumps(value).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos - start}") from None
    except UnicodeEncodeError:
        raise ValueError("a half of a surrogate pair") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, end


def parse_calls(text: str) -> list[Call]:
    """The calls in `text` in order, attempts that are not calls included with `malformed` set. Never raises.

    Tolerated: whitespace around the JSON, other text around a call, and a missing closing tag at the end of the text
    (generation often stops at it). Everything else is an attempt, not a call: broken JSON, keys other than `name` and
    `arguments`, a closing tag alone, an opening tag cut short at the end, a call object without the tags.
    """
    calls: list[Call] = []
    position = 0
    while (found := text.find(OPEN, position)) >= 0:
        calls += _outside(text[position:found])
        call, position = _read_call(text, found)
        calls.append(call)
    return calls + _outside(text[position:])


def _read_call(text: str, found: int) -> tuple[Call, int]:
    start = found + len(OPEN)
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        value, end = decode_json(text, start)
    except ValueError as error:
        return _attempt(text, found, start, str(error))
    rest = text[end:].lstrip()
    if rest.startswith(CLOSE):
        end = len(text) - len(rest) + len(CLOSE)
    elif rest:
        return _attempt(text, found, end, f"something other than {CLOSE} follows the call")
    if problem := _problem(value):
        return Call("", {}, problem, text[found:end]), end
    return Call(value["name"], value["arguments"], None, text[found:end]), end


def _attempt(text: str, found: int, start: int, problem: str) -> tuple[Call, int]:
    ends = [end for end in (text.find(CLOSE, start), text.find(OPEN, start)) if end >= 0]
    end = min(ends, default=len(text))
    if text.startswith(CLOSE, end):
        end += len(CLOSE)
    return Call("", {}, problem, text[found:end]), end


def _problem(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "a call is a JSON object"
    if not isinstance(value.get("name"), str) or not value["name"]:
        return "key name must be a tool's name"
    if not isinstance(value.get("arguments"), dict):
        return "key arguments must be an object"
    if extra := sorted(set(value) - {"name", "arguments"}):
        return f"unknown key {extra[0]}; allowed: name, arguments"
    return None


def _outside(text: str) -> list[Call]:
    """Attempts in text without an opening tag."""
    attempts = []
    if CLOSE in text:
        attempts.append(Call("", {}, f"{CLOSE} without {OPEN}", text))
    elif _cut_short(text):
        attempts.append(Call("", {}, f"{OPEN} is cut short", text))
    elif _UNTAGGED.search(text) and '"arguments"' in text:
        attempts.append(Call("", {}, f"a call without {OPEN}", text))
    return attempts


def _cut_short(text: str) -> bool:
    tail = text.rstrip()
    return any(tail.endswith(OPEN[:length]) for length in range(len("<tool"), len(OPEN)))


def validate(call: Call, tool: Tool) -> list[str]:
    """What is wrong with `call` for `tool`, one sentence each; an empty list if it can be executed.

    JSON schema decides (so 5.0 is an integer and true is not); arguments that the tool does not have are wrong as well.
    """
    import jsonschema  # type: ignore[import-untyped]

    if call.malformed:
        return [call.malformed]
    if call.name != tool["name"]:
        return [f"unknown tool {call.name}; allowed: {tool['name']}"]
    schema = {"type": "object", "properties": {}, "additionalProperties": False, **(tool.get("parameters") or {})}
    problems = []
    for error in jsonschema.Draft202012Validator(schema).iter_errors(call.arguments):
        where = ".".join(str(part) for part in error.absolute_path)
        message = error.message if len(error.message) <= 300 else error.message[:300] + "…"
        problems.append(f"argument {where}: {message}" if where else message)
    return sorted(problems)


def check_tool(tool: Any) -> str | None:
    """What makes `tool` unusable as a tool definition, or None."""
    import jsonschema

    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str) or not tool["name"]:
        return "a tool needs a name"
    name = tool["name"]
    if extra := sorted(set(tool) - {"name", "description", "parameters"}):
        return f"tool {name}: unknown key {extra[0]}; allowed: name, description, parameters"
    parameters = tool.get("parameters", {})
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        return f"tool {name}: parameters must be a JSON schema of type object"
    try:
        jsonschema.Draft202012Validator.check_schema(parameters)
    except jsonschema.SchemaError as error:
        return f"tool {name}: parameters are not a JSON schema: {error.message}"
    if missing := sorted(set(parameters.get("required", ())) - set(parameters.get("properties", {}))):
        return f"tool {name}: required argument {missing[0]} is not among its properties"
    return None
