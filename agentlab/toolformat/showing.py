"""How tools are shown to a model: one line each, as four JSON schemas are several times the tokens of four lines."""

from collections.abc import Iterable, Mapping
from typing import Any

from agentlab.toolformat.calls import dumps
from agentlab.toolformat.styles import TAGS, CallStyle, Tool

NO_TOOL = "No tool applies."
"""What a model is taught to say when no tool fits."""

_TYPES = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "array": "list",
    "object": "dict",
    "null": "null",
}


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
        return f"{name}: {_type(schema)} = {dumps(schema['default'])}"
    return f"{name}{'' if required else '?'}: {_type(schema)}"


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "|".join(dumps(value) for value in schema["enum"])
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


def system_prompt(tools: Iterable[Tool], style: CallStyle = TAGS) -> str:
    """What a model has to know to call `tools`: the format, what to say when none applies, one signature a line."""
    lines = "\n".join(signature(tool) for tool in tools)
    return f"Call one tool as {style.example} or say: {NO_TOOL}\n{lines}"
