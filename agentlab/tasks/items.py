"""One item of a suite, and what is derived from it: the key that finds leaks, the group it belongs to."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPLITS = ("train", "fitness", "gate", "test")
MAX_GROUPS = 24
_PUNCTUATION = re.compile(r"(?<!\d)[.,!?;:'\"()\[\]…。、！？「」’‘“”]+|[.,!?;:'\"()\[\]…。、！？「」’‘“”]+(?!\d)")


@dataclass(frozen=True)
class Item:
    """Verifiable work: `messages` without the suite's system prompt, the checkable `answer`, callable `tools`."""

    id: str
    messages: list[dict[str, str]]
    answer: Any
    group: str = "all"
    tools: list[dict[str, Any]] = ()  # type: ignore[assignment]


def leak_key(messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt without what does not make it another one: case, spacing, punctuation that is not inside a number."""
    text = "\n".join(str(message["content"]) for message in messages)
    plain = " ".join(_PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split())
    return plain or text


def natural_group(metric: str, answer: Any) -> str:
    """What kind of item this is, for mixing training data: the tool it needs, its label, else "all"."""
    if metric == "tool_call":
        return str(answer.get("name")) if isinstance(answer, dict) else "none"
    return str(answer) if metric == "label" else "all"
