"""Intervals and tests, small and exact where they can be. All intervals are 95 %."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

_Z = 1.959963984540054  # standard normal quantile of 0.975


def mean_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of item scores in [0, 1].

    Right-or-wrong scores: Wilson's interval (Wilson 1927), which is sensible at 0 and 1 too. Graded scores: the same
    formula with the variance that they have instead of p(1 - p), which is never larger.
    """
    values = np.asarray(scores, dtype=float)
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one score")
    p = float(values.mean())
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    variance = p * (1 - p) if binary else float(values.var())
    z2 = _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(variance / n + z2 / (4 * n * n))
    return p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def paired_gain(new: Sequence[float], old: Sequence[float]) -> tuple[float, float, float]:
    """(gain, low, high): mean of new - old over the same items.

    Right-or-wrong scores: the adjusted Wald interval for paired proportions (Agresti and Min 2005), half an item added
    to each of the four outcomes, so that a clean sweep still has a width. Graded scores: Student's t.
    """
    difference = np.asarray(new, dtype=float) - np.asarray(old, dtype=float)
    n = len(difference)
    gain = float(difference.mean())
    if bool(np.isin(difference, (-1.0, 0.0, 1.0)).all()):
        wins, losses, total = (difference > 0).sum() + 0.5, (difference < 0).sum() + 0.5, n + 2.0
        centre = (wins - losses) / total
        half = _Z * math.sqrt(max(0.0, (wins + losses) - (wins - losses) ** 2 / total)) / total
    else:
        centre = gain
        half = float(stats.t.ppf(0.975, n - 1)) * float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    return gain, max(-1.0, min(gain, centre - half)), min(1.0, max(gain, centre + half))


def wins_and_losses(new: Sequence[float], old: Sequence[float]) -> tuple[int, int]:
    """On how many items `new` scored higher, and lower."""
    return sum(a > b for a, b in zip(new, old, strict=True)), sum(a < b for a, b in zip(new, old, strict=True))


def paired_p_value(wins: int, losses: int) -> float:
    """One-sided exact sign test (McNemar's, for right-or-wrong scores): P(at least `wins` of the disagreements)."""
    disagreements = wins + losses
    return float(stats.binom.sf(wins - 1, disagreements, 0.5)) if disagreements else 1.0


def detectable_gain(items: int, losses: int, alpha: float) -> float:
    """The smallest gain that would have passed at `alpha` with this many losses, as a share of `items`; at most 1."""
    wins = losses + 1
    while wins + losses <= items:
        if paired_p_value(wins, losses) <= alpha:
            return (wins - losses) / items
        wins += 1
    return 1.0
