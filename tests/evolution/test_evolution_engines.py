"""Runs whose scores come from another engine than the one that learns."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from evolution_helpers import evolve
from support import write_suite, write_tiny_model

from agentlab import inference
from agentlab.errors import AgentlabError, RunError
from agentlab.events import Warned
from agentlab.evolution.bench import open_bench
from agentlab.evolution.engines import Engines
from agentlab.evolution.generation import run_generation
from agentlab.inference import OutOfMemoryError, vllm_build
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.lab import Lab
from agentlab.learning import sft
from agentlab.models import ModelFiles


def test_scores_of_one_engine_are_not_continued_with_another(tiny_experiment):
    lab = Lab.open(tiny_experiment, ["population.generations=2"])
    evolve(lab, generations=[0])
    record = lab.run.folder / "model.json"
    known = json.loads(record.read_text())
    assert known["engine"] == "transformers"
    scores = [candidate.score for candidate in lab.run.candidates()]
    assert {score.engine for score in scores} == {"transformers"}
    vllm = lab.run.settings.model_copy(update={"model": lab.run.settings.model.model_copy(update={"engine": "vllm"})})
    other = type(lab.run)(lab.run.root, vllm, lab.run.run_hash, lab.run.suite_folder)
    with pytest.raises(RunError, match=r"are those of the engine transformers, not of vllm.*set model\.engine"):
        run_generation(other, lab.suite, 1, lambda event: None)
    assert Lab.open(tiny_experiment, ["model.engine=vllm"]).run.run_hash != lab.run.run_hash


def test_a_run_begun_before_engines_were_recorded_goes_on(tiny_experiment):
    lab = Lab.open(tiny_experiment, ["population.generations=2"])
    evolve(lab, generations=[0])
    record = lab.run.folder / "model.json"
    known = json.loads(record.read_text())
    del known["engine"]
    record.write_text(json.dumps(known))
    evolve(lab, generations=[1])
    assert lab.run.result(1) is not None


def test_nothing_is_learned_on_a_server(tiny_experiment):
    lab = Lab.open(tiny_experiment, ["model.engine=openai", "model.base_url=http://127.0.0.1:9/v1"])
    for begin in (lambda: evolve(lab, generations=[0]), lambda: next(lab.evolve())):
        with pytest.raises(RunError, match="'openai' only answers"):
            begin()


def test_what_a_gpu_needs_to_compile_kernels_is_asked_for_before_anything_is_loaded(tiny_experiment, monkeypatch):
    monkeypatch.setattr("agentlab.hardware.monitor.accelerator", lambda: "cuda")
    monkeypatch.setattr("agentlab.hardware.compiler.missing", lambda: "Python's C headers")
    lab = Lab.open(tiny_experiment)
    with pytest.raises(AgentlabError, match="Python's C headers is missing; install it"):
        next(lab.evolve())
    assert not (lab.run.folder / "model.json").exists()


def vllm_that_does_not_start(monkeypatch):
    opened = []

    def open_engine(settings, model, name, rung):
        opened.append((name, settings.budget.vram_gib))
        if name == "vllm":
            raise OutOfMemoryError("vLLM cannot load tiny: Free memory is less than desired")
        return real(settings, model, name, rung)

    real = inference.open_engine
    monkeypatch.setattr(inference, "open_engine", open_engine)
    monkeypatch.setattr("agentlab.evolution.bench.choose_engine", lambda settings, model: "vllm")
    return opened


def test_where_the_vllm_that_auto_chose_does_not_start_transformers_scores_the_run(tiny_experiment, monkeypatch):
    opened = vllm_that_does_not_start(monkeypatch)
    monkeypatch.setattr("agentlab.evolution.bench._PREDECESSOR_S", 0.0)
    lab = Lab.open(tiny_experiment, ["budget.vram_gib=5.0", "budget.context_gib=0.5"])
    events = []
    evolve(lab, events.append, generations=[0])
    assert opened[:2] == [("vllm", 4.5)] * 2  # who trains in between keeps a context
    (warned,) = [event for event in events if isinstance(event, Warned) and "vLLM" in event.message]
    assert "transformers scores this run, because vLLM cannot: vLLM cannot load tiny" in warned.message
    assert lab.run.model().engine == "transformers"
    assert {candidate.score.engine for candidate in lab.run.candidates()} == {"transformers"}


@pytest.mark.parametrize("asked", [True, False])
def test_a_vllm_that_was_asked_for_or_has_scored_is_not_replaced(tiny_experiment, monkeypatch, asked):
    vllm_that_does_not_start(monkeypatch)
    if not asked:
        monkeypatch.setattr("agentlab.evolution.bench.stored_rates", lambda run: object())
    lab = Lab.open(tiny_experiment, ["model.engine=vllm"] if asked else [])
    with (
        pytest.raises(OutOfMemoryError, match="Free memory is less"),
        open_bench(lab.run, lab.suite, print, bool) as bench,
    ):
        bench.engines.answering()
    assert lab.run.model().engine == "vllm"


def test_who_trains_beside_a_sleeping_vllm_leaves_it_its_context(tiny_experiment, monkeypatch):
    lab = Lab.open(tiny_experiment, ["budget.vram_gib=5.0", "budget.context_gib=0.25"])
    opened = []

    def open_engine(settings, model, name, rung):
        opened.append((name, settings.budget.context_gib))
        return SimpleNamespace(
            name=name, device="cuda", parameters=lambda: 1, sleep=lambda: None, wake=lambda: False,
            close=lambda: None, asleep_bytes=lambda: 2**29, note="only 4.40 GiB are free" if name == "vllm" else "",
        )  # fmt: skip

    monkeypatch.setattr("agentlab.inference.open_engine", open_engine)
    told = []
    engines = Engines(lab.run.settings, ModelFiles("tiny", Path(), ""), "vllm", told.append)
    engines.learning()  # nothing sleeps yet
    engines.answering()
    engines.learning()
    assert opened == [("transformers", 0.25), ("vllm", 0.25), ("transformers", 0.75)]
    loads = ["model_loading", "model_loaded"]
    assert [event.kind for event in told] == [*loads, "model_loading", "warned", "model_loaded", *loads]
    assert told[3].message == "only 4.40 GiB are free"


def test_a_batch_that_shrinks_for_memory_is_an_event_of_the_run(tiny_experiment, monkeypatch):
    real = TransformersEngine._batch

    def scarce(self, requests, *rest):
        if len(requests) > 6:
            raise MemoryError("no room for so many")
        return real(self, requests, *rest)

    monkeypatch.setattr(TransformersEngine, "_batch", scarce)
    lab, events = Lab.open(tiny_experiment, ["population.size=2", "population.generations=1"]), []
    evolve(lab, events.append, [0])
    steps = [event for event in events if event.kind == "recovery_step"]
    assert {(step.action, step.reason) for step in steps} == {("shrink_batch", "no room for so many")}
    assert ("12", "6") in {(step.source, step.target) for step in steps}


@pytest.mark.soak
def test_a_whole_run_is_scored_by_vllm(tmp_path, tiny_experiment):
    """vLLM answers, transformers learns, and each is off the device while the other works."""
    model = write_tiny_model(tmp_path / "model", 64, 2)  # vLLM's kernels know no heads of 8
    write_suite(tmp_path / "small", {"train": 24, "fitness": 8, "gate": 12, "test": 12})
    lab = Lab.open(
        tiny_experiment,
        [
            "model.engine=vllm",
            f"model.primary={model}",
            "population.generations=2",
            f"suite={tmp_path / 'small'}",
            "mutation.max_rank=8",
        ],
    )
    events = []
    evolve(lab, events.append)
    assert lab.run.result(1) is not None
    loaded = [event.engine for event in events if event.kind == "model_loaded"]
    assert loaded[:2] == ["vllm", "transformers"]
    scores = [candidate.score for candidate in lab.run.candidates() if candidate.score is not None]
    assert scores
    assert {score.engine for score in scores} == {"vllm"}
    assert lab.run.score("base", "fitness").engine == "vllm"
    assert lab.run.champion() == "base" or lab.run.sealed().base.engine == "vllm"


def test_what_was_planned_to_fit_is_answered_and_learned_at_once(tiny_experiment, monkeypatch):
    lab = Lab.open(tiny_experiment, ["population.size=2", "population.generations=1", "training.batch_size=8"])
    plan = lab.plan("cpu").as_dict()
    _, evaluate, train = plan["models"][0]["phases"]
    evaluate["chosen"]["batch_size"], train["chosen"]["micro_batch"] = 5, 2
    lab.run.save_plan(plan)
    answered, learned = set(), set()
    answers, config = TransformersEngine.answers, sft.sft_config

    def answering(self, requests, batch_size=32, should_stop=bool):
        answered.add(batch_size)
        return answers(self, requests, batch_size, should_stop)

    def configured(engine, folder, seed, attempt, *rest, **more):
        learned.add((attempt.batch_size, attempt.accumulation))
        return config(engine, folder, seed, attempt, *rest, **more)

    monkeypatch.setattr(TransformersEngine, "answers", answering)
    monkeypatch.setattr(sft, "sft_config", configured)
    run_generation(lab.run, lab.suite, 0, lambda event: None)
    assert answered - {1} == {5}  # single ones measure the speed
    assert learned == {(2, 4)}


@pytest.mark.parametrize(
    ("build", "said"), [(None, "is not installed"), ("cuda", "is built for a GPU, and torch sees none")]
)
def test_a_run_of_vllms_is_refused_before_anything_is_trained_where_vllm_is_not(
    tiny_experiment, monkeypatch, build, said
):
    lab = Lab.open(tiny_experiment, ["population.size=2", "population.generations=2"])
    evolve(lab, generations=[0])
    record = lab.run.folder / "model.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"engine": "vllm"}))
    monkeypatch.setattr(vllm_build, "build", lambda: build)
    events = []
    with pytest.raises(RunError, match=f"are vLLM's, which {said}, and compare with no other engine's; install it"):
        run_generation(lab.run, lab.suite, 1, events.append)
    assert {event.kind for event in events} == {"generation_started"}
