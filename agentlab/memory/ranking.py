"""How recalled memories are ranked: pure functions of numbers, so that `explain` can show every part."""

import dataclasses

import numpy as np

DAY_S = 86_400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """The constants of the recall formula (docs/MEMORY.md derives them). Shares are of the final score.

    vector: share of the cosine in relevance, the rest is BM25. before, after: how much of its neighbours' relevance
    a turn of a session gets. importance, recency: added on top of relevance.
    """

    vector: float = 0.4
    before: float = 0.3
    after: float = 0.15
    importance: float = 0.05
    recency: float = 0.05
    half_life_days: float = 30.0


def relevance(cosines: np.ndarray, text: np.ndarray, vector: float) -> np.ndarray:
    """(n,) in [0, 1]: weighted mean of the cosine and of `text`, BM25 over the best it could be for this query."""
    return np.asarray(vector * np.maximum(cosines, 0.0) + (1 - vector) * text)


def recency(now: float, created: np.ndarray, accessed: np.ndarray, half_life_days: float) -> np.ndarray:
    """(n,) in (0, 1]: 1 for a memory made or used now, half of it after each half-life.

    The formula published with Generative Agents decays with the *sum* of hours in the wrong direction; this one is the
    plain forgetting curve 2^(-age / half-life), with the age counted from the last use.
    """
    age_days = np.maximum(now - np.maximum(created, accessed), 0.0) / DAY_S
    return np.asarray(np.exp2(-age_days / half_life_days))


def importance(stored: np.ndarray, uses: np.ndarray, told: np.ndarray) -> np.ndarray:
    """(n,) in [0, 1]: what was given or found at writing, raised by every use and every time it was told again.

    Each doubling of 1 + uses + 2·(told - 1) takes a tenth of the way that is left to 1.
    """
    doublings = np.log2(1 + uses + 2 * np.maximum(told - 1, 0))
    return np.asarray(1 - (1 - stored) * 0.9**doublings)


def novelty_importance(nearest: float) -> float:
    """Importance at writing: 0.3 for what is known almost word for word, 0.7 for something new.

    nearest: the highest cosine with an older memory, 0 where there is none.
    """
    return 0.3 + 0.4 * (1.0 - min(max(nearest, 0.0), 1.0))
