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
    """Best first. Of equal fitness the youngest continuation, which has learned most; then a blend, an average of
    siblings that owes less to luck; then the older one, so that a newcomer has to be better.
    """
    return sorted(members, key=_order)


def _order(member: Ranked) -> tuple[float, int, int, str]:
    operator, generation = member.genome.operator, member.genome.generation
    if operator == "continuation":
        return -member.fitness, 0, -generation, member.adapter
    return -member.fitness, 1 if operator == "blend" else 2, 0, member.adapter


def tournament(rng: np.random.Generator, pool: Sequence[Ranked], size: int) -> Ranked:
    """The best of `size` members drawn without replacement (all of them, if there are fewer)."""
    drawn = rng.choice(len(pool), size=min(size, len(pool)), replace=False)
    return ranked(pool[int(i)] for i in drawn)[0]


def to_continue(pool: Iterable[Ranked]) -> Ranked | None:
    """Whose training goes on: the fittest of the pool (best first) that was trained. A blend was not: its parents were,
    and begun again at its weights, without Adam's moments, training shakes what they know.
    """
    return next((member for member in pool if member.genome.steps), None)


def prune(members: Iterable[Ranked], size: int, champion: str) -> tuple[list[str], list[str]]:
    """(kept, culled) ids, best first: the `size` fittest. The champion always stays, and with room for two whoever is
    continued: a small pool would otherwise hold blends alone.
    """
    everybody = ranked(members)
    order = [member.adapter for member in everybody]
    line = to_continue(everybody) if size > 1 else None
    stay = list(dict.fromkeys(name for name in (champion, line and line.adapter) if name in order))
    rest = [adapter for adapter in order if adapter not in stay]
    chosen = {*stay, *rest[: size - len(stay)]}
    return [adapter for adapter in order if adapter in chosen], [a for a in order if a not in chosen]
