"""The generation notebook: by papermill as by evolve, parameters by name, and nbmake with the real model."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from support import write_tiny_experiment

from agentlab import Lab

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "generation.ipynb"

pytestmark = pytest.mark.notebook


def run_papermill(*arguments, cwd):
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), *map(str, arguments), "--no-progress-bar"]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_parameters_have_types_and_help():
    parameters = papermill.inspect_notebook(str(NOTEBOOK))
    assert set(parameters) == {"experiment", "generation", "overrides"}
    for parameter in parameters.values():
        assert parameter["inferred_type_name"] in {"str", "int", "list"}
        assert len(parameter["help"]) > 20


def test_papermill_by_hand_does_what_evolve_does(tmp_path, tiny_model):
    byhand = Lab.open(write_tiny_experiment(tmp_path / "a", tiny_model), ["population.generations=1"])
    done = run_papermill(
        tmp_path / "out.ipynb",
        "-p",
        "experiment",
        byhand.experiment,
        "-p",
        "generation",
        0,
        "-y",
        "{overrides: ['population.generations=1']}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launched = Lab.open(write_tiny_experiment(tmp_path / "b", tiny_model), ["population.generations=1"])
    list(launched.evolve())
    assert byhand.run.result(0).pool == launched.run.result(0).pool
    shas = [[c.weights_sha256 for c in lab.run.candidates()] for lab in (byhand, launched)]
    assert shas[0] == shas[1]
    text = (tmp_path / "out.ipynb").read_text()
    assert "g000-c00" in text
    assert "application/vnd.plotly.v1+json" in text


def test_misspelled_parameter_is_refused_by_name(tmp_path, tiny_experiment):
    done = run_papermill(
        tmp_path / "out.ipynb", "-p", "experiment", tiny_experiment, "-p", "generatoin", 2, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "unknown notebook parameter generatoin; did you mean generation?" in done.stderr
    assert not Lab.open(tiny_experiment).run.folder.exists()


def test_wrong_type_is_refused_by_name(tmp_path, tiny_experiment):
    done = run_papermill(
        tmp_path / "out.ipynb", "-p", "experiment", tiny_experiment, "-r", "generation", "two", cwd=tmp_path
    )
    assert done.returncode != 0
    assert "notebook parameter generation: 'two'" in done.stderr


def test_notebook_is_stored_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")


@pytest.mark.timeout(900)
def test_nbmake_runs_it_on_the_real_model(tmp_path, embedded):
    """In a copy of the project, so that the person's own runs and store stay as they are."""
    for name in ("notebooks", "experiments"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=lambda folder, names: [n for n in names if n.startswith(".")]
        )
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=800", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(tmp_path / "notebooks")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    (lab_folder,) = [path.parent for path in tmp_path.glob("experiments/smoke/*/config.yaml")]
    assert (lab_folder / "generations" / "000" / "result.json").exists()
    assert (tmp_path / "mlruns" / "mlflow.db").exists()
