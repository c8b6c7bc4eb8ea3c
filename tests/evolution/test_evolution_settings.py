"""Settings whose effect shows in a run as a whole: what is told of a weak champion, and how many threads compute."""

import pytest
import torch
from evolution_helpers import evolve
from test_evolution_gate import score_of

from agentlab.evolution.gate import decide
from agentlab.lab import Lab

SHORT = ["population.size=2", "population.generations=1", "training.steps=1"]


@pytest.fixture
def two_threads():
    """As many as a machine with two cores has, whatever this one has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("threshold", "below"), [(0.7, False), (0.71, True)])
def test_a_champion_below_the_accuracy_threshold_is_promoted_and_that_is_told(
    threshold, below, tiny_experiment, monkeypatch
):
    """Who passes is decided here, because a tiny model's accuracy is what it happens to be."""

    def passed(bench, generation, candidates, champion):
        better, worse = [1.0] * 70 + [0.0] * 30, [1.0] * 30 + [0.0] * 70
        return decide(bench.run.settings, generation, score_of(candidates[0], better), score_of(champion, worse))

    monkeypatch.setattr("agentlab.evolution.generation._gate", passed)
    monkeypatch.setattr("agentlab.evolution.generation._compare_sealed", lambda bench, champion: None)
    lab, events = Lab.open(tiny_experiment, [*SHORT, f"gate.accuracy_threshold={threshold}"]), []
    evolve(lab, events.append)
    (promoted,) = [event for event in events if event.kind == "promoted"]
    assert promoted.below_threshold is below
    assert lab.run.champion() == promoted.adapter


def test_a_run_computes_with_no_more_threads_than_its_budget(tiny_experiment, two_threads):
    lab, seen = Lab.open(tiny_experiment, [*SHORT, "budget.threads=1"]), []
    evolve(lab, lambda event: seen.append(torch.get_num_threads()) if event.kind == "training_started" else None)
    assert set(seen) == {1}


@pytest.mark.parametrize("most", [1, 2])
def test_an_agent_computes_with_no_more_threads_than_its_budget(most, tiny_experiment, two_threads):
    lab = Lab.open(tiny_experiment, [f"budget.threads={most}"])
    with lab.agent("base", remember=False, builtin_tools=False, lease=False):
        assert torch.get_num_threads() == most
