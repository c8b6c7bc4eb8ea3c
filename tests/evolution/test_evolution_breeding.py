import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentlab import config
from agentlab.evolution.breeding import CHILD_RATES, CONTINUED_FOUNDER, FOUNDER_RATES, _shared_out, blend, breed
from agentlab.evolution.selection import Ranked, ranked

GROUPS = ["add", "multiply", "none"]
STEPS = 8
GENES = ("learning_rate", "steps", "rank", "dropout", "data_mix", "merge_weights", "weight_noise")


def settings_of(seed=7, size=4, elites=1, crossover_rate=0.7, mutation_rate=0.1, method="exact", **sections):
    population = {
        "size": size,
        "elites": elites,
        "crossover_rate": crossover_rate,
        "mutation_rate": mutation_rate,
    }
    values = {"name": "x", "seed": seed, "population": population, "crossover": {"method": method}, **sections}
    return config.from_mapping(values, "test")


def pool_of(chosen, fitnesses=(0.9, 0.4, 0.6, 0.2)):
    """Founders with made-up scores, best first."""
    founders = breed(
        chosen.model_copy(update={"population": config.PopulationSettings(size=len(fitnesses))}), 0, [], [], STEPS
    )
    return ranked(Ranked(g.candidate, f, g) for g, f in zip(founders, fitnesses, strict=True))


def shared_out(new, generation):
    """The steps of so many children of a run of three generations: a long one, and the others short."""
    mean = STEPS * {1: 1.7, 2: 0.3}.get(generation, 1)
    few = max(1, min(8, round(mean)), round(mean * new * 0.15 / (1.85 + 0.15 * (new - 1))))
    return [max(few, round(mean * new) - few * (new - 1))] + [few] * (new - 1)


def test_children_share_their_steps_out_and_the_sum_stays():
    chosen = settings_of(mutation_rate=0.0, crossover_rate=1.0, size=5)
    first, second = (
        [genome.steps for genome in breed(chosen, generation, pool_of(chosen), GROUPS, STEPS)] for generation in (1, 2)
    )
    assert (first, second) == ([30, 8, 8, 8], [4, 2, 2, 2])  # too few steps would only shake a merge
    alone = settings_of(mutation_rate=0.0, crossover_rate=1.0, size=2)
    assert [genome.steps for genome in breed(alone, 1, pool_of(alone), GROUPS, STEPS)] == [round(1.7 * STEPS)]


@pytest.mark.parametrize("generations", [1, 2, 3, 4, 7, 1000])
def test_the_first_children_get_most_steps_and_a_whole_run_as_many_as_ever(generations):
    chosen = settings_of(mutation_rate=0.0, crossover_rate=1.0, size=3)
    chosen = chosen.model_copy(update={"population": chosen.population.model_copy(update={"generations": generations})})
    pool = pool_of(chosen)
    totals = [sum(g.steps for g in breed(chosen, k, pool, GROUPS, 200)) for k in range(1, generations)]
    assert totals == sorted(totals, reverse=True)
    assert sum(totals) == pytest.approx(2 * 200 * (generations - 1), rel=0.01)
    assert generations < 3 or totals[0] == pytest.approx(17 / 3 * totals[-1], rel=0.01)
    beyond = breed(chosen, generations + 5, pool, GROUPS, 200)  # nobody plans it, and it breaks nothing
    assert sum(genome.steps for genome in beyond) == 400


@given(st.floats(0.4, 3000), st.integers(1, 98))
def test_steps_are_shared_out_without_a_rest(mean, children):
    first, *others = _shared_out(mean, children)
    assert len(others) == children - 1
    assert first >= max(others, default=1) >= min(others, default=1) >= 1
    assert first + sum(others) == pytest.approx(max(children, mean * children), abs=children / 2 + 1)


def test_founders_that_nobody_follows_are_trained_in_full():
    chosen = settings_of(population={"size": 3, "generations": 1})
    assert [genome.steps for genome in breed(chosen, 0, [], [], 20)] == [20, 20, 20]


