import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from agentlab import events
from agentlab.errors import StorageError
from agentlab.hardware.watch import Holding, Owners
from agentlab.tracking import Recorder, configure, store, ui_command

from .helpers import SUITE, Shown, Story


def test_importing_the_room_imports_no_mlflow() -> None:
    code = "import sys, agentlab.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_everything_lies_below_the_project_wherever_one_stands(
    story: Story, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    a, _ = story.begin(0)
    story.train(a)
    story.evaluate(a, 0.5)
    assert list(elsewhere.iterdir()) == []
    shown = Shown(story.run)
    for run in shown.runs.values():
        assert Path(run.info.artifact_uri).is_relative_to(root / "mlruns" / "tiny")


def test_the_environment_of_another_run_does_not_hijack(
    story: Story, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = configure(root).create_run("0")
    monkeypatch.setenv("MLFLOW_RUN_ID", stranger.info.run_id)
    monkeypatch.setenv("MLFLOW_ACTIVE_MODEL_ID", "m-of-somebody-else")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    a, _ = story.begin(0)
    story.train(a)
    story.evaluate(a, 0.5)
    shown = Shown(story.run)
    assert len(shown.models) == 1
    assert shown.models[a].tags["agentlab.run"] == story.run.id
    assert shown.client.get_run(stranger.info.run_id).data.metrics == {}
    assert "MLFLOW_RUN_ID" not in os.environ


def test_a_leftover_file_store_does_not_change_the_backend(story: Story, root: Path) -> None:
    leftover = root / "mlruns" / "0"
    leftover.mkdir()
    (leftover / "meta.yaml").write_text("experiment_id: '0'\nname: Default\nlifecycle_stage: active\n")
    story.begin(0)
    assert len(Shown(story.run).runs) == 2
    assert configure(root).tracking_uri == f"sqlite:///{root / 'mlruns' / 'mlflow.db'}"
    assert list(leftover.iterdir()) == [leftover / "meta.yaml"]


def test_a_kill_while_the_database_is_made_leaves_nothing(tmp_path: Path) -> None:
    """A half-made database would be refused for ever: its migrations start with tables that exist already."""
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / ".mlflow.db.tmp").write_bytes(b"half a database")
    client = configure(tmp_path)
    assert client.get_experiment("0").name == "Default"
    assert {path.name for path in (tmp_path / "mlruns").iterdir()} == {"mlflow.db", "agentlab.lock"}


