import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agentlab import config
from agentlab.evolution.breeding import breed
from agentlab.evolution.selection import Ranked, prune, ranked, tournament

GENOME = breed(config.Settings(name="x"), 0, [], [], 8)[0]
fitnesses = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1), min_size=1, max_size=12)


def members_of(values):
    return [Ranked(f"g000-c{index:02d}", value, GENOME) for index, value in enumerate(values)]


def test_equal_fitness_goes_to_the_older_adapter():
    new, old, best = Ranked("g002-c00", 0.5, GENOME), Ranked("g000-c03", 0.5, GENOME), Ranked("g001-c00", 0.6, GENOME)
    assert ranked([new, old, best]) == [best, old, new]


def test_of_equal_fitness_a_blend_comes_before_the_siblings_that_it_averages():
    blend = GENOME.model_copy(update={"operator": "blend"})
    mixed, sibling, better = Ranked("g001-c02", 0.5, blend), Ranked("g001-c00", 0.5, GENOME), Ranked("g0", 0.6, GENOME)
    assert ranked([sibling, mixed, better]) == [better, mixed, sibling]


def test_of_equal_fitness_the_youngest_continuation_comes_first():
    """It has learned most, and only what is first is continued again."""
    members = [
        Ranked(name, 0.5, GENOME.model_copy(update={"operator": operator, "generation": int(name[1:4])}))
        for name, operator in [
            ("g000-c00", "founder"),
            ("g001-c00", "continuation"),
            ("g002-c02", "blend"),
            ("g002-c00", "continuation"),
            ("g003-c01", "crossover"),
        ]
    ]
    order = ["g002-c00", "g001-c00", "g002-c02", "g000-c00", "g003-c01"]
    assert [member.adapter for member in ranked(members)] == order


@given(fitnesses, st.integers(1, 15), st.integers(0, 2**31))
def test_tournament_gives_the_best_of_what_it_drew(values, size, seed):
    pool = members_of(values)
    winner = tournament(np.random.default_rng(seed), pool, size)
    drawn = np.random.default_rng(seed).choice(len(pool), size=min(size, len(pool)), replace=False)
    assert winner in [pool[i] for i in drawn]
    assert winner.fitness == max(pool[i].fitness for i in drawn)


def test_whole_pool_tournament_is_won_by_the_best_and_small_ones_are_not_always():
    pool = members_of([0.1, 0.9, 0.5, 0.3])
    rng = np.random.default_rng(0)
    assert {tournament(rng, pool, 4).adapter for _ in range(20)} == {"g000-c01"}
    assert {tournament(rng, pool, 1).adapter for _ in range(100)} == {member.adapter for member in pool}
    winners = [tournament(rng, pool, 2).adapter for _ in range(200)]
    assert "g000-c00" not in winners  # the worst of all loses every pairing
    assert winners.count("g000-c01") > winners.count("g000-c02") > winners.count("g000-c03") > 0


@given(fitnesses, st.integers(1, 10), st.data())
def test_prune_keeps_the_best_and_the_champion_and_loses_nobody(values, size, data):
    pool = members_of(values)
    champion = data.draw(st.sampled_from([*(member.adapter for member in pool), "base"]))
    kept, culled = prune(pool, size, champion)
    order = [member.adapter for member in ranked(pool)]
    assert sorted(kept + culled) == sorted(order)
    assert not set(kept) & set(culled)
    assert len(kept) == min(size, len(pool))
    assert champion == "base" or champion in kept
    assert [adapter for adapter in kept if adapter != champion] == [a for a in order if a in kept and a != champion]
    fitness = {member.adapter: member.fitness for member in pool}
    others = [fitness[adapter] for adapter in kept if adapter != champion]
    assert not others or not culled or min(others) >= max(fitness[adapter] for adapter in culled)
    assert kept == sorted(kept, key=order.index)  # best first, the protected one too


def test_a_small_pool_keeps_whoever_is_continued():
    """Blends first, as they often are: two places go to the champion and to the fittest that was trained."""
    blend = GENOME.model_copy(update={"operator": "blend", "steps": 0})
    one, other, trained = (
        Ranked("g001-c02", 0.9, blend),
        Ranked("g002-c02", 0.8, blend),
        Ranked("g002-c00", 0.5, GENOME),
    )
    assert prune([one, other, trained], 2, "g001-c02") == (["g001-c02", "g002-c00"], ["g002-c02"])
    assert prune([one, other, trained], 1, "g002-c02") == (["g002-c02"], ["g001-c02", "g002-c00"])
    assert prune([one, other, trained], 1, "base") == (["g001-c02"], ["g002-c02", "g002-c00"])
    assert prune([one, other, trained], 3, "base")[1] == []
