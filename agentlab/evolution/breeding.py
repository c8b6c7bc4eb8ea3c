"""Genomes of the next generation, decided by (settings, pool, generation, seed) alone: nothing here touches a disk."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from agentlab.config import Settings
from agentlab.evolution.run import adapter_id
from agentlab.evolution.selection import Ranked, to_continue, tournament
from agentlab.records import Genome

# The learning rate alone is worth many points, so founders spread it; the first one has the settings' own.
FOUNDER_RATES = (1.0, 2.0, 0.5, 1.5, 3.0, 0.25, 0.75, 4.0)
# The rate that wins a founder's few steps is too high for the many that its line goes on for (short-horizon bias, Wu et
# al. 2018): the line goes on at half of it, and stays there.
CONTINUED_FOUNDER = 0.5
# The other children try half of their fitter parent's rate and the whole in turn.
CHILD_RATES = (1.0, 0.5)
# A line of descent learns only what its own members were trained on, so the largest share of the steps goes to the
# first child, which carries the fittest line on; the others look with fewer what another way would give.
FIRST_CHILD, OTHER_CHILDREN = 1.85, 0.15
LEAST_STEPS = 8  # of the others: two of Adam's steps without moments only shake what a merge knows
# Later generations learn less of the same training items, and the gate, which sees large gains only, turns most of it
# down: what they trained is lost to the champion. So the first children, whose gain is large, get most of the steps.
FIRST_CHILDREN, LAST_CHILDREN = 1.7, 0.3
LEAST_RATE = 0.125  # of the settings' own: with many generations, halving would end all learning


@dataclasses.dataclass
class _Genes:
    """The part of a genome that mutation may change."""

    learning_rate: float
    steps: int
    rank: int
    dropout: float
    data_mix: dict[str, float]
    merge_weights: list[float]
    weight_noise: float


def breed(
    settings: Settings, generation: int, pool: Sequence[Ranked], groups: Sequence[str], steps: int
) -> list[Genome]:
    """The new candidates of a generation: `size` founders, or `size - elites` children of the pool.

    pool: the adapters that may become parents, best first (empty: founders are bred). groups: of the training items.
    steps: optimiser steps of a candidate in the mean; founders get their share of them.
    """
    if not pool:
        few = max(1, round(steps * share_of_steps(settings, 0)))
        return [founder(settings, generation, index, few) for index in range(settings.population.size)]
    new = settings.population.size - min(settings.population.elites, len(pool))
    steps_of = _shared_out(steps * share_of_steps(settings, generation), new)
    children = [_child(settings, generation, index, pool, groups, steps_of[index]) for index in range(new)]
    line = to_continue(pool)
    if new > 1 and line is not None:  # an only child is no place to give up crossing and mutating
        children[0] = _continuation(settings, generation, line, steps_of[0])
    return children


def _shared_out(mean: float, children: int) -> list[int]:
    """The steps of each child, at least 1, whose sum is what so many of `mean` steps take, but for rounding."""
    least = min(LEAST_STEPS, round(mean))
    share = OTHER_CHILDREN * children / (FIRST_CHILD + OTHER_CHILDREN * (children - 1))
    other = max(1, least, round(mean * share))
    first = max(other, round(mean * children) - other * (children - 1))
    return [first] + [other] * (children - 1)


def blend(settings: Settings, generation: int, newcomers: Sequence[Ranked], bred: int) -> Genome | None:
    """One candidate more: the generation's two best newcomers, merged and not trained; None where that cannot help.

    Siblings of common descent that trained on different items lie in one basin, and their average is often better
    than both (model soups, Wortsman et al. 2022), at the cost of one evaluation. Founders begin at random weights of
    their own: they are not blended. newcomers: those that were evaluated, best first, of `bred`.
    """
    best = [member for member in newcomers if member.genome.parents][:2]
    if not settings.population.blend or len(best) < 2:
        return None
    fitter = best[0].genome
    rank = max(member.genome.rank for member in best)  # at the smaller one a part of the larger would be cut off
    return Genome(
        candidate=adapter_id(generation, bred),
        generation=generation,
        operator="blend",
        parents=[member.adapter for member in best],
        merge_weights=[member.genome.steps / sum(one.genome.steps for one in best) for member in best],
        merge_method="exact",
        rank=rank,
        alpha=settings.lora.alpha * rank / settings.lora.rank,
        dropout=fitter.dropout,
        target_modules=sorted({module for member in best for module in member.genome.target_modules}),
        learning_rate=fitter.learning_rate,
        steps=0,
        batch_size=settings.training.batch_size,
        data_mix=dict(fitter.data_mix),
        weight_noise=0.0,
        mutated=[],
        seed=training_seed(settings, generation, bred),
    )


def share_of_steps(settings: Settings, generation: int) -> float:
    """Steps of a candidate of this generation, in its mean, beside `training.tokens`' own.

    Founders: their share. Children: it falls in a line, 1 in the mean over the whole run.
    """
    last = settings.population.generations - 1
    if generation == 0:
        return settings.training.founder_share if last else 1.0  # where nobody follows, founders are all there is
    if last < 2 or generation > last:
        return 1.0
    return FIRST_CHILDREN + (LAST_CHILDREN - FIRST_CHILDREN) * (generation - 1) / (last - 1)


def rng_for(settings: Settings, generation: int, index: int) -> np.random.Generator:
    """The one source of chance for a candidate's breeding."""
    return np.random.default_rng([settings.seed, generation, index])


