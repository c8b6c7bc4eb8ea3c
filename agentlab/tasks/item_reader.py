"""From one parsed line to one validated item."""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentlab.errors import SuiteError
from agentlab.tasks.checkers import last_number, plain
from agentlab.tasks.items import Item, natural_group
from agentlab.tasks.matching import first_arguments, has_choice
from agentlab.toolformat import Call, check_tool, validate

ITEM_KEYS = ("id", "prompt", "messages", "answer", "tools", "group")
ROLES = ("system", "user", "assistant", "tool")


def known_keys(value: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    """Refuse a key that is not allowed, with the one that was probably meant."""
    for key in value:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SuiteError(f"{where}: unknown key {key}{hint} (allowed: {', '.join(allowed)})")


@dataclass
class ItemReader:
    """Turns parsed lines into items of one suite."""

    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.metric: str = self.config["metric"]
        self.tools: list[dict[str, Any]] = list(self.config.get("tools") or [])
        self.labels: list[str] = list(self.config.get("labels") or [])
        self._by_name = {tool["name"]: tool for tool in self.tools}
        self._label_set = set(self.labels)

    def item(self, where: str, raw: Any) -> Item:
        _writable(where, raw)
        if not isinstance(raw, dict):
            raise SuiteError(f"{where}: an item is a JSON object with id, prompt or messages, and answer")
        known_keys(raw, ITEM_KEYS, where)
        identity = raw.get("id")
        if not isinstance(identity, str) or not identity:
            raise SuiteError(f"{where}: key id must be a text: {identity!r}")
        if "answer" not in raw:
            raise SuiteError(f"{where}: key answer is missing")
        messages = _messages(where, raw)
        tools = self._tools(where, raw.get("tools"))
        self._check_answer(where, raw["answer"], tools)
        group = raw.get("group", natural_group(self.metric, raw["answer"]))
        if not isinstance(group, str) or not group:
            raise SuiteError(f"{where}: key group must be a text: {group!r}")
        return Item(identity, messages, raw["answer"], group, tools)

    def _tools(self, where: str, own: Any) -> list[dict[str, Any]]:
        if own is None:
            return list(self.tools)
        if not isinstance(own, list):
            raise SuiteError(f"{where}: key tools must be a list of tools or of names from suite.yaml")
        tools = []
        for tool in own:
            if isinstance(tool, str):
                if tool not in self._by_name:
                    raise SuiteError(f"{where}: unknown tool {tool}; allowed: {', '.join(self._by_name) or 'none'}")
                tools.append(self._by_name[tool])
            elif problem := check_tool(tool):
                raise SuiteError(f"{where}: {problem}")
            else:
                tools.append(tool)
        return tools

    def _check_answer(self, where: str, answer: Any, tools: list[dict[str, Any]]) -> None:
        if self.metric == "label" and not (isinstance(answer, str) and answer in self._label_set):
            close = difflib.get_close_matches(str(answer), self.labels, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SuiteError(f"{where}: answer {answer!r} is not one of the {len(self.labels)} labels{hint}")
        if self.metric == "exact" and not _is_exact(answer):
            raise SuiteError(
                f"{where}: answer {answer!r}; allowed for metric exact: a text or a list of accepted texts"
            )
        if self.metric == "number" and not _is_number(answer):
            raise SuiteError(
                f"{where}: answer {answer!r}; allowed for metric number: a number or a text that ends in one"
            )
        if self.metric == "tool_call" and (problem := _call_problem(answer, tools)):
            raise SuiteError(f"{where}: {problem}")


def _writable(where: str, raw: Any) -> None:
    try:
        json.dumps(raw, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise SuiteError(f"{where}: text that is not valid Unicode: half of a surrogate pair like \\ud800") from None
    except ValueError:
        raise SuiteError(f"{where}: NaN or an infinite number; allowed: what JSON has") from None


def _messages(where: str, raw: dict[str, Any]) -> list[dict[str, str]]:
    if ("prompt" in raw) == ("messages" in raw):
        raise SuiteError(f"{where}: an item has either prompt or messages")
    if "prompt" in raw:
        if not isinstance(raw["prompt"], str) or not raw["prompt"].strip():
            raise SuiteError(f"{where}: key prompt must be a text: {raw['prompt']!r}")
        return [{"role": "user", "content": raw["prompt"]}]
    messages = raw["messages"]
    if not isinstance(messages, list) or not messages:
        raise SuiteError(f"{where}: key messages must be a list of at least one message")
    for message in messages:
        if (
            not isinstance(message, dict)
            or set(message) != {"role", "content"}
            or message["role"] not in ROLES
            or not isinstance(message["content"], str)
        ):
            raise SuiteError(f"{where}: a message has role ({', '.join(ROLES)}) and content: {message!r}")
    if messages[-1]["role"] not in ("user", "tool"):
        raise SuiteError(f"{where}: the last message must be the user's (or a tool's), for the model to answer")
    return messages


def _is_exact(answer: Any) -> bool:
    texts = answer if isinstance(answer, list) else [answer]
    return bool(texts) and all(isinstance(text, str) and plain(text) for text in texts)


def _is_number(answer: Any) -> bool:
    if isinstance(answer, str):
        return last_number(answer) is not None
    return isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)


def _call_problem(answer: Any, tools: list[dict[str, Any]]) -> str | None:
    if answer is None:
        return None
    if (
        not isinstance(answer, dict)
        or set(answer) != {"name", "arguments"}
        or not isinstance(answer["arguments"], dict)
    ):
        return f"answer {answer!r}; allowed for metric tool_call: null or an object with name and arguments"
    tool = next((tool for tool in tools if tool["name"] == answer["name"]), None)
    if tool is None:
        return f"answer names unknown tool {answer['name']}; allowed: {', '.join(t['name'] for t in tools) or 'none'}"
    if not all(map(has_choice, answer["arguments"].values())):
        return "answer has an empty list of accepted values"
    problems = validate(Call(answer["name"], first_arguments(answer["arguments"])), tool)
    return f"answer does not fit tool {answer['name']}: {problems[0]}" if problems else None
