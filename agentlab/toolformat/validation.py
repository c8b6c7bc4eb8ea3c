"""Whether a call fits its tool, and whether a tool is one at all: JSON schema decides."""

from typing import Any

from agentlab.toolformat.calls import Call
from agentlab.toolformat.styles import Tool


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
