"""What the three generators share: pools of templates and entities that no two kinds of split have in common."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agentlab.tasks.items import leak_key

COUNTS = {"train": 800, "fitness": 48, "gate": 128, "test": 200}
POOLS = {"train": "train", "fitness": "dev", "gate": "dev", "test": "test"}
"""Which pool each split draws from; fitness and gate share one, so that fitness foretells a generalisation too."""


@dataclass(frozen=True)
class Made:
    """A generated item with its origin: the template string and the entity values that were put into it."""

    prompt: str
    answer: Any
    template: str
    entities: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    def line(self, identity: str) -> dict[str, Any]:
        """The item as a line of a suite's JSONL file."""
        return {"id": identity, "prompt": self.prompt, "answer": self.answer, **self.extra}


def pools(train: str, dev: str, test: str) -> dict[str, list[str]]:
    """Three pools of entities, each written as one text with commas between them."""
    texts = {"train": train, "dev": dev, "test": test}
    return {name: [" ".join(entity.split()) for entity in text.split(",")] for name, text in texts.items()}


def integers(low: int, high: int) -> dict[str, list[str]]:
    """Integers from `low` to `high` as digits, four of six dealt to train, one each to dev and test."""
    pool = {4: "dev", 5: "test"}
    dealt: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for number in range(low, high + 1):
        dealt[pool.get(number % 6, "train")].append(str(number))
    return dealt


def decimals(low: int, high: int) -> dict[str, list[str]]:
    """Numbers with one decimal, never a whole one, dealt out by their integer part."""
    return {
        pool: [f"{whole}.{tenth}" for whole in wholes for tenth in range(1, 10)]
        for pool, wholes in integers(low, high).items()
    }


def distinct(split: str, count: int, seed: str, make: Callable[[random.Random, str, int], Made]) -> list[Made]:
    """`count` items of one split with prompts that differ, shuffled; `make(rng, pool, number)` draws one.

    fitness and gate draw from one pool: gate is made after fitness and avoids its prompts.
    """
    taken = (
        {leak_key(_message(item)) for item in distinct("fitness", COUNTS["fitness"], seed, make)}
        if split == "gate"
        else set()
    )
    rng = random.Random(f"{seed}/{split}")
    items: list[Made] = []
    while len(items) < count:
        item = make(rng, POOLS[split], len(items))
        key = leak_key(_message(item))
        if key not in taken:
            taken.add(key)
            items.append(item)
    rng.shuffle(items)
    return items


def _message(item: Made) -> list[dict[str, str]]:
    return [{"role": "user", "content": item.prompt}]
