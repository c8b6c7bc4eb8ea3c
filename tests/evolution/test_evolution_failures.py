"""A candidate that fails is a result; the generation goes on with the others."""

import pytest
from evolution_helpers import LEARNING, Crash, evolve, flip_bytes

from agentlab.errors import RunError
from agentlab.events import TrainingStarted
from agentlab.lab import Lab


def failures(run):
    return {c.genome.candidate: c.reason for c in run.candidates() if c.state == "failed"}


def test_founders_that_cannot_train_fail_and_the_others_go_on(tiny_experiment):
    """Each trains on a single item; those that drew one of two digits find it too long."""
    one_item = ["training.steps=1", "training.batch_size=1", "training.max_length=64", "population.size=6"]
    lab, events = Lab.open(tiny_experiment, one_item), []
    evolve(lab, events.append, [0])
    failed = failures(lab.run)
    assert failed
    assert len(failed) < 6
    assert all("longer than training.max_length = 64 tokens" in reason for reason in failed.values())
    told = {event.candidate: event.reason for event in events if event.kind == "candidate_failed"}
    assert told == failed
    result = lab.run.result(0)
    assert not set(failed) & set(result.pool + result.culled)
    assert len(result.pool + result.culled) == 6 - len(failed)
    assert set(failed) < set(result.members)  # the record says that they competed
    evolve(lab, generations=[1])  # parents are survivors only
    assert not set(failed) & {parent for genome in lab.run.population(1) for parent in genome.parents}


def test_a_child_that_diverges_fails_and_the_others_go_on(tiny_experiment):
    """One child's genome asks for a learning rate that throws away what its parents learned."""
    lab = Lab.open(tiny_experiment, ["training.steps=40", "training.max_remedies=0", "lora.dropout=0.0"])
    evolve(lab, generations=[0])

    def crash_when_bred(event):
        if event.kind == "training_started":
            raise Crash

    with pytest.raises(Crash):
        evolve(lab, crash_when_bred, [1])
    first, second = lab.run.population(1)  # the first goes on at no higher a rate than its parent ended with
    lab.run.save_population(1, [first, second.model_copy(update={"learning_rate": 1.0})])
    evolve(lab, generations=[1])
    failed = failures(lab.run)
    assert list(failed) == ["g001-c01"]
    assert "divergence: loss rose from" in failed["g001-c01"]
    assert "(after 0 remedies)" in failed["g001-c01"]
    assert lab.run.candidate("g001-c00").state in ("kept", "culled")


def test_when_all_fail_the_reasons_are_named(tiny_experiment):
    lab = Lab.open(tiny_experiment, ["training.max_length=16"])
    with pytest.raises(RunError, match=r"no candidate of generation 0 survived: g000-c00: every .* g000-c02: every"):
        evolve(lab, generations=[0])
    assert lab.run.result(0) is None
    with pytest.raises(RunError, match="no candidate of generation 0 survived"):  # and it stays so
        evolve(lab, generations=[0])


def test_weights_broken_before_evaluation_fail_that_candidate_alone(tiny_experiment):
    lab = Lab.open(tiny_experiment, LEARNING)
    weights = lab.run.adapter_folder("g000-c01") / "adapter_model.safetensors"

    def emit(event):
        if event.kind == "trained" and event.candidate == "g000-c03":
            flip_bytes(weights)

    evolve(lab, emit, [0])
    failed = failures(lab.run)
    assert list(failed) == ["g000-c01"]
    assert str(weights) in failed["g000-c01"]
    assert "sha256 differs" in failed["g000-c01"]
    assert "g000-c01" not in lab.run.result(0).pool


def test_a_child_of_broken_weights_fails_and_the_others_go_on(tiny_experiment):
    lab = Lab.open(
        tiny_experiment, [*LEARNING, "population.size=7", "population.crossover_rate=0.0", "population.tournament=1"]
    )
    evolve(lab, generations=[0])
    broken, started = [], []

    def emit(event):
        if event.kind == "bred" and not broken:  # the population is decided; now a disk goes bad
            parents = [genome.parents[0] for genome in lab.run.population(1)]
            assert len(set(parents)) > 1
            broken.append(parents[0])
            flip_bytes(lab.run.adapter_folder(parents[0]) / "adapter_model.safetensors")
        if isinstance(event, TrainingStarted):
            started.append(event.candidate)

    elite = lab.run.result(0).pool[0]
    evolve(lab, emit, [1])
    children = lab.run.population(1)
    orphans = {genome.candidate for genome in children if broken[0] in genome.parents}
    assert set(failures(lab.run)) == orphans
    assert len(orphans) < len(children)
    assert all(broken[0] in reason and "sha256 differs" in reason for reason in failures(lab.run).values())
    assert set(started) == {genome.candidate for genome in children} - orphans  # nothing to begin with, no training
    assert elite in lab.run.result(1).members


def test_who_lost_its_weights_becomes_no_parent_and_costs_the_generation_nothing(tiny_experiment):
    """The fittest's were damaged between two generations: its line would fail in each later one."""
    lab = Lab.open(tiny_experiment, LEARNING)
    evolve(lab, generations=[0])
    fittest, second, *_ = lab.run.result(0).pool
    flip_bytes(lab.run.adapter_folder(fittest) / "adapter_model.safetensors")
    events = []
    evolve(lab, events.append, [1])
    [said] = [event.message for event in events if event.kind == "warned" and "no parent" in event.message]
    assert said.startswith(f"{fittest} becomes no parent: ")
    assert "sha256 differs" in said
    children = lab.run.population(1)
    assert children[0].parents == [second]
    assert not any(fittest in genome.parents for genome in children)
    assert failures(lab.run) == {}


def test_an_elite_that_lost_its_weights_challenges_nobody(tiny_experiment):
    """It was never measured on the gate's items, and now nothing can be: the generation goes on without it."""
    lab = Lab.open(tiny_experiment, [*LEARNING, "population.elites=2"])
    evolve(lab, generations=[0])
    lost = next(adapter for adapter in lab.run.result(0).pool[:2] if adapter != lab.run.result(0).champion)
    flip_bytes(lab.run.adapter_folder(lost) / "adapter_model.safetensors")
    evolve(lab, generations=[1])
    result = lab.run.result(1)
    assert lost not in result.members
    assert lost != result.champion


def test_a_pool_without_any_weights_is_said_before_anything_is_trained(tiny_experiment):
    lab = Lab.open(tiny_experiment, LEARNING)
    evolve(lab, generations=[0])
    for adapter in lab.run.result(0).pool:
        (lab.run.adapter_folder(adapter) / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="no adapter of the pool after generation 0 has its weights"):
        evolve(lab, generations=[1])


def test_a_changed_model_is_refused(tiny_experiment, tmp_path):
    lab = Lab.open(tiny_experiment, LEARNING)
    evolve(lab, generations=[0])
    path = lab.run.folder / "model.json"
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "00'))
    with pytest.raises(RunError, match="has changed since run"):
        evolve(lab, generations=[1])