@pytest.fixture
def hidden_root(prepared: Path) -> Iterator[Path]:
    """A project that another user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="agentlab-tracking-"))
    (folder / "mlruns").mkdir()
    shutil.copy(prepared, folder / "mlruns")
    os.chmod(folder, 0o777)
    yield folder
    os.chmod(folder / "mlruns", 0o755)
    shutil.rmtree(folder)


def test_a_read_only_store_gives_one_sentence_and_the_run_goes_on(hidden_root: Path) -> None:
    story = Story(hidden_root)
    assert story.recorder is not None
    story.run.folder.mkdir(parents=True)
    for folder in [hidden_root, *hidden_root.rglob("*")]:
        if folder.is_dir() and folder.name != "mlruns":
            os.chmod(folder, 0o777)
    mlruns = hidden_root / "mlruns"
    os.chmod(mlruns, 0o555)
    before = mlruns.joinpath("mlflow.db").read_bytes()
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # the superuser may write everywhere
    try:
        started = time.monotonic()
        story.two_generations()
        assert time.monotonic() - started < 5
    finally:
        os.seteuid(user)
    assert len(story.recorder.problems) == 1
    assert "no permission to write" in story.recorder.problems[0]
    assert str(mlruns) in story.recorder.problems[0]
    assert mlruns.joinpath("mlflow.db").read_bytes() == before
    os.chmod(mlruns, 0o755)
    story.recorder.close()
    assert len(Shown(story.run).runs) == 7


@pytest.mark.parametrize("damage", ["a file", "not a database"])
def test_a_damaged_store_gives_a_sentence(root: Path, damage: str) -> None:
    if damage == "a file":
        shutil.rmtree(root / "mlruns")
        (root / "mlruns").write_text("")
    else:
        (root / "mlruns" / "mlflow.db").write_bytes(b"not a database " * 100)
    with pytest.raises(StorageError, match=r"move (it|the file) away"):
        configure(root)
    story = Story(root)
    story.begin(0)
    assert story.recorder is not None
    assert len(story.recorder.problems) == 1
    assert "move" in story.recorder.problems[0]


def test_a_locked_store_does_not_hold_up_the_run(story: Story, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_WAIT_S", 0.2)
    a, b = story.begin(0)
    assert story.recorder is not None
    with closing(sqlite3.connect(root / "mlruns" / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        for adapter in (a, b):
            story.train(adapter)
            story.evaluate(adapter, 0.5)
        assert time.monotonic() - started < 1
        other.execute("ROLLBACK")
    assert ["locked" in problem for problem in story.recorder.problems] == [True]
    story.recorder.problems.clear()
    story.finish(0, [a, b], [], champion=a)
    shown = Shown(story.run)
    assert shown.runs[b].data.metrics["fitness"] == 0.5
    assert set(shown.models) == {a, b}


def test_a_mistake_in_this_program_is_not_hidden(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentlab.tracking.views.candidate_metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        story.two_generations()
    monkeypatch.undo()


def test_progress_costs_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(Story(root).run, SUITE)
    monkeypatch.setattr(recorder, "_attempt", lambda action: pytest.fail("the store was asked"))
    for step in range(1000):
        recorder.observe(
            events.TrainingStep(candidate="g000-c00", step=step, steps=1000, loss=1.0, tokens=8, seconds=0.1)
        )
        recorder.observe(events.EvaluationProgress(candidate="g000-c00", split="fitness", done=step, total=1000))


def test_system_metrics_are_sampled_and_end_with_the_generation(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr("agentlab.tracking.system.SAMPLE_S", 0.1)
    monkeypatch.setattr("agentlab.tracking.system.SAMPLES_PER_POINT", 2)
    monkeypatch.setattr("agentlab.tracking.system.OWNERS", owners := Owners())
    owners.register("base", Holding(100))
    story = Story(root)
    story.recorder = Recorder(story.run, SUITE)
    story.begin(0)
    time.sleep(1.0)
    story.recorder.close()
    assert not [thread for thread in threading.enumerate() if "SystemMetrics" in thread.name]
    metrics = Shown(story.run).runs["generation 0"].data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0
    assert 0 < metrics["system/memory_pressure_percentage"] < 100
    assert metrics["system/memory_base_megabytes"] == pytest.approx(100 * 2**20 / 1e6, rel=0.01)
    assert story.recorder.problems == []


def test_the_lab_record_is_in_the_generations_run(story: Story, tmp_path: Path) -> None:
    import plotly.graph_objects as go

    story.begin(0)
    notebook, errors = tmp_path / "notebook.ipynb", tmp_path / "errors.csv"
    notebook.write_text("{}")
    errors.write_text("item,answer\n")
    folder = story.run.generation_folder(0)
    (folder / "figures").mkdir()
    (folder / "figures" / "scores.html").write_text("<p>scores</p>")
    assert story.recorder is not None
    for _ in range(2):
        story.recorder.log_generation_artifacts(0, notebook, {"lineage": go.Figure(), "tree": "<pre/>"}, errors)
        story.recorder.reconcile()
    artifacts = Path(Shown(story.run).runs["generation 0"].info.artifact_uri)
    names = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()}
    assert names == {"notebook.ipynb", "errors.csv", "lineage.html", "tree.html", "figures/scores.html"}
    lineage = (artifacts / "lineage.html").read_text()
    assert "Plotly.newPlot" in lineage
    assert 'src="https://' not in lineage
    (folder / "figures" / "scores.html").write_text("<p>more scores</p>")
    story.recorder.reconcile()
    assert "more" in (artifacts / "figures" / "scores.html").read_text()


def test_the_web_interface_opens_on_the_store(root: Path) -> None:
    command = ui_command(root, port=5055)
    assert f"sqlite:///{root / 'mlruns' / 'mlflow.db'}" in command
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_an_error_of_the_store_says_its_reason_first() -> None:
    autoflush = "(raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block)\n"
    full = "(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT INTO tags VALUES (?)]"
    assert store.first_line(MlflowException(autoflush + full)) == "(sqlite3.OperationalError) database or disk is full"
    assert store.first_line(MlflowException(full)) == "(sqlite3.OperationalError) database or disk is full"
    assert store.first_line(OSError()) == "OSError"


def test_a_full_disk_is_one_sentence_and_is_caught_up(story: Story, root: Path) -> None:
    a, b = story.begin(0)
    assert story.recorder is not None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (root / "mlruns" / "mlflow.db").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # the database cannot grow
    try:
        for adapter in (a, b):
            story.train(adapter)
            story.evaluate(adapter, 0.5)
        for index in range(20):
            story.change(a, reason="x" * 4000 + str(index))
            story.emit(events.Trained(candidate=a, train_seconds=1, train_tokens=1, loss=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(story.recorder.problems) == 1
    assert "MLflow is behind" in story.recorder.problems.pop()
    story.change(a, reason="")
    story.finish(0, [a, b], [], champion=a)
    shown = Shown(story.run)
    assert set(shown.models) == {a, b}
    assert shown.runs[b].data.metrics["fitness"] == 0.5
