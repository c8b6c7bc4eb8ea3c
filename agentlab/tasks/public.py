"""Three public data sets as suites: GSM8K (numbers), CLINC150 (labels), BFCL (tool calls)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentlab.errors import SuiteError
from agentlab.tasks.matching import first_accepted
from agentlab.tasks.sources import Pools, Row, read_json, read_jsonl
from agentlab.toolformat import Call, validate

Settings = dict[str, Any]
_BFCL_TYPES = {
    "dict": "object",
    "float": "number",
    "double": "number",
    "tuple": "array",
    "bool": "boolean",
    "int": "integer",
}


def from_gsm8k(folder: Path) -> tuple[Settings, Pools]:
    """GSM8K from openai/grade-school-math: its worked solution is the answer, of which the last number counts.

    `folder` holds train.jsonl and test.jsonl; the calculator's <<48/2=24>> notes are removed.
    """
    pools = {}
    for name in ("train", "test"):
        file = folder / f"{name}.jsonl"
        rows = _jsonl(file)
        try:
            pools[name] = [_gsm8k_line(f"gsm8k-{name}-{n:04d}", row) for n, row in enumerate(rows)]
        except (KeyError, TypeError) as error:
            raise SuiteError(f"{file} is not GSM8K's: {type(error).__name__} {error}") from None
    system = "Solve the problem step by step. End with #### and the answer as a number."
    return {"metric": "number", "system": system, "license": "MIT"}, pools


def _gsm8k_line(identity: str, row: Row) -> Row:
    return {"id": identity, "prompt": row["question"], "answer": re.sub(r"<<.*?>>", "", row["answer"])}


def from_clinc150(file: Path, intents: Sequence[str] | None = None) -> tuple[Settings, Pools]:
    """CLINC150 from clinc/oos-eval (data_full.json), all 150 intents or only `intents`; "oos" may be one of them."""
    data = read_json(file / "data_full.json" if file.is_dir() else file)
    try:
        known = sorted({label for _, label in data["train"]})
        wanted = list(dict.fromkeys(intents)) if intents else known
        if unknown := sorted(set(wanted) - {*known, "oos"}):
            raise SuiteError(
                f"CLINC150 has no intent {', '.join(unknown)}; some of its 150: {', '.join(known[:8])}, oos"
            )
        pools = {
            name: [
                {"id": f"clinc-{key}-{n:05d}", "prompt": text, "answer": label}
                for key in (part, f"oos_{part}")
                for n, (text, label) in enumerate(data[key])
                if label in wanted
            ]
            for name, part in (("train", "train"), ("validation", "val"), ("test", "test"))
        }
    except (KeyError, TypeError, ValueError) as error:
        raise SuiteError(f"{file} is not CLINC150's data_full.json: {type(error).__name__} {error}") from None
    return {"metric": "label", "labels": wanted, "license": "CC-BY-3.0"}, pools


def from_bfcl(folder: Path) -> tuple[Settings, Pools]:
    """Single-call cases of the Berkeley Function-Calling Leaderboard, and those where no tool applies.

    `folder` holds simple_python.jsonl, simple_python_answers.jsonl and irrelevance.jsonl. Each item has its own tools,
    with BFCL's type names turned into JSON schema's; accepted answers that do not fit that schema come last.
    """
    try:
        return {"metric": "tool_call", "license": "Apache-2.0"}, {"train": _bfcl_lines(folder)}
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise SuiteError(f"{folder} does not hold BFCL's files: {type(error).__name__} {error}") from None


def _bfcl_lines(folder: Path) -> list[Row]:
    answers = {row["id"]: row["ground_truth"] for row in _jsonl(folder / "simple_python_answers.jsonl")}
    cases = [(row, answers.get(row["id"])) for row in _jsonl(folder / "simple_python.jsonl")]
    cases += [(row, None) for row in _jsonl(folder / "irrelevance.jsonl")]
    rows = []
    for row, truth in cases:
        if truth is None and not row["id"].startswith("irrelevance"):
            raise SuiteError(f"{folder / 'simple_python_answers.jsonl'} has no answer for {row['id']}")
        tools = [bfcl_tool(function) for function in row["function"]]
        rows.append(
            {
                "id": row["id"],
                "messages": [dict(message) for message in row["question"][0]],
                "answer": bfcl_answer(truth, tools) if truth else None,
                "tools": tools,
                "group": "call" if truth else "none",
            }
        )
    return rows


def _jsonl(path: Path) -> list[Row]:
    if not path.is_file():
        raise SuiteError(f"no file {path}")
    return read_jsonl(path)


def bfcl_tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """A BFCL function description as a tool with a JSON schema."""
    parameters = bfcl_schema(function.get("parameters", {}))
    return {"name": function["name"], "description": function.get("description", ""), "parameters": parameters}


def bfcl_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema for one of BFCL's: dict, float, tuple, any, … become object, number, array, no type."""
    result = dict(schema)
    kind = result.get("type")
    if kind == "any":
        del result["type"]
    elif isinstance(kind, str):
        result["type"] = _BFCL_TYPES.get(kind.lower(), kind.lower())
    if isinstance(result.get("properties"), dict):
        result["properties"] = {name: bfcl_schema(inner) for name, inner in result["properties"].items()}
    if isinstance(result.get("items"), dict):
        result["items"] = bfcl_schema(result["items"])
    return result


def bfcl_answer(truth: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """BFCL's [{name: {argument: [accepted, …]}}] as a `tool_call` answer."""
    ((name, accepted),) = truth[0].items()
    arguments = {argument: _any(values) for argument, values in accepted.items()}
    tool = next(tool for tool in tools if tool["name"] == name)
    properties = tool["parameters"].get("properties", {})
    for argument, expected in arguments.items():
        schema = properties.get(argument, {})
        fitting = [value for value in expected["any"] if _fits(value, schema)]
        expected["any"] = fitting + [value for value in expected["any"] if not _fits(value, schema)]
    return {"name": name, "arguments": arguments}


def _any(values: Any) -> dict[str, list[Any]]:
    return {"any": [_nested(value) for value in (values if isinstance(values, list) else [values])]}


def _nested(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _any(values) for key, values in value.items()}
    return [_nested(element) for element in value] if isinstance(value, list) else value


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    if value == "":
        return True  # it stands for leaving the argument out
    tool = {"name": "", "parameters": {"type": "object", "properties": {"value": schema}}}
    return not validate(Call("", {"value": first_accepted(value)}), tool)
