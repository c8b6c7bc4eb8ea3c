"""How a model writes a call: the project's own tags, ReAct text, or what a model's chat template writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Tool: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class CallStyle:
    """What stands before, in and after a call's JSON `{"name": …, arguments_key: {…}}`.

    ignored_keys: further keys that the template writes into a call, like Mistral's "id"; read and forgotten.
    kind "react": `Action: name`, a line `Action Input: {…}`, thoughts before it.
    """

    open: str
    close: str
    arguments_key: str = "arguments"
    ignored_keys: tuple[str, ...] = ()
    kind: Literal["json", "react"] = "json"

    @property
    def is_list(self) -> bool:
        """Whether the calls of one answer are the items of one JSON array."""
        return self.open.endswith("[")

    @property
    def marker(self) -> str:
        """The text that only a call begins with; empty where a call is bare JSON."""
        return self.open.removesuffix("[").strip() if self.is_list else self.open.strip()

    @property
    def trigger(self) -> str:
        """The text after which an answer is a call; for bare JSON its first key."""
        return self.marker or '{"name": '

    @property
    def end(self) -> str:
        """The text that ends a call, without whitespace around it; empty where the JSON's own end is the call's."""
        return self.close.strip()

    @property
    def example(self) -> str:
        """A call with dots for a prompt to show."""
        if self.kind == "react":
            return "Thought: ...\nAction: name\nAction Input: {...}"
        return f'{self.open}{{"name": ..., "{self.arguments_key}": {{...}}}}{self.close}'

    def begin(self, name: str) -> str:
        """The text of a call up to its arguments."""
        if self.kind == "react":
            return f"Action: {name}\nAction Input: "
        return f'{self.open}{{"name": {json.dumps(name, ensure_ascii=False)}, "{self.arguments_key}": '

    @property
    def finish(self) -> str:
        """The text of a call after its arguments."""
        return "" if self.kind == "react" else "}" + self.close


TAGS = CallStyle("<tool_call>", "</tool_call>")
"""The project's own format: what models without a format of their own are taught."""
REACT = CallStyle("Action:", "", kind="react")
"""Thoughts and calls as lines of text."""
