"""`Lab` on the tiny model: a whole run through kernels, MLflow, report; stopping; two at once; bad input."""

import subprocess
import sys
import threading
import time

import pytest

from agentlab import Lab, errors, files
from agentlab.errors import ConfigError, LeaseHeldError, ModelError, RunError, StorageError, SuiteError
from agentlab.events import (
    EvolutionFinished,
    EvolutionStarted,
    GenerationFailed,
    GenerationFinished,
    SealedComparison,
    Stopped,
    TrainingStep,
)
from agentlab.tracking import configure

pytestmark = pytest.mark.notebook


def mlflow_runs(lab, kind):
    client = configure(lab.run.root)
    experiment = client.get_experiment_by_name(lab.run.settings.name)
    runs = client.search_runs([experiment.experiment_id], f"tags.`agentlab.kind` = '{kind}'", max_results=1000)
    return [run for run in runs if run.data.tags["agentlab.run"] == lab.run.id]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """A tiny experiment that was evolved to its end, through kernels."""
    from support import write_tiny_experiment

    lab = Lab.open(write_tiny_experiment(tmp_path_factory.mktemp("project"), tiny_model))
    return lab, list(lab.evolve())


def test_events_tell_the_whole_story_in_order(finished):
    lab, events = finished
    assert isinstance(events[0], EvolutionStarted)
    assert isinstance(events[-1], EvolutionFinished)
    assert [e.generation for e in events if isinstance(e, GenerationFinished)] == [0, 1, 2]
    assert list(lab.run.journal.replay()) == events


def test_results_have_one_row_per_candidate(finished):
    lab, _ = finished
    table = lab.results()
    assert list(table["candidate"]) == [c.genome.candidate for c in lab.run.candidates()]
    assert len(table) == 3 + 3 + 3  # two children and their blend
    assert table["fitness"].notna().all()


def test_mlflow_holds_every_run_once_and_finished(finished):
    lab, _ = finished
    assert len(mlflow_runs(lab, "evolution")) == 1
    assert len(mlflow_runs(lab, "generation")) == 3
    candidates = mlflow_runs(lab, "candidate")
    assert sorted(run.data.tags["agentlab.adapter_id"] for run in candidates) == sorted(lab.results()["candidate"])
    for kind in ("evolution", "generation", "candidate"):
        assert {run.info.status for run in mlflow_runs(lab, kind)} == {"FINISHED"}


def test_mlflow_agrees_with_the_records(finished):
    lab, _ = finished
    by_adapter = {run.data.tags["agentlab.adapter_id"]: run.data.metrics for run in mlflow_runs(lab, "candidate")}
    for candidate in lab.run.candidates():
        metrics = by_adapter[candidate.genome.candidate]
        assert metrics["accuracy"] == pytest.approx(candidate.score.accuracy)
        assert metrics["fitness"] == pytest.approx(candidate.score.fitness)
        assert metrics.get("train_ram_peak_mib", 0) == pytest.approx(candidate.training.ram_peak_mib)
    (evolution,) = mlflow_runs(lab, "evolution")
    for phase in ("evaluate", "train"):
        assert evolution.data.metrics[f"planned_{phase}_mib"] == pytest.approx(lab.run.planned_mib()[phase])
    sealed = lab.run.sealed()
    if sealed is not None:
        assert evolution.data.metrics["test_accuracy_champion"] == pytest.approx(sealed.champion_score.accuracy)
        assert evolution.data.metrics["test_openings"] == 1


def test_executed_notebooks_and_figures_are_artifacts(finished):
    lab, _ = finished
    client = configure(lab.run.root)
    for run in mlflow_runs(lab, "generation"):
        names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert {"notebook.ipynb", "lineage.html", "errors.csv"} <= names


def test_pool_keeps_its_size_and_cards_stay(finished):
    lab, _ = finished
    weights = sorted(path.parent.name for path in lab.run.folder.glob("adapters/*/adapter_model.safetensors"))
    assert weights == sorted(lab.run.result(2).pool)
    assert len(weights) == 3
    assert len(list(lab.run.folder.glob("adapters/*/card.json"))) == 9