def explorers(genomes):
    """The children that are crossed or mutated: all but the first, which carries the fittest line on."""
    return [genome for genome in genomes if genome.operator != "continuation"]


def test_the_first_of_several_children_carries_the_fittest_line_on():
    for seed in range(20):
        chosen = settings_of(seed=seed, mutation_rate=1.0, crossover_rate=1.0)
        pool = pool_of(chosen)
        first, *others = breed(chosen, 2, pool, GROUPS, STEPS)
        assert (first.operator, first.parents, first.merge_weights) == ("continuation", [pool[0].adapter], [1.0])
        assert first.mutated == []
        assert first.steps == shared_out(3, 2)[0]
        inherits = ("rank", "alpha", "dropout", "data_mix", "target_modules")
        assert all(getattr(first, gene) == getattr(pool[0].genome, gene) for gene in inherits)
        assert first.learning_rate == pool[0].genome.learning_rate / 2  # a founder's: what wins few steps is too high
        assert first.seed != pool[0].genome.seed  # other items, in another order
        assert all(child.operator == "crossover" for child in others)


def test_a_blend_is_not_continued_but_the_fittest_that_was_trained():
    chosen = settings_of(size=3)
    pool = pool_of(chosen)
    mixed = blend(chosen, 1, ranked(Ranked(g.candidate, 0.5, g) for g in breed(chosen, 1, pool, GROUPS, STEPS)), 2)
    first = breed(chosen, 2, [Ranked(mixed.candidate, 0.95, mixed), *pool], GROUPS, STEPS)[0]
    assert first.parents == [pool[0].adapter]
    alone = breed(chosen, 2, [Ranked(mixed.candidate, 0.95, mixed)], GROUPS, STEPS)[0]
    assert (alone.operator, alone.parents) == ("mutation", [mixed.candidate])  # nobody's training is there to go on


def inherited(genome, pool, chosen):
    """The genes that the child had before mutation."""
    by_id = {member.adapter: member for member in pool}
    parents = [by_id[parent] for parent in genome.parents]
    fitter = max(parents, key=lambda member: member.fitness).genome
    index = int(genome.candidate[-2:])
    slower = CONTINUED_FOUNDER if genome.operator == "continuation" else CHILD_RATES[index % len(CHILD_RATES)]
    return {  # the pools here are of founders
        "learning_rate": fitter.learning_rate * slower,
        "steps": shared_out(chosen.population.size - chosen.population.elites, genome.generation)[index],
        "rank": fitter.rank,
        "dropout": fitter.dropout,
        "data_mix": fitter.data_mix,
        "merge_weights": [parent.fitness / sum(p.fitness for p in parents) for parent in parents],
        "weight_noise": 0.0,
    }


def test_rates_are_kept_or_halved_and_never_vanish():
    chosen = settings_of(size=3)
    rate = chosen.training.learning_rate
    best = pool_of(chosen)[0]
    for generation in range(1, 9):
        before = best.genome.learning_rate
        keeps, settles = breed(chosen, generation, [best], [], STEPS)
        assert keeps.learning_rate == (before / 2 if best.genome.operator == "founder" else before)
        line = breed(chosen, generation + 1, [Ranked(keeps.candidate, 0.9, keeps)], [], STEPS)[0]
        assert (line.operator, line.learning_rate) == ("continuation", keeps.learning_rate)
        if "learning_rate" not in settles.mutated:
            assert settles.learning_rate == max(before / 2, min(before, rate / 8))
        best = Ranked(settles.candidate, 0.9, settles)
    assert best.genome.learning_rate >= 1e-6


