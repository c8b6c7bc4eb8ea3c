"""How a model's own chat template writes a call, found by letting it write one."""

import json
from collections.abc import Callable
from typing import Any

from agentlab.toolformat.calls import decode_json, parse_calls
from agentlab.toolformat.styles import CallStyle, Tool

_NAME, _ARGUMENTS, _TEXT = "probe_tool", {"probe_key": "probe value"}, "Probe text."
_TOOL: Tool = {
    "name": _NAME,
    "description": "A probe.",
    "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "A value."}}},
}
_IGNORABLE = ("id", "type")

Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]
"""(messages, tools in the chat template's form or None) → the text without a generation prompt."""


def template_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools as chat templates take them."""
    return [{"type": "function", "function": {"description": "", "parameters": {}, **tool}} for tool in tools]


def shows_tools(render: Render) -> bool:
    """Whether the template tells the model of its tools."""
    asked = [{"role": "user", "content": _TEXT}]
    try:
        return render(asked, template_tools([_TOOL])) != render(asked, None)
    except Exception:  # a template is a program: it may raise anything
        return False


def style_of_template(render: Render) -> CallStyle | None:
    """The style in which the template writes the calls of an assistant's turn.

    None where it ignores tools, or writes calls in a way that `parse_calls` does not read back.
    """
    asked: list[dict[str, Any]] = [{"role": "user", "content": _TEXT}]
    call = {"id": "probe1234", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    answered = [*asked, {"role": "assistant", "content": _TEXT}]
    called = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    if not shows_tools(render):
        return None
    try:
        plain, text = render(answered, template_tools([_TOOL])), render(called, template_tools([_TOOL]))
    except Exception:
        return None
    start = _common(plain, text)  # the beginning of the assistant's turn
    end = len(text) - _common(plain[::-1], text[::-1])  # its end
    found = _find_call(text, start)
    if found is None:
        return None
    value, begin, stop = found
    keys = [key for key, inner in value.items() if inner == _ARGUMENTS]
    ignored = tuple(sorted(set(value) - {"name", *keys}))
    if len(keys) != 1 or value.get("name") != _NAME or not set(ignored) <= set(_IGNORABLE):
        return None
    style = CallStyle(text[start:begin].lstrip(), text[stop : max(end, stop)].rstrip(), keys[0], ignored)
    calls = parse_calls(text[start : max(end, stop)], style)
    if [(read.name, read.arguments, read.malformed) for read in calls] != [(_NAME, _ARGUMENTS, None)]:
        return None
    return style


def _common(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _find_call(text: str, start: int) -> tuple[dict[str, Any], int, int] | None:
    """The JSON object that names the probe, where it begins and where it ends."""
    name = text.find(json.dumps(_NAME), start)
    begin = text.rfind("{", start, name) if name >= 0 else -1
    if begin < 0:
        return None
    try:
        value, end = decode_json(text, begin)
    except ValueError:
        return None
    return (value, begin, end) if isinstance(value, dict) else None