def test_sealed_numbers_come_back_from_the_adapter_on_disk(finished):
    """What was printed is recomputed from nothing but the adapter's folder and the suite."""
    from agentlab import inference, models
    from agentlab.inference import Request
    from agentlab.tasks import score_split

    lab, events = finished
    sealed = lab.run.sealed()
    if sealed is None:  # the gate let nobody through: then no comparison may have been shown
        assert not any(isinstance(e, SealedComparison) for e in events)
        assert lab.run.champion() == "base"
        return
    items = lab.suite.open_test()
    with inference.open_engine(lab.run.settings, models.resolve(lab.run.settings.model.primary)) as engine:
        engine.load_adapter(sealed.champion, lab.run.adapter_folder(sealed.champion))
        requests = [Request(lab.suite.chat(item), adapter=sealed.champion, max_new_tokens=3) for item in items]
        texts = [c.text for c in engine.generate(requests, lab.run.settings.evaluation.batch_size)]
    assert texts == sealed.champion_score.answers
    assert score_split(lab.suite, items, texts) == sealed.champion_score.item_scores


def test_report_and_summary(finished, tmp_path):
    lab, _ = finished
    page = lab.report(tmp_path / "r.html").read_text()
    assert lab.run.id in page
    assert lab.run.champion() in lab.summary()


def test_evolving_a_finished_run_does_nothing_again(finished):
    lab, _ = finished
    before = {path: path.stat().st_mtime_ns for path in lab.run.folder.rglob("*.safetensors")}
    events = list(Lab.open(lab.experiment).evolve())
    assert [type(event) for event in events] == [EvolutionStarted, EvolutionFinished]
    assert before == {path: path.stat().st_mtime_ns for path in lab.run.folder.rglob("*.safetensors")}
    assert len(mlflow_runs(lab, "candidate")) == 9


def test_the_newest_run_is_found_without_its_overrides(finished):
    lab, _ = finished
    assert Lab.open_existing(lab.experiment).run.id == lab.run.id
    with pytest.raises(RunError, match="no run of"):
        Lab.open_existing(lab.experiment, ["seed=99"])


def test_generation_out_of_order_is_refused(tiny_experiment):
    lab = Lab.open(tiny_experiment)
    with pytest.raises(RunError, match=r"generation 0 .* is not finished"):
        list(lab.generation(1))
    with pytest.raises(RunError, match="allowed: 0 to 2"):
        list(lab.generation(7))
    assert not lab.run.journal.size()  # a mistaken number is no failure of the run


def test_stop_from_another_thread_ends_cleanly_and_continues(tiny_experiment):
    lab = Lab.open(tiny_experiment, ["training.steps=80"])

    def stop_at_the_first_step():
        other = Lab.open(tiny_experiment, ["training.steps=80"])
        while not any(isinstance(event, TrainingStep) for event in other.run.journal.replay()):
            time.sleep(0.01)
        assert other.stop()

    other = threading.Thread(target=stop_at_the_first_step)
    other.start()
    events = list(lab.generation(0))
    other.join()
    assert isinstance(events[-1], Stopped)
    assert not list(lab.run.folder.glob("adapters/*/adapter_model.safetensors"))
    assert {run.info.status for run in mlflow_runs(lab, "generation")} == {"KILLED"}
    assert isinstance(list(lab.generation(0))[-1], GenerationFinished)  # a request that was met does not linger
    assert len(mlflow_runs(lab, "generation")) == 1
    assert {run.info.status for run in mlflow_runs(lab, "generation")} == {"FINISHED"}


def test_stopping_what_does_not_run_says_so(tiny_experiment):
    assert Lab.open(tiny_experiment).stop() is False


