"""Who becomes a parent, who stays in the pool: pure functions of recorded fitness."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from agentlab.records import Genome


@dataclasses.dataclass(frozen=True)
class Ranked:
    """An adapter with what selection looks at."""

    adapter: str
    fitness: float
    genome: Genome


def ranked(members: Iterable[Ranked]) -> list[Ranked]:
    """Best first. Of equal fitness a blend first, an average of siblings that owes less to luck; then the older one,
    so that a newcomer has to be better.
    """
    return sorted(members, key=lambda member: (-member.fitness, member.genome.operator != "blend", member.adapter))


def tournament(rng: np.random.Generator, pool: Sequence[Ranked], size: int) -> Ranked:
    """The best of `size` members drawn without replacement (all of them, if there are fewer)."""
    drawn = rng.choice(len(pool), size=min(size, len(pool)), replace=False)
    return ranked(pool[int(i)] for i in drawn)[0]


def prune(members: Iterable[Ranked], size: int, protected: str) -> tuple[list[str], list[str]]:
    """(kept, culled) ids, best first: the `size` fittest; `protected` (the champion) always stays."""
    order = [member.adapter for member in ranked(members)]
    kept = order[:size]
    if protected in order and protected not in kept:
        kept[-1] = protected
    return kept, [adapter for adapter in order if adapter not in kept]
