"""The line that goes on: what is kept of its trainings, and what happens when it is gone or damaged. Tiny model."""

import dataclasses

import pytest
import torch
from evolution_helpers import LEARNING, evolve, flip_bytes, lineage, open_copy, weight_hashes
from support import write_tiny_experiment

from agentlab import adapters
from agentlab.lab import Lab
from agentlab.learning.state import TrainingState

OVERRIDES = [*LEARNING, "population.size=3"]


@pytest.fixture(scope="module")
def begun(tiny_model, tmp_path_factory):
    """A run whose first of three generations is finished."""
    lab = Lab.open(write_tiny_experiment(tmp_path_factory.mktemp("begun"), tiny_model), OVERRIDES)
    evolve(lab, generations=[0])
    return lab


def states(run):
    return sorted(path.name for path in (run.folder / "training-states").glob("*"))


def fittest(run, generation):
    """The fittest of the pool that was trained: a blend was not."""
    pool = run.result(generation).pool
    return next(adapter for adapter in pool if run.candidate(adapter).genome.operator != "blend")


def copy_and_damage(begun, folder, damage):
    """(its lab, the file that the next continuation needs), with that file damaged."""
    lab = open_copy(begun.experiment, folder, OVERRIDES)
    evolve(lab, generations=[0])
    path = lab.run.training_state_file(fittest(lab.run, 0))
    damage(path)
    return lab


@pytest.fixture(scope="module")
def finished(begun, tmp_path_factory):
    lab = open_copy(begun.experiment, tmp_path_factory.mktemp("finished"), OVERRIDES)
    seen, trained = [], {}

    def keep(event):
        if event.kind == "trained":
            trained[event.candidate] = adapters.load(lab.run.adapter_folder(event.candidate))

    for generation in range(3):
        evolve(lab, keep, [generation])
        seen.append(states(lab.run))
    return lab, seen, trained


def test_only_the_fittest_ones_training_is_kept_and_none_at_the_end(finished):
    lab, seen, _ = finished
    assert seen == [[f"{fittest(lab.run, 0)}.safetensors"], [f"{fittest(lab.run, 1)}.safetensors"], []]


def test_each_later_generation_continues_the_fittest(finished):
    run = finished[0].run
    for generation in (1, 2):
        first = run.population(generation)[0]
        assert (first.operator, first.parents) == ("continuation", [fittest(run, generation - 1)])
        assert run.candidate(first.candidate).state in ("kept", "culled")


def test_a_short_continuation_is_a_mean_with_its_parents_own_factors(finished):
    """Equal products in other factors, as a merge gives them, would be averaged into something that nobody trained."""
    lab, _, trained = finished
    parent, child = fittest(lab.run, 1), "g002-c00"
    before = sum(lab.run.candidate(name).genome.steps for name in (fittest(lab.run, 0), parent))
    assert lab.run.candidate(child).genome.steps < 0.5 * (before + lab.run.candidate(child).genome.steps)
    for name, factors in trained[parent].modules.items():
        for old, new in zip(factors, trained[child].modules[name], strict=True):
            assert torch.cosine_similarity(old.flatten(), new.flatten(), dim=0) > 0.95


def test_adam_goes_on_counting(begun, tmp_path):
    lab = open_copy(begun.experiment, tmp_path, OVERRIDES)
    evolve(lab, generations=[0])
    parent = fittest(lab.run, 0)
    before = TrainingState.load(lab.run.training_state_file(parent)).steps
    kept = []

    def emit(event):
        if event.kind == "trained" and event.candidate == "g001-c00":
            kept.append(TrainingState.load(lab.run.training_state_file("g001-c00")))

    evolve(lab, emit, [1])
    assert kept[0].steps == before + lab.run.candidate("g001-c00").genome.steps


def test_a_damaged_one_is_warned_about_and_the_run_goes_on(begun, tmp_path):
    lab = copy_and_damage(begun, tmp_path, lambda path: path.write_bytes(path.read_bytes()[:-50]))
    events = []
    evolve(lab, events.append, [1])
    [said] = [event.message for event in events if event.kind == "warned" and "Adam" in event.message]
    assert said.startswith("g001-c00 begins at its parent's weights without Adam's moments")
    assert "damaged" in said
    assert lab.run.result(1) is not None