def test_second_process_on_the_same_run_is_told_who_holds_it(tiny_experiment):
    code = (
        "import sys, time; from agentlab import Lab; lab = Lab.open(sys.argv[1]);"
        "lab._acquire('testing'); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tiny_experiment)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        lab = Lab.open(tiny_experiment)
        assert lab.is_running()
        with pytest.raises(LeaseHeldError, match=rf"process {other.pid} holds it"):
            list(lab.generation(0))
        with pytest.raises(LeaseHeldError, match=rf"process {other.pid} holds it"):
            list(lab.evolve())
        assert not lab.run.journal.size()
    finally:
        other.kill()
        other.wait()


def test_a_busy_accelerator_is_told_before_a_kernel_is_started(tiny_experiment):
    code = (
        "import time; from agentlab import config; from agentlab.hardware.lease import Lease;"
        "Lease(config.home() / 'accelerator.lock', 'another run').acquire(); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        lab = Lab.open(tiny_experiment)
        with pytest.raises(LeaseHeldError, match=rf"accelerator: process {other.pid} .*another run"):
            list(lab.evolve())
        assert not list(lab.run.folder.glob("generations/*/notebook.ipynb"))
    finally:
        other.kill()
        other.wait()


def test_commands_repeat_the_overrides(tiny_experiment, monkeypatch):
    monkeypatch.chdir(tiny_experiment.parent)
    lab = Lab.open(tiny_experiment, ["seed=5", "name=a-b"])
    assert lab.command("report", "--open") == "agentlab report tiny.yaml --set seed=5 --set name=a-b --open"
    assert lab.command("adapters list") == "agentlab adapters list tiny.yaml --set seed=5 --set name=a-b"


@pytest.mark.parametrize(("code", "kind"), [(2, ConfigError), (3, ModelError), (5, RunError), (7, StorageError)])
def test_what_a_kernel_reports_keeps_its_exit_code(code, kind):
    assert errors.of_exit_code(code) is kind


def test_following_shows_what_another_process_does(tiny_experiment):
    lab = Lab.open(tiny_experiment)
    worker = threading.Thread(target=lambda: list(lab.generation(0)))
    worker.start()
    while not lab.is_running():
        time.sleep(0.02)
    seen = list(Lab.open(tiny_experiment).follow())
    worker.join()
    assert seen == list(lab.run.journal.replay())


def test_failure_is_recorded_told_and_raised(tiny_experiment):
    lab = Lab.open(tiny_experiment, ["training.max_length=16"])  # no item is that short
    with pytest.raises(RunError, match=r"no candidate .* survived: g000-c00: every training item is longer"):
        list(lab.generation(0))
    events = list(lab.run.journal.replay())
    assert isinstance(events[-1], GenerationFailed)
    assert {run.info.status for run in mlflow_runs(lab, "generation")} == {"FAILED"}
    assert {c.state for c in lab.run.candidates()} == {"failed"}


def test_a_changed_suite_is_another_run_and_a_leak_is_refused(tiny_experiment):
    first = Lab.open(tiny_experiment)
    train = tiny_experiment.parent.parent / "suite" / "train.jsonl"
    text = train.read_text()
    train.write_text(text.replace("tree 0", "tree zero"))
    assert Lab.open(tiny_experiment).run.id != first.run.id
    train.write_text(text.replace("tree 0", "toad 0"))
    leak = r"the same prompt is in two splits: .*test\.jsonl, line 1 repeats .*train\.jsonl, line 1"
    with pytest.raises(SuiteError, match=leak):
        Lab.open(tiny_experiment)


def test_a_damaged_record_is_named(tiny_experiment):
    lab = Lab.open(tiny_experiment)
    list(lab.generation(0))
    path = lab.run.generation_folder(0) / "result.json"
    files.write_bytes(path, path.read_bytes()[:40])
    with pytest.raises(Exception, match=r"result\.json is damaged"):
        list(Lab.open(tiny_experiment).generation(1))


def test_the_agent_of_a_run_is_its_champion_and_holds_the_accelerator(finished):
    from agentlab.adapters import Pool
    from agentlab.agent import Options
    from agentlab.errors import AdapterError

    lab, _ = finished
    champion = lab.run.champion()
    pool = Pool(lab.run.folder / "adapters")
    member = pool.members()[0].adapter_id
    used = pool.card(member).usage_count
    with lab.agent(remember=False, options=Options(max_new_tokens=4)) as agent:
        result = agent.ask("tree 1")
        assert result.model_info.adapter == (None if champion == "base" else champion)
        assert result.model_info.run == lab.run.id
        assert len(result.model_info.model_sha256) == 64
        with pytest.raises(LeaseHeldError, match="the agent of tiny/"):
            lab.agent(remember=False)
    with lab.agent(member, remember=False, options=Options(max_new_tokens=4)) as agent:  # it was given back
        info = agent.ask("tree 1").model_info
        assert (info.adapter, info.adapter_sha256) == (member, pool.card(member).weights_sha256)
    assert pool.card(member).usage_count > used
    with pytest.raises(AdapterError, match=r"allowed for tiny/.*champion, base"):
        lab.agent("g077-c07", remember=False)
    assert Lab.newest(lab.run.root).run.id == lab.run.id