def training_seed(settings: Settings, generation: int, index: int) -> int:
    """The seed of a candidate's training, independent of how many draws breeding made."""
    return int(np.random.SeedSequence([settings.seed, generation, index, 1]).generate_state(1)[0] % 2**31)


def founder(settings: Settings, generation: int, index: int, steps: int) -> Genome:
    """A candidate that starts from the base model; the first one has exactly the settings' hyperparameters."""
    rate = settings.training.learning_rate * FOUNDER_RATES[index % len(FOUNDER_RATES)]
    if index >= len(FOUNDER_RATES):
        rate *= 2.0 ** rng_for(settings, generation, index).uniform(-0.5, 0.5)
    return Genome(
        candidate=adapter_id(generation, index),
        generation=generation,
        operator="founder",
        parents=[],
        merge_weights=[],
        merge_method=settings.crossover.method,
        rank=settings.lora.rank,
        alpha=settings.lora.alpha,
        dropout=settings.lora.dropout,
        target_modules=list(settings.lora.target_modules),
        learning_rate=min(1.0, rate),
        steps=steps,
        batch_size=settings.training.batch_size,
        data_mix={},
        weight_noise=0.0,
        mutated=[],
        seed=training_seed(settings, generation, index),
    )


def _continuation(settings: Settings, generation: int, fittest: Ranked, steps: int) -> Genome:
    """The first child of a generation: the training of the fittest goes on as it is, a founder's at half of its rate.

    Exploiting beside exploring (population based training, Jaderberg et al. 2017). Merges of adapters that do not
    share their descent lose most of what both know, and a population that crosses all its lines learns it again.
    """
    slower = CONTINUED_FOUNDER if fittest.genome.operator == "founder" else 1.0
    return fittest.genome.model_copy(
        update={
            "candidate": adapter_id(generation, 0),
            "generation": generation,
            "operator": "continuation",
            "parents": [fittest.adapter],
            "merge_weights": [1.0],
            "merge_method": settings.crossover.method,
            "steps": steps,
            "batch_size": settings.training.batch_size,
            "learning_rate": fittest.genome.learning_rate * slower,
            "data_mix": dict(fittest.genome.data_mix),
            "weight_noise": 0.0,
            "mutated": [],
            "seed": training_seed(settings, generation, 0),
        }
    )


