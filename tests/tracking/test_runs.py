import os
import shutil
from pathlib import Path

import pytest

from agentlab import events
from agentlab.hardware.lease import Lease
from agentlab.tracking import Recorder

from .helpers import SUITE, Shown, Story


def test_a_candidate_run_carries_the_contract(finished: Story, shown: Shown) -> None:
    child = shown.runs["g001-c00"]
    assert child.data.metrics == {
        "fitness": 0.75,
        "accuracy": 0.75,
        "accuracy_ci_low": 0.65,
        "accuracy_ci_high": 0.85,
        "latency_estimated_s": 1.25,
        "latency_p50_s": 1.0,
        "latency_p95_s": 1.5,
        "latency_target_met": 1.0,
        "vram_peak_mib": 0.0,
        "ram_peak_mib": 900.0,
        "train_seconds": 1.5,
        "eval_seconds": 0.5,
        "train_tokens": 640.0,
        "train_remedies": 0.0,
        "train_vram_peak_mib": 0.0,
        "train_ram_peak_mib": 700.0,
        "loss": 1.0,
    }
    ours = {key.removeprefix("agentlab."): value for key, value in child.data.tags.items() if "agentlab." in key}
    assert ours == {
        "run": finished.run.id,
        "kind": "candidate",
        "adapter_id": "g001-c00",
        "parents": "g000-c00,g000-c01",
        "operator": "crossover",
        "generation": "1",
        "state": "kept",
        "advisor": "chance",
    }
    assert child.data.params["merge_weights"] == "0.5,0.5"
    assert child.data.params["learning_rate"] == "0.0005"
    assert child.data.params["data_mix.no tool"] == "2.0"
    history = shown.client.get_metric_history(child.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.5), (3, 1.0)]


def test_runs_are_nested_and_finished(finished: Story, shown: Shown) -> None:
    evolution = shown.runs[finished.run.id]
    assert set(shown.statuses().values()) == {"FINISHED"}
    assert len(shown.runs) == 1 + 2 + 4
    for generation in (0, 1):
        parent = shown.runs[f"generation {generation}"]
        assert parent.data.tags["mlflow.parentRunId"] == evolution.info.run_id
        for index in (0, 1):
            child = shown.runs[f"g{generation:03d}-c{index:02d}"]
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    gate = shown.runs["generation 1"].data
    assert gate.metrics["gate_p_value"] == 1e-6
    assert gate.metrics["gate_wins"] == 30
    assert gate.metrics["best_fitness"] == 0.75
    assert gate.metrics["mean_fitness"] == 0.625
    assert gate.tags["agentlab.champion"] == "g001-c00"
    best = shown.client.get_metric_history(evolution.info.run_id, "best_fitness")
    assert [(point.step, point.value) for point in best] == [(0, 0.5), (1, 0.75)]
    assert evolution.data.params["training.tokens"] == "16000"
    config = Path(evolution.info.artifact_uri) / "config.yaml"
    assert "name: tiny" in config.read_text()


def test_sealed_metrics_equal_the_record(finished: Story, shown: Shown) -> None:
    sealed = finished.run.sealed()
    assert sealed is not None
    evolution = shown.runs[finished.run.id]
    expected = {
        "test_accuracy_base": sealed.base.accuracy,
        "test_accuracy_base_ci_low": sealed.base.accuracy_ci_low,
        "test_accuracy_base_ci_high": sealed.base.accuracy_ci_high,
        "test_accuracy_champion": sealed.champion_score.accuracy,
        "test_accuracy_champion_ci_low": sealed.champion_score.accuracy_ci_low,
        "test_accuracy_champion_ci_high": sealed.champion_score.accuracy_ci_high,
        "test_items": 200,
        "test_openings": 1,
    }
    assert expected.items() <= evolution.data.metrics.items()
    assert [(value.dataset.name, value.dataset.digest) for value in evolution.inputs.dataset_inputs] == [
        ("toolcalls/test", SUITE.digest[:36])
    ]


