"""One process on the accelerator: who has it is named, and `lab.release()` gives it up."""

import os
import threading

import pytest

from agentlab import config
from agentlab.errors import DoesNotFitError, LeaseHeldError
from agentlab.hardware.lease import holder
from agentlab.lab import Lab
from agentlab.report.figures import tradeoff
from agentlab.report.summary import timed
from agentlab.report.words import mebibytes

ACCELERATOR = "accelerator.lock"


def who():
    return holder(config.home() / ACCELERATOR)


@pytest.fixture
def lab(tiny_experiment, monkeypatch, tmp_path):
    monkeypatch.setenv("AGENTLAB_HOME", str(tmp_path / "home"))
    found = Lab.open(tiny_experiment)
    yield found
    found.close()


def test_an_agent_holds_the_accelerator_by_name_until_it_is_released(lab):
    agent = lab.agent(remember=False, load=False)
    assert who()["pid"] == os.getpid()
    assert who()["purpose"] == f"the agent of {lab.run.id}"
    assert lab.status()["accelerator"] == who()
    with pytest.raises(LeaseHeldError, match=r"this process holds it itself \(the agent of .*lab\.release\(\)"):
        list(lab.generation(0))
    assert not lab.run.journal.size()
    lab.release()
    assert who() is None
    lab.release()
    agent.close()
    assert lab.status()["accelerator"] is None


def test_a_second_agent_waits_for_the_first(lab):
    lab.agent(remember=False, load=False)
    with pytest.raises(LeaseHeldError, match="the agent of"):
        lab.agent(remember=False, load=False)
    lab.release()
    lab.agent(remember=False, load=False).close()
    assert who() is None


@pytest.fixture
def endless(lab):
    """The same experiment with a training that is longer than the test waits for it."""
    found = Lab.open(lab.experiment, ["training.steps=4000"])
    yield found
    found.close()


def test_release_between_two_events_ends_the_generation_which_can_be_continued(endless):
    events = endless.generation(0)
    assert next(events).kind == "generation_started"
    assert f"generation 0 of {endless.run.id}" == who()["purpose"]
    endless.release()
    assert who() is None
    assert [event.kind for event in events][-1] == "stopped"
    again = endless.generation(0)
    assert next(again).kind == "generation_started"
    assert who()["pid"] == os.getpid()
    again.close()
    assert who() is None


def test_release_from_another_thread_ends_the_generation(endless):
    kinds, begun = [], threading.Event()

    def work():
        for event in endless.generation(0):
            kinds.append(event.kind)
            if event.kind == "training_step":
                begun.set()

    worker = threading.Thread(target=work)
    worker.start()
    assert begun.wait(300)
    endless.release()
    worker.join()
    assert kinds[-1] == "stopped"
    assert who() is None


def test_what_was_planned_lies_beside_what_was_measured(lab):
    assert [event.kind for event in lab.generation(0)][-1] == "generation_finished"
    phases = {phase["name"]: phase for phase in lab.run.plan()["models"][0]["phases"]}
    measured_mib = max(candidate.score.ram_peak_mib for candidate in lab.run.candidates() if candidate.score)
    assert phases["evaluate"]["fits"]
    assert 0.3 < measured_mib / (phases["evaluate"]["total_bytes"] / 2**20) < 3
    assert lab.run.planned_mib()["evaluate"] == phases["evaluate"]["total_bytes"] / 2**20
    trained = [candidate.training.ram_peak_mib for candidate in lab.run.candidates() if candidate.genome.steps]
    assert 0.3 < max(trained) / lab.run.planned_mib()["train"] < 3
    summary = lab.summary()
    assert "planned beforehand" in summary
    measured_mib = max(measured_mib, *(timed(lab.run, name).ram_peak_mib for name in ("base", lab.run.champion())))
    said = f"{mebibytes(measured_mib)} to evaluate, {mebibytes(max(trained))} to train"
    assert f"measured at most      {said}" in summary
    table = lab.results()
    assert sorted(table["train_ram_peak_mib"]) == sorted(trained)
    assert "planned)" in tradeoff(lab.run).to_json()


def test_what_does_not_fit_is_refused_before_anything_is_loaded(lab, monkeypatch):
    tight = Lab.open(lab.experiment, ["budget.ram_fraction=1.0e-6"])
    for attempt in (lambda: list(tight.evolve()), lambda: list(tight.generation(0))):
        with pytest.raises(DoesNotFitError, match=r"does not fit at fp32: .*budget\.ram_fraction"):
            attempt()
    assert not tight.run.folder.exists()
    assert who() is None


def test_a_model_whose_shape_cannot_be_planned_runs_with_a_warning(lab, monkeypatch):
    monkeypatch.setattr("agentlab.hardware.shape._EXPERTS", ("hidden_size",))  # as if it were a mixture of experts
    events = lab.generation(0)
    first = next(events)
    assert first.kind == "warned"
    assert "memory is not planned: " in first.message
    assert next(events).kind == "generation_started"
    events.close()
    assert lab.run.plan() is None
    assert who() is None


def test_a_run_on_a_quantized_rung_trains_scores_and_stays_on_it(lab):
    quantized = Lab.open(lab.experiment, ["model.rung=nf4", "population.size=2"])
    finished = list(quantized.generation(0))[-1]
    assert finished.kind == "generation_finished"
    trained = [quantized.run.candidate(f"g000-c0{index}") for index in range(2)]
    assert all(candidate.state in ("kept", "culled") and candidate.training.losses for candidate in trained)
    assert quantized.run.rung() == "nf4"
    assert quantized.run.plan()["models"][0]["rung"] == "nf4"