def _child(
    settings: Settings, generation: int, index: int, pool: Sequence[Ranked], groups: Sequence[str], steps: int
) -> Genome:
    rng = rng_for(settings, generation, index)
    first = tournament(rng, pool, settings.population.tournament)
    others = [ranked for ranked in pool if ranked.adapter != first.adapter]
    crossed = bool(others) and rng.random() < settings.population.crossover_rate
    parents = [first, tournament(rng, others, settings.population.tournament)] if crossed else [first]
    fitter = max(parents, key=lambda parent: parent.fitness).genome
    genes = _Genes(
        learning_rate=_child_rate(settings, fitter, index),
        steps=steps,
        rank=fitter.rank,
        dropout=fitter.dropout,
        data_mix=dict(fitter.data_mix),
        merge_weights=_shares(parents),
        weight_noise=0.0,
    )
    mutated = _mutate(genes, settings, rng, groups, forced=not crossed)
    return Genome(
        candidate=adapter_id(generation, index),
        generation=generation,
        operator="crossover" if crossed else "mutation",
        parents=[parent.adapter for parent in parents],
        merge_method=settings.crossover.method,
        # B·A·alpha/rank: alpha follows the rank, so that a learning rate keeps its meaning
        alpha=settings.lora.alpha * genes.rank / settings.lora.rank,
        target_modules=sorted({module for parent in parents for module in parent.genome.target_modules}),
        batch_size=settings.training.batch_size,
        mutated=mutated,
        seed=training_seed(settings, generation, index),
        **dataclasses.asdict(genes),
    )


def _child_rate(settings: Settings, parent: Genome, index: int) -> float:
    """The learning rate of a child, before mutation."""
    least = min(settings.training.learning_rate * LEAST_RATE, parent.learning_rate)
    return max(least, parent.learning_rate * CHILD_RATES[index % len(CHILD_RATES)])


def _shares(parents: Sequence[Ranked]) -> list[float]:
    """Merge weights that sum to 1, in proportion to fitness; one without any still counts for a little."""
    fitness = [max(parent.fitness, 0.05) for parent in parents]
    return [value / sum(fitness) for value in fitness]


def _mutate(
    genes: _Genes, settings: Settings, rng: np.random.Generator, groups: Sequence[str], forced: bool
) -> list[str]:
    """Change each gene with the mutation rate, at least one when `forced` (one parent only); the names changed."""
    names = ["learning_rate", "steps", "dropout"]
    if settings.mutation.weight_noise > 0:
        names.append("weight_noise")
    if settings.crossover.method == "exact" and settings.mutation.max_rank > 1:
        names.append("rank")  # PEFT's methods need parents of equal rank
    if len(groups) > 1:
        names.append("data_mix")
    if len(genes.merge_weights) == 2:
        names.append("merge_weights")
    chosen = [name for name in names if rng.random() < settings.population.mutation_rate]
    if forced and not chosen:
        chosen = [str(rng.choice(names))]
    for name in chosen:
        _change(name, genes, settings, rng, groups)
    return chosen


def _change(gene: str, genes: _Genes, settings: Settings, rng: np.random.Generator, groups: Sequence[str]) -> None:
    """Mutate one gene. A step that would leave its bounds goes the other way, so that it did change."""
    if gene == "learning_rate":
        genes.learning_rate = _scaled(genes.learning_rate, 2.0 ** rng.uniform(-1, 1), 1e-6, 1e-2)
    elif gene == "steps":
        factor = rng.uniform(0.5, 1.5)
        steps = max(1, round(genes.steps * factor))
        genes.steps = steps if steps != genes.steps else steps + (1 if factor > 1 or steps == 1 else -1)
    elif gene == "rank":
        genes.rank = int(_scaled(genes.rank, rng.choice([0.5, 2.0]), 1, settings.mutation.max_rank))
    elif gene == "dropout":
        step = rng.uniform(-0.05, 0.05)
        inside = 0.0 <= genes.dropout + step <= 0.5
        genes.dropout = float(np.clip(genes.dropout + (step if inside else -step), 0.0, 0.5))
    elif gene == "weight_noise":
        genes.weight_noise = settings.mutation.weight_noise
    elif gene == "data_mix":
        group = str(rng.choice(list(groups)))
        weight = genes.data_mix.get(group, 1.0)
        genes.data_mix[group] = round(_scaled(weight, 2.0 ** rng.uniform(-1, 1), 0.05, 20), 3)
    else:
        weight = float(rng.uniform(0.2, 0.8))
        genes.merge_weights = [weight, 1.0 - weight]


def _scaled(value: float, factor: float, low: float, high: float) -> float:
    """value × factor, or value / factor where that would leave low to high; never outside."""
    moved = value * factor if low <= value * factor <= high else value / factor
    return float(np.clip(moved, low, high))