def test_one_that_is_gone_is_said_and_no_error(begun, tmp_path):
    lab = copy_and_damage(begun, tmp_path, lambda path: path.unlink())
    events = []
    evolve(lab, events.append, [1])
    assert lab.run.candidate("g001-c00").state in ("kept", "culled")
    [said] = [event.message for event in events if event.kind == "warned" and "Adam" in event.message]
    assert said.endswith("is missing")


def test_it_makes_a_difference_and_always_the_same_one(begun, finished, tmp_path):
    again, without = (tmp_path / name for name in ("again", "without"))
    lab = open_copy(begun.experiment, again, OVERRIDES)
    evolve(lab)
    assert lineage(lab.run) == lineage(finished[0].run)
    anew = copy_and_damage(begun, without, lambda path: path.unlink())
    evolve(anew, generations=[1])
    assert weight_hashes(anew.run)["g001-c00"] != weight_hashes(lab.run)["g001-c00"]


def test_weights_that_are_not_averaged_keep_none(begun, tmp_path):
    """At a rate that fell to zero the weights are where they ended, and the next one begins high again."""
    lab = open_copy(begun.experiment, tmp_path, [*OVERRIDES, "training.average=0"])
    evolve(lab, generations=[0])
    assert states(lab.run) == []
    events = []
    evolve(lab, events.append, [1])
    assert not [event for event in events if event.kind == "warned" and "Adam" in event.message]


def test_an_only_child_is_no_continuation_and_nobody_keeps_any(begun, tmp_path):
    lab = open_copy(begun.experiment, tmp_path, [*OVERRIDES, "population.size=2"])
    evolve(lab, generations=[0])
    assert states(lab.run) == []


def test_a_fittest_without_weights_does_not_cost_the_line_its_state_again_and_again(begun, tmp_path):
    lab = open_copy(begun.experiment, tmp_path, [*OVERRIDES, "population.generations=4"])
    evolve(lab, generations=[0])
    flip_bytes(lab.run.adapter_folder(fittest(lab.run, 0)) / "adapter_model.safetensors")
    evolve(lab, generations=[1])  # without Adam's moments: what was kept is that of the damaged one
    assert len(states(lab.run)) == 1
    events = []
    evolve(lab, events.append, [2])
    assert not [event for event in events if event.kind == "warned" and "Adam" in event.message]
    assert lab.run.population(2)[0].operator == "continuation"


def test_a_state_that_cannot_be_written_is_a_warning_and_the_adapter_is_saved(begun, tmp_path):
    lab = open_copy(begun.experiment, tmp_path, OVERRIDES)
    (lab.run.folder).mkdir(parents=True)
    (lab.run.folder / "training-states").write_text("a file where the folder should be")
    events = []
    evolve(lab, events.append, [0])
    assert lab.run.result(0) is not None
    said = [event.message for event in events if event.kind == "warned"]
    assert len([message for message in said if "is not kept" in message]) == 3


def test_a_rate_that_was_lowered_is_told_to_whoever_follows_the_run(begun, tmp_path):
    lab = open_copy(begun.experiment, tmp_path, OVERRIDES)
    evolve(lab, generations=[0])
    path = lab.run.training_state_file(fittest(lab.run, 0))
    state = TrainingState.load(path)
    dataclasses.replace(state, learning_rate=state.learning_rate / 4).save(path)
    events = []
    evolve(lab, events.append, [1])
    assert [event for event in events if event.kind == "warned" and "a remedy had lowered it" in event.message]


def test_tidying_an_earlier_generation_again_leaves_later_ones(begun, tmp_path):
    lab = open_copy(begun.experiment, tmp_path, OVERRIDES)
    evolve(lab, generations=[0])
    expected = states(lab.run)
    later = [lab.run.training_state_file(name) for name in ("g001-c00", "g998-c01")]
    killed = later[0].with_name(".g000-c01.safetensors.abc.tmp")
    by_hand = later[0].with_name("notes.safetensors")
    for path in [*later, killed, by_hand]:
        path.write_bytes(b"x")
    (later[0].parent / ".ipynb_checkpoints").mkdir()
    evolve(lab, generations=[0])
    assert states(lab.run) == sorted([*expected, ".ipynb_checkpoints", *(path.name for path in [*later, by_hand])])
    lab.run.forget_training_states(998, keep="g001-c00")
    assert states(lab.run) == sorted([".ipynb_checkpoints", "g001-c00.safetensors", by_hand.name])