all_settings = st.builds(
    settings_of,
    seed=st.integers(0, 2**31 - 1),
    size=st.integers(2, 12),
    elites=st.integers(0, 1),
    crossover_rate=st.sampled_from([0.0, 0.5, 1.0]),
    mutation_rate=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    method=st.sampled_from(["exact", "linear", "ties", "svd", "dare_ties"]),
    lora=st.builds(
        lambda rank, alpha, dropout: {"rank": rank, "alpha": alpha, "dropout": dropout},
        st.integers(1, 64),
        st.sampled_from([1.0, 16.0, 32.0]),
        st.sampled_from([0.0, 0.1, 0.5]),
    ),
    training=st.builds(
        lambda steps, rate: {"steps": steps, "learning_rate": rate},
        st.integers(1, 9),
        st.sampled_from([1e-6, 5e-4, 1e-2, 0.5]),
    ),
    mutation=st.builds(
        lambda noise, rank: {"weight_noise": noise, "max_rank": rank}, st.sampled_from([0.0, 0.02]), st.just(64)
    ),
)


@settings(max_examples=60, deadline=None)
@given(all_settings, st.integers(1, 120))
def test_every_child_is_well_formed(chosen, generation):
    pool = pool_of(chosen)
    genomes = breed(chosen, generation, pool, GROUPS, STEPS)
    assert genomes == breed(chosen, generation, pool, GROUPS, STEPS)  # pure
    assert len(genomes) == chosen.population.size - chosen.population.elites
    by_id = {member.adapter: member.genome for member in pool}
    ids = [genome.candidate for genome in genomes]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"g\d{3}-c\d{2}", name) for name in ids)
    for genome in genomes:
        alone = "continuation" if len(genomes) > 1 and genome is genomes[0] else "mutation"
        assert genome.operator == ("crossover" if len(genome.parents) == 2 else alone)
        assert len(set(genome.parents)) == len(genome.parents) == len(genome.merge_weights)
        assert set(genome.parents) <= set(by_id)
        assert sum(genome.merge_weights) == pytest.approx(1)
        assert all(weight > 0 for weight in genome.merge_weights)
        assert 1 <= genome.rank <= chosen.mutation.max_rank
        assert genome.alpha / genome.rank == pytest.approx(chosen.lora.alpha / chosen.lora.rank)
        assert 0 <= genome.dropout <= 0.5
        assert genome.steps >= 1
        assert 0 < genome.learning_rate <= 1
        assert set(genome.data_mix) <= set(GROUPS)
        assert all(weight > 0 for weight in genome.data_mix.values())
        before = inherited(genome, pool, chosen)
        changed = [gene for gene in GENES if getattr(genome, gene) != before[gene]]
        assert sorted(changed) == sorted(genome.mutated)  # what is called mutated did change, and nothing else
        assert genome.mutated or genome.operator != "mutation"
        if chosen.crossover.method != "exact":
            assert genome.rank == chosen.lora.rank  # PEFT's methods need equal ranks


def test_breeding_depends_on_seed_generation_and_index():
    chosen = settings_of(size=6, mutation_rate=1.0)
    pool = pool_of(chosen)
    told_apart = [
        breed(chosen, 1, pool, GROUPS, STEPS)[1],
        breed(chosen, 1, pool, GROUPS, STEPS)[2],
        breed(chosen, 2, pool, GROUPS, STEPS)[1],
        breed(settings_of(seed=8, size=6, mutation_rate=1.0), 1, pool, GROUPS, STEPS)[1],
    ]
    for one, other in itertools.combinations(told_apart, 2):
        assert one.seed != other.seed
        assert one.learning_rate != other.learning_rate


def test_a_candidate_is_the_same_in_a_larger_population_but_for_its_steps():
    pool = pool_of(settings_of())
    few, many = (
        [genome.model_copy(update={"steps": 0}) for genome in breed(settings_of(size=size), 3, pool, GROUPS, STEPS)]
        for size in (3, 9)
    )
    assert many[: len(few)] == few