def test_datasets_are_inputs_with_digest_and_context(shown: Shown) -> None:
    def inputs(name: str) -> set[tuple[str, str, str]]:
        found = shown.runs[name].inputs.dataset_inputs
        return {(value.dataset.name, value.dataset.digest, value.tags[0].value) for value in found}

    digest = SUITE.digest[:36]
    used = {("toolcalls/train", digest, "training"), ("toolcalls/fitness", digest, "eval")}
    assert inputs("g000-c00") == used
    assert inputs("generation 0") == used | {("toolcalls/gate", digest, "eval")}


def test_reconciling_again_changes_nothing(finished: Story, shown: Shown) -> None:
    before = shown.everything()
    again = Recorder(finished.run, SUITE)
    for _ in range(2):
        again.reconcile()
    again.observe(events.GenerationFinished(generation=1, champion="g001-c00", seconds=9.0))
    again.observe(events.EvolutionFinished(champion="g001-c00", seconds=20.0))
    again.close()
    assert again.problems == []
    assert Shown(finished.run).everything() == before


def test_a_view_made_afterwards_is_the_one_made_live(
    finished: Story, shown: Shown, tmp_path: Path, prepared: Path
) -> None:
    """The folder copied to a project with an empty store: everything comes back, with the times of the journal."""
    other = tmp_path / "elsewhere"
    shutil.copytree(finished.run.root / "experiments", other / "experiments")
    (other / "mlruns").mkdir()
    shutil.copy(prepared, other / "mlruns")
    copy = Story(other)
    assert copy.recorder is not None
    copy.recorder.reconcile()
    assert copy.recorder.problems == []
    later = Shown(copy.run)
    assert later.statuses() == shown.statuses()
    for name, run in shown.runs.items():
        assert later.runs[name].data.metrics == run.data.metrics
        assert later.runs[name].data.params == run.data.params
        assert abs(later.runs[name].info.start_time - run.info.start_time) < 1000
    assert set(later.models) == set(shown.models)


def test_a_continuation_meets_the_runs_of_the_killed_process(story: Story, root: Path) -> None:
    """Killed after one candidate was trained: the next process finds the runs that are there and finishes them."""
    a, b = story.begin(0)
    story.train(a)
    first = Shown(story.run)
    assert first.statuses() == {story.run.id: "RUNNING", "generation 0": "RUNNING", a: "RUNNING"}
    other = Story(root)
    assert other.recorder is not None
    other.recorder.reconcile()  # nobody is alive
    assert Shown(story.run).statuses() == {story.run.id: "KILLED", "generation 0": "KILLED", a: "KILLED", b: "KILLED"}
    other.emit(events.GenerationStarted(generation=0, pid=os.getpid(), continued=True))
    now = Shown(story.run)
    assert now.statuses() == {story.run.id: "RUNNING", "generation 0": "RUNNING", a: "RUNNING", b: "SCHEDULED"}
    other.evaluate(a, 0.5)
    other.train(b)
    other.evaluate(b, 0.25)
    other.finish(0, [a, b], [], champion=a)
    last = Shown(story.run)
    assert {name: run.info.run_id for name, run in first.runs.items()}.items() <= {
        name: run.info.run_id for name, run in last.runs.items()
    }.items()
    assert last.everything()["all runs"] == 4
    assert last.statuses() == {story.run.id: "SCHEDULED", "generation 0": "FINISHED", a: "FINISHED", b: "FINISHED"}
    assert len(last.client.get_metric_history(last.runs[a].info.run_id, "loss")) == 3
    other.recorder.close()
    assert other.recorder.problems == []


def test_of_duplicates_the_oldest_stays(story: Story) -> None:
    story.begin(0)
    shown = Shown(story.run)
    oldest = shown.runs["generation 0"]
    shown.client.create_run(shown.experiment_id, tags=dict(oldest.data.tags), run_name="generation 0")
    assert story.recorder is not None
    story.recorder.reconcile()
    left = Shown(story.run)
    assert left.runs["generation 0"].info.run_id == oldest.info.run_id
    assert len(left.client.search_runs([left.experiment_id])) == len(left.runs)


def test_a_run_that_a_person_deleted_comes_back(story: Story) -> None:
    a, _ = story.begin(0)
    story.train(a)
    shown = Shown(story.run)
    shown.client.delete_run(shown.runs[a].info.run_id)
    story.evaluate(a, 0.5)
    assert Shown(story.run).runs[a].data.metrics["fitness"] == 0.5


