import pytest
from evolution_helpers import LEARNING, Crash, evolve

from agentlab.errors import SuiteError
from agentlab.evolution import seal
from agentlab.evolution.bench import open_bench
from agentlab.lab import Lab


@pytest.fixture
def champion(tiny_experiment):
    """A run before its last generation, with a champion."""
    lab = Lab.open(tiny_experiment, [*LEARNING, "population.generations=2"])
    evolve(lab, generations=[0])
    assert lab.run.champion() != "base"
    return lab


def compare(lab, emit=lambda event: None, adapter=None):
    adapter = adapter or lab.run.champion()
    with open_bench(lab.run, lab.suite, emit, lambda: False) as bench, bench.loaded(adapter):
        return seal.compare(bench, adapter)


def test_only_the_seal_opens_the_test_split(champion):
    with pytest.raises(SuiteError, match="sealed"):
        champion.suite.split("test")
    assert champion.run.openings() == []
    assert seal.opened_items(champion.run, champion.suite) == []


def test_an_opening_is_written_down_before_an_item_is_read_and_finished_not_repeated(champion):
    lab, order = champion, []

    def emit(event):
        order.append(event.kind)
        if event.kind == "seal_opened":
            assert len(lab.run.openings()) == 1
        if event.kind == "evaluation_progress":
            raise Crash

    with pytest.raises(Crash):
        compare(lab, emit)
    assert order[-2:] == ["seal_opened", "evaluation_progress"]
    assert len(lab.run.openings()) == 1
    assert lab.run.sealed() is None
    assert seal.opened_items(lab.run, lab.suite) == []  # answers first, then they may be shown
    result = compare(lab)
    assert result.openings == 1
    assert len(lab.run.openings()) == 1
    sha256 = lab.run.candidate(lab.run.champion()).weights_sha256
    assert lab.run.openings()[0][1] == result.champion_sha256 == sha256


def test_answers_are_kept_and_not_asked_for_again(champion):
    first = compare(champion)
    assert first.items == champion.suite.test_items == len(first.base.answers) == len(first.champion_score.answers)
    assert first.gain == pytest.approx(first.champion_score.accuracy - first.base.accuracy)
    assert first.gain_ci_low <= first.gain <= first.gain_ci_high
    items = seal.opened_items(champion.run, champion.suite)
    pairs = zip(items, first.champion_score.answers, first.champion_score.item_scores, strict=True)
    assert all(champion.suite.check(item, answer) == score for item, answer, score in pairs)
    events = []
    assert compare(champion, events.append) == first
    assert not {"seal_opened", "evaluated"} & {event.kind for event in events}


def test_another_champion_is_another_opening(champion):
    compare(champion)
    other = next(adapter for adapter in champion.run.result(0).pool if adapter != champion.run.champion())
    assert compare(champion, adapter=other).openings == 2
    assert len(champion.run.openings()) == 2
