"""What goes wrong in training, how it is recognised, and what is tried next."""

import dataclasses
import math

from agentlab.errors import AgentlabError

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
    """What a remedy may change. The items of one optimiser step are batch_size × accumulation throughout."""

    learning_rate: float
    batch_size: int
    accumulation: int = 1


def check_loss(losses: list[float]) -> None:
    """Raise TrainingTrouble when the newest loss is not a number or far above the first."""
    newest = losses[-1]
    if not math.isfinite(newest):
        raise TrainingTrouble("nan", f"loss is {newest} at step {len(losses)}")
    if newest > losses[0] + DIVERGED_NATS:
        raise TrainingTrouble("divergence", f"loss rose from {losses[0]:.2f} to {newest:.2f} at step {len(losses)}")


def is_out_of_memory(error: BaseException) -> bool:
    """By type, and by the messages of libraries that raise plain RuntimeErrors."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        phrase in text
        for phrase in ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
    )


def remedy(attempt: Attempt, problem: str) -> tuple[Attempt, str] | None:
    """The next attempt and what it changes, in words; None when nothing is left to try."""
    if problem in ("nan", "divergence"):
        lower = attempt.learning_rate / 4
        return dataclasses.replace(attempt, learning_rate=lower), f"learning rate lowered to {lower:.2g}"
    if problem == "out_of_memory" and attempt.batch_size > 1:
        halves = attempt.batch_size // 2 if attempt.batch_size % 2 == 0 else 1
        factor = attempt.batch_size // halves
        smaller = dataclasses.replace(attempt, batch_size=halves, accumulation=attempt.accumulation * factor)
        return smaller, f"batch of {smaller.batch_size} with {smaller.accumulation} accumulated"
    return None