def test_training_seeds_of_a_long_run_are_all_different():
    chosen = settings_of(size=10)
    pool = pool_of(chosen)
    seeds = [genome.seed for k in range(1, 40) for genome in breed(chosen, k, pool, GROUPS, STEPS)]
    seeds += [genome.seed for genome in breed(chosen, 0, [], GROUPS, STEPS)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_founders_spread_the_learning_rate_around_the_settings_own():
    founders = breed(settings_of(size=12), 0, [], GROUPS, STEPS)
    rate = settings_of().training.learning_rate
    assert len(founders) == 12  # elites are nobody's yet
    assert founders[0].learning_rate == rate
    assert [founder.learning_rate / rate for founder in founders[:8]] == pytest.approx(list(FOUNDER_RATES))
    assert len({founder.learning_rate for founder in founders}) == 12
    assert all(rate / 8 < founder.learning_rate < rate * 8 for founder in founders)
    assert all(f.operator == "founder" and f.parents == f.merge_weights == f.mutated == [] for f in founders)


def test_founders_never_exceed_the_largest_learning_rate():
    founders = breed(settings_of(size=8, training={"learning_rate": 0.9}), 0, [], GROUPS, STEPS)
    assert max(founder.learning_rate for founder in founders) == 1.0


def children(generations=30, **changes):
    chosen = settings_of(size=5, **changes)
    pool = pool_of(chosen)
    return [genome for k in range(1, generations) for genome in explorers(breed(chosen, k, pool, GROUPS, STEPS))]


def test_crossover_rate_is_honoured():
    assert {genome.operator for genome in children(crossover_rate=0.0)} == {"mutation"}
    assert {genome.operator for genome in children(crossover_rate=1.0)} == {"crossover"}
    found = [genome.operator for genome in children(200, crossover_rate=0.7)]
    assert 0.63 < found.count("crossover") / len(found) < 0.77  # 3 standard errors are 0.05


def test_mutation_rate_is_honoured():
    assert all(genome.mutated == [] for genome in children(mutation_rate=0.0, crossover_rate=1.0))
    assert all(len(genome.mutated) == 1 for genome in children(mutation_rate=0.0, crossover_rate=0.0))
    assert all(len(genome.mutated) == 7 for genome in children(mutation_rate=1.0, crossover_rate=1.0))
    found = children(200, mutation_rate=0.1, crossover_rate=1.0)
    assert 0.08 < sum(len(genome.mutated) for genome in found) / (7 * len(found)) < 0.12


def test_every_gene_is_forced_sometimes():
    forced = [genome.mutated[0] for genome in children(80, mutation_rate=0.0, crossover_rate=0.0)]
    assert set(forced) == set(GENES) - {"merge_weights"}


def test_merge_weights_follow_fitness_and_mutate_within_reason():
    chosen = settings_of(mutation_rate=0.0, crossover_rate=1.0, size=9)
    shares = {"g000-c00": 0.9, "g000-c01": 0.3}
    pool = pool_of(chosen, tuple(shares.values()))
    for genome in explorers(breed(chosen, 1, pool, GROUPS, STEPS)):
        assert genome.merge_weights == pytest.approx([shares[parent] / 1.2 for parent in genome.parents])
    for luckless in ((0.0, 0.0), (-0.1, -0.3)):  # no fitness at all: half and half
        family = explorers(breed(chosen, 1, pool_of(chosen, luckless), GROUPS, STEPS))
        assert {tuple(genome.merge_weights) for genome in family} == {(0.5, 0.5)}
    mutants = children(mutation_rate=1.0, crossover_rate=1.0)
    assert all(0.2 <= weight <= 0.8 for genome in mutants for weight in genome.merge_weights)


def test_one_group_leaves_nothing_to_mix():
    chosen = settings_of(size=8, mutation_rate=1.0)
    assert all("data_mix" not in genome.mutated for genome in breed(chosen, 1, pool_of(chosen), ["all"], STEPS))


def test_a_pool_of_one_breeds_by_mutation():
    chosen = settings_of(crossover_rate=1.0)
    genomes = breed(chosen, 1, pool_of(chosen)[:1], GROUPS, STEPS)
    assert {genome.operator for genome in explorers(genomes)} == {"mutation"}


def test_an_only_child_is_crossed_or_mutated():
    alone = [breed(settings_of(seed=seed, size=2), 1, pool_of(settings_of()), GROUPS, STEPS) for seed in range(20)]
    assert {genome.operator for [genome] in alone} == {"crossover", "mutation"}


def test_children_spread_around_their_fitter_parents_rate():
    chosen = settings_of(mutation_rate=0.0, crossover_rate=1.0, size=5)
    pool = pool_of(chosen, (0.9, 0.1))
    rate = pool[0].genome.learning_rate
    found = [genome.learning_rate for genome in breed(chosen, 1, pool, GROUPS, STEPS)]
    assert found == pytest.approx([rate / 2, rate / 2, rate, rate / 2])  # the first continues a founder


def test_a_blend_is_the_two_best_newcomers_by_their_steps_without_training():
    chosen = settings_of(size=5, crossover_rate=1.0, mutation_rate=0.0)
    family = breed(chosen, 3, pool_of(chosen), GROUPS, STEPS)
    newcomers = ranked(Ranked(g.candidate, f, g) for g, f in zip(family, (0.2, 0.9, 0.5, 0.7), strict=True))
    mixed = blend(chosen, 3, newcomers, len(family))
    assert (mixed.operator, mixed.parents, mixed.merge_weights) == ("blend", ["g003-c01", "g003-c03"], [0.5, 0.5])
    assert (mixed.candidate, mixed.steps, mixed.generation) == ("g003-c04", 0, 3)
    assert mixed == blend(chosen, 3, newcomers, len(family))
    ranks = (4, 32, 8, 8)
    wide = [
        replace(one, genome=one.genome.model_copy(update={"rank": r})) for one, r in zip(newcomers, ranks, strict=True)
    ]
    mixed_ranks = blend(chosen, 3, wide, len(family))
    assert (mixed_ranks.rank, mixed_ranks.alpha) == (32, 64.0)  # nothing of either is cut off
    # whoever failed keeps its id
    assert blend(chosen, 3, newcomers[:2], len(family)).candidate == "g003-c04"
    # its children are trained again
    pool = ranked([Ranked(mixed.candidate, 1.0, mixed), *newcomers])
    heirs = [genome for genome in breed(chosen, 4, pool, GROUPS, STEPS) if mixed.candidate in genome.parents]
    assert heirs
    assert all(genome.steps > 0 for genome in heirs)


def test_founders_and_single_children_are_not_blended():
    chosen = settings_of(size=4)
    assert blend(chosen, 0, pool_of(chosen), 4) is None
    child = breed(chosen, 1, pool_of(chosen), GROUPS, STEPS)[0]
    assert blend(chosen, 1, [Ranked(child.candidate, 1.0, child)], 3) is None
    off = chosen.model_copy(update={"population": chosen.population.model_copy(update={"blend": False})})
    assert blend(off, 1, [Ranked(g.candidate, 0.5, g) for g in breed(off, 1, pool_of(off), GROUPS, STEPS)], 3) is None


def test_genes_stay_in_bounds_over_many_generations():
    chosen = settings_of(size=6, mutation_rate=1.0, mutation={"max_rank": 24})
    pool = pool_of(chosen)
    for k in range(1, 60):
        genomes = breed(chosen, k, pool, GROUPS, STEPS)
        assert all(1 <= genome.rank <= 24 and 1e-6 <= genome.learning_rate <= 1e-2 for genome in genomes)
        assert all(0.05 <= weight <= 20 for genome in genomes for weight in genome.data_mix.values())
        pool = ranked(Ranked(genome.candidate, index / 10, genome) for index, genome in enumerate(genomes))