def test_another_genome_under_the_same_id_gets_a_run_of_its_own(story: Story) -> None:
    a, _ = story.begin(0)
    story.train(a)
    before = Shown(story.run).runs[a].info.run_id
    candidate = story.run.candidate(a)
    assert candidate is not None
    story.change(a, genome=candidate.genome.model_copy(update={"rank": 8}))
    assert story.recorder is not None
    story.recorder.reconcile()
    after = Shown(story.run).runs[a]
    assert after.data.params["rank"] == "8"
    assert after.info.run_id != before


@pytest.mark.parametrize(("reason", "status"), [("failed", "FAILED"), ("stopped", "KILLED"), ("killed", "KILLED")])
def test_an_interruption_is_told_truthfully(story: Story, reason: str, status: str) -> None:
    a, b = story.begin(0)
    story.train(a)
    story.evaluate(a, 0.5)
    story.emit(events.TrainingStarted(candidate=b, steps=3, learning_rate=5e-4, rank=4))
    assert story.recorder is not None
    with Lease(story.run.worker_lock, "a generation"):  # the process still holds it when it says so
        story.recorder.interrupted(reason, 0, "Traceback …\nRuntimeError: broken\n" if reason == "failed" else "")  # type: ignore[arg-type]
    expected = {story.run.id: status, "generation 0": status, a: "FINISHED", b: status}
    assert Shown(story.run).statuses() == expected
    story.recorder.reconcile()
    shown = Shown(story.run)
    assert shown.statuses() == expected
    if reason == "failed":
        assert shown.runs["generation 0"].data.tags["agentlab.error"] == "RuntimeError: broken"
        assert "traceback.txt" in [f.path for f in shown.client.list_artifacts(shown.runs["generation 0"].info.run_id)]


def test_a_failed_candidate_is_a_result(story: Story) -> None:
    a, _ = story.begin(0)
    story.change(a, state="failed", reason="loss became NaN")
    story.emit(events.CandidateFailed(candidate=a, reason="loss became NaN"))
    shown = Shown(story.run)
    assert shown.runs[a].info.status == "FAILED"
    assert shown.runs[a].data.tags["agentlab.reason"] == "loss became NaN"
    assert shown.runs["generation 0"].info.status == "RUNNING"
    assert shown.models == {}


def test_events_of_the_journal_tell_the_state_to_a_later_process(root: Path) -> None:
    for index, (event, status) in enumerate(
        [
            (events.GenerationFailed(generation=0, error="disk"), "FAILED"),
            (events.Stopped(reason="asked"), "KILLED"),
            (None, "KILLED"),
        ]
    ):
        story = Story(root, seed=index, recorder=False)
        story.begin(0)
        if event is not None:
            story.emit(event)
        recorder = Recorder(story.run, SUITE)
        recorder.reconcile()
        assert recorder.problems == []
        assert set(Shown(story.run).statuses().values()) == {status}


def test_an_end_that_is_not_in_the_journal_yet_counts(story: Story) -> None:
    a, b = story.begin(0)
    story.finish(0, [a, b], [], champion="base")
    with Lease(story.run.launcher_lock, "evolving"):
        assert story.recorder is not None
        story.recorder.reconcile()
        assert Shown(story.run).statuses()[story.run.id] == "RUNNING"
        story.recorder.observe(events.EvolutionFinished(champion="g001-c00", seconds=20.0))
        story.recorder.reconcile()
        assert Shown(story.run).statuses()[story.run.id] == "FINISHED"


def test_an_evaluation_seen_before_its_record_is_caught_up(story: Story) -> None:
    a, b = story.begin(0)
    story.train(a)
    story.train(b)
    assert story.recorder is not None
    early = events.Evaluated(
        candidate=a, split="fitness", accuracy=0, accuracy_ci_low=0, accuracy_ci_high=0, items=2, fitness=0, seconds=1
    )
    story.recorder.observe(early)
    story.evaluate(a, 0.5)
    story.evaluate(b, 0.25)
    assert Shown(story.run).runs[a].data.metrics["fitness"] == 0.5
