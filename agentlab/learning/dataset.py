"""Items → training examples: sampled by the genome's data mix, rendered exactly as the engine renders prompts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from agentlab.config import TrainingSettings
from agentlab.tasks import Item, Suite

_MEASURED_ITEMS = 64

if TYPE_CHECKING:
    from agentlab.inference.templates import TemplatedEngine


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of prompt and completion together, and which of them (1) count for the loss."""

    input_ids: list[int]
    completion_mask: list[int]


def sample(
    items: Sequence[Item], count: int, mix: Mapping[str, float], seed: int, wanted: np.ndarray | None = None
) -> list[Item]:  # fmt: skip
    """`count` items in a seeded order; no item comes back before all others have been used.

    `mix` gives groups a relative weight (default 1): a group of weight 2 comes twice as early and as often in an epoch
    that is not completed. Weight 0 leaves a group out. wanted: a weight above 0 for each item (n,) beside that; then an
    item may come back after half of the others, so that it does come more often.
    """
    rng = np.random.default_rng(seed)
    weights = np.array([mix.get(item.group, 1.0) for item in items], dtype=float)
    if wanted is not None:
        weights = weights * wanted
    usable = np.flatnonzero(weights > 0)
    if len(usable) == 0:
        usable, weights = np.arange(len(items)), np.ones(len(items))
    most = len(usable) if wanted is None else -(-len(usable) // 2)  # of a round
    chosen: list[int] = []
    while len(chosen) < count:
        # Efraimidis and Spirakis 2006: sorting by u^(1/w) is weighted sampling without replacement
        keys = rng.random(len(usable)) ** (1.0 / weights[usable])
        chosen += usable[np.argsort(-keys)][: min(most, count - len(chosen))].tolist()
    return [items[i] for i in chosen]


def steps_of(engine: "TemplatedEngine", suite: Suite, training: TrainingSettings) -> int:
    """Optimiser steps of a child in the mean: the setting, or what `training.tokens` pays for; at least 1.

    An item's cost is the mean over the training split's first ones.
    """
    if training.steps is not None:
        return training.steps
    some = suite.split("train")[:_MEASURED_ITEMS]
    mean = sum(len(encode(engine, suite, item).input_ids) for item in some) / len(some)
    return max(1, round(training.tokens / (mean * training.batch_size)))


def encode(engine: "TemplatedEngine", suite: Suite, item: Item) -> Example:
    """One item as tokens: the prompt as the engine would send it, the target up to its end-of-turn token."""
    messages = suite.chat(item)
    prompt = engine.render(messages)
    tokenizer: Any = engine.tokenizer
    answered = [*messages, {"role": "assistant", "content": suite.target(item)}]
    whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    if not whole.startswith(prompt):  # some templates rewrite the prompt once it is answered
        whole = prompt + suite.target(item) + tokenizer.eos_token
    completion = engine.encode(whole[len(prompt) :])
    if tokenizer.eos_token_id in completion:  # what a template writes after the end of turn is never generated
        completion = completion[: completion.index(tokenizer.eos_token_id) + 1]
    else:
        completion.append(tokenizer.eos_token_id)
    prompt_ids = engine.encode(prompt)
    return Example(prompt_ids + completion, [0] * len(prompt_ids) + [1] * len(completion))
