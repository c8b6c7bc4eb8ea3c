"""Confidence from token log-probabilities, and how well it is calibrated."""

import math
from collections.abc import Sequence


def sequence_probability(logprobs: Sequence[float] | None) -> float | None:
    """The model's probability of the whole text: the product over its tokens; None where no token's is known."""
    return _exp(sum(logprobs)) if logprobs else None


def token_probability(logprobs: Sequence[float] | None) -> float | None:
    """The geometric mean of the tokens' probabilities, which does not shrink with length; None where none is known."""
    return _exp(sum(logprobs) / len(logprobs)) if logprobs else None


def _exp(log: float) -> float | None:
    """None for NaN and infinity, which a model that overflows computes."""
    return math.exp(log) if log < math.inf else None


def joint(confidences: Sequence[float | None]) -> float | None:
    """The product of all; None where one of them is not known."""
    known = [one for one in confidences if one is not None]
    return math.prod(known) if len(known) == len(confidences) else None


def brier_score(confidences: Sequence[float], correct: Sequence[float]) -> float:
    """Mean squared distance of confidence and outcome (Brier 1950): 0 is perfect, 0.25 is what "50 %" always gets."""
    _check(confidences, correct)
    return sum((c - y) ** 2 for c, y in zip(confidences, correct, strict=True)) / len(correct)


def expected_calibration_error(confidences: Sequence[float], correct: Sequence[float], bins: int = 10) -> float:
    """Mean distance of confidence and accuracy over equally wide bins, weighted by their size (Guo et al. 2017)."""
    _check(confidences, correct)
    groups: dict[int, list[tuple[float, float]]] = {}
    for c, y in zip(confidences, correct, strict=True):
        groups.setdefault(min(int(c * bins), bins - 1), []).append((c, y))
    gaps = (abs(sum(c for c, _ in group) - sum(y for _, y in group)) for group in groups.values())
    return sum(gaps) / len(correct)


def _check(confidences: Sequence[float], correct: Sequence[float]) -> None:
    if not correct or len(confidences) != len(correct):
        raise ValueError(f"{len(confidences)} confidences for {len(correct)} outcomes; allowed: as many, at least one")
