"""A suite: verifiable work in four splits, of which `test` is sealed."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentlab.errors import SuiteError
from agentlab.tasks.checkers import Checker, written_answer
from agentlab.tasks.items import SPLITS, Item
from agentlab.tasks.matching import first_arguments
from agentlab.toolformat import NO_TOOL, render_call, system_prompt

__all__ = ["Item", "Suite", "load", "score_split"]


@dataclass(frozen=True, repr=False)
class Suite:
    """A validated suite. `digest` is a sha256 over every setting and item, and over the code of a function metric."""

    name: str
    metric: str
    system: str | None
    tools: list[dict[str, Any]]
    labels: list[str]
    license: str | None
    folder: Path | None
    digest: str
    warnings: list[str]
    _items: Mapping[str, list[Item]] = field(repr=False)
    _checker: Checker = field(repr=False)

    def __repr__(self) -> str:
        return f"Suite({self.name}, {self.metric}, {self.digest[:8]})"

    def split(self, name: str) -> list[Item]:
        """The items of train, fitness or gate. Raises SuiteError for `test`, which only the seal opens."""
        if name == "test":
            raise SuiteError(
                f"the test split of suite {self.name} is sealed: only the comparison at the end of a run opens it"
            )
        if name not in SPLITS:
            raise SuiteError(f"unknown split {name}; allowed: train, fitness, gate")
        return list(self._items[name])

    def open_test(self) -> list[Item]:
        """The sealed items, for the seal alone: it counts every opening."""
        return list(self._items["test"])

    @property
    def test_items(self) -> int:
        """How many items `test` holds, without opening it."""
        return len(self._items["test"])

    def chat(self, item: Item) -> list[dict[str, str]]:
        """The messages a model answers: the system prompt with tools or labels in front of the item's own messages."""
        parts = [self.system] if self.system else []
        messages = [dict(message) for message in item.messages]
        if messages[0]["role"] == "system":
            parts.append(messages.pop(0)["content"])
        if item.tools:
            parts.append(system_prompt(item.tools))
        if self.metric == "label":
            parts.append(f"Answer with one label: {', '.join(self.labels)}")
        return ([{"role": "system", "content": "\n".join(parts)}] if parts else []) + messages

    def target(self, item: Item) -> str:
        """The assistant's text to train on; where several answers are accepted, the first."""
        if self.metric != "tool_call":
            return written_answer(self.metric, item.answer)
        if item.answer is None:
            return NO_TOOL
        return render_call(item.answer["name"], first_arguments(item.answer["arguments"]))

    def check(self, item: Item, text: str) -> float:
        """The score of `text` as an answer, 0 to 1. Raises SuiteError only where a function metric fails."""
        return self._checker(item.answer, text, item)

    def groups(self) -> list[str]:
        """The distinct groups of train, sorted; at most 24."""
        return sorted({item.group for item in self._items["train"]})

    def summary(self) -> dict[str, Any]:
        """What `agentlab suite show` prints: counts and names, no item of `test`."""
        return {
            "name": self.name,
            "metric": self.metric,
            "license": self.license,
            "folder": str(self.folder) if self.folder else None,
            "digest": self.digest,
            "splits": {name: len(self._items[name]) for name in SPLITS},
            "groups": dict(sorted(Counter(item.group for item in self._items["train"]).items())),
            "labels": list(self.labels),
            "tools": [tool["name"] for tool in self.tools],
            "warnings": list(self.warnings),
        }


def load(name_or_folder: str, root: Path) -> Suite:
    """The suite of a built-in name or a folder: absolute, relative to `root`, or to `root/experiments`.

    Raises SuiteError that names file and line of what is wrong, or lists the built-in suites.
    """
    from agentlab.tasks.builtin import BUILT_IN, build
    from agentlab.tasks.reading import read_suite

    if name_or_folder in BUILT_IN:
        return build(name_or_folder)
    places = [root / name_or_folder, root / "experiments" / name_or_folder]
    for place in places:
        if name_or_folder and place.is_dir():
            return read_suite(place)
    raise SuiteError(
        f"no suite {name_or_folder!r}: neither built in ({', '.join(BUILT_IN)}) nor a folder under {root} or "
        f"{root / 'experiments'}"
    )


def score_split(suite: Suite, items: Sequence[Item], texts: Sequence[str]) -> list[float]:
    """One score per item, computed through the `evaluate` library with a local metric (no network).

    Raises ValueError if there is not one text per item.
    """
    if len(items) != len(texts):
        raise ValueError(f"{len(texts)} texts for {len(items)} items")
    from agentlab.tasks.scores import score_texts

    scorer: Callable[[Suite, list[Item], list[str]], list[float]] = score_texts
    return scorer(suite, list(items), list(texts))
