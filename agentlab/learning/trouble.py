"""What goes wrong in training, how it is recognised, and what is tried next."""

import dataclasses
import math
from collections.abc import Sequence

from agentlab.errors import AgentlabError
from agentlab.hardware.sizing import halved

SHORTENINGS = 2  # twice the longest quarter: what is left would be another training set
DIVERGED_NATS = 3.0  # loss this far above the first step's: perplexity 20 times worse than where training began


class TrainingTrouble(AgentlabError):
    """Training cannot go on like this. problem: "nan", "divergence" or "out_of_memory"."""

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(f"{problem}: {detail}")
        self.problem = problem


class TrainingFailed(AgentlabError):
    """No remedy is left; the candidate is given up and the generation goes on."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What a remedy may change. The items of one optimiser step are batch_size × accumulation throughout.

    checkpointing: activations are computed again instead of kept. max_tokens: longer items are left out; shortened: how
    often that limit was lowered.
    """

    learning_rate: float
    batch_size: int
    accumulation: int = 1
    checkpointing: bool = False
    max_tokens: int | None = None
    shortened: int = 0


def check_loss(losses: list[float]) -> None:
    """Raise TrainingTrouble when the newest loss is not a number or far above the first."""
    newest = losses[-1]
    if not math.isfinite(newest):
        raise TrainingTrouble("nan", f"loss is {newest} at step {len(losses)}")
    if newest > losses[0] + DIVERGED_NATS:
        raise TrainingTrouble("divergence", f"loss rose from {losses[0]:.2f} to {newest:.2f} at step {len(losses)}")


def remedy(attempt: Attempt, problem: str, lengths: Sequence[int] = ()) -> tuple[Attempt, str] | None:
    """The next attempt and what it changes, in words; None when nothing is left to try.

    lengths: tokens of the items that are trained on now. Lack of memory is met with smaller micro-batches, then
    gradient checkpointing, then without the longest items; each can be done so often that it ends.
    """
    if problem in ("nan", "divergence"):
        lower = attempt.learning_rate / 4
        return dataclasses.replace(attempt, learning_rate=lower), f"learning rate lowered to {lower:.2g}"
    if problem != "out_of_memory":
        return None
    if attempt.batch_size > 1:
        halves = halved(attempt.batch_size)
        factor = attempt.batch_size // halves
        smaller = dataclasses.replace(attempt, batch_size=halves, accumulation=attempt.accumulation * factor)
        return smaller, f"batch of {smaller.batch_size} with {smaller.accumulation} accumulated"
    if not attempt.checkpointing:
        return dataclasses.replace(attempt, checkpointing=True), "gradient checkpointing"
    limit = _without_the_longest(lengths)
    if limit is None or attempt.shortened >= SHORTENINGS:
        return None
    shorter = dataclasses.replace(attempt, max_tokens=limit, shortened=attempt.shortened + 1)
    return shorter, f"items of at most {limit} tokens"


def _without_the_longest(lengths: Sequence[int]) -> int | None:
    """The limit that leaves out about the longest quarter of the items; None where all are equally long."""
    ordered = sorted(lengths)
    shorter = [length for length in ordered if length < ordered[-1]]
    return None if not shorter else min(shorter[-1], ordered[(3 * len(ordered) - 1) // 4])
