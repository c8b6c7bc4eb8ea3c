"""The command line: help without heavy imports, one sentence per error, the right exit code."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from support import write_suite

from agentlab import Lab, config, models
from agentlab.cli import main
from agentlab.hardware.lease import Lease

HEAVY = ("torch", "transformers", "mlflow", "pandas", "plotly", "evaluate", "datasets", "peft", "trl", "numpy", "faiss")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom agentlab.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def commands(group=main, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_command_has_a_help_text(path):
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert len(result.output.split("\n", 3)[2].strip()) > 10


def test_bad_experiment_is_one_sentence_and_exit_code_2(tmp_path):
    path = tmp_path / "experiments" / "x.yaml"
    path.parent.mkdir()
    path.write_text("name: x\ntraining: {stepz: 3}\n")
    result = run("evolve", path)
    assert result.exit_code == 2
    assert "training.stepz" in result.output
    assert "Traceback" not in result.output
    assert run("evolve", tmp_path / "none.yaml").exit_code == 2
    assert run("evolve", path, "--set", "x").exit_code == 2
    assert run("evolve", path, "--set", "training={{x}}").exit_code == 2
    assert run("evolve", path, "--set", "name=2020-13-45").exit_code == 2


def test_unknown_model_is_exit_code_3(tiny_experiment):
    result = run("evolve", tiny_experiment, "--set", "model.primary=org/missing")
    assert result.exit_code == 3, result.output
    assert "agentlab models get org/missing" in result.output


def test_status_before_anything_ran_says_how_to_start(tiny_experiment):
    result = run("status", tiny_experiment)
    assert result.exit_code == 5
    assert "agentlab evolve" in result.output


def test_suite_list_and_show():
    assert "toolcalls" in run("suite", "list").output
    result = run("suite", "show", "toolcalls", "--items", "1")
    assert '"test": 200' in result.output
    assert "[answer]" in result.output
    assert run("suite", "show", "nothing").exit_code == 2
    assert run("suite", "show", "toolcalls", "--items", "-1").exit_code == 2


def test_suite_make_from_jsonl_and_refusals(tmp_path):
    source = tmp_path / "data.jsonl"
    rows = [{"question": f"Is number {i} even?", "answer": "yes" if i % 2 == 0 else "no"} for i in range(600)]
    source.write_text("\n".join(map(json.dumps, rows)))
    result = run("suite", "make", source, "--out", tmp_path / "even", "--metric", "label")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output[result.output.index("{") :])["labels"] == ["no", "yes"]
    again = run("suite", "make", source, "--out", tmp_path / "even")
    assert again.exit_code == 2
    assert "already exists" in again.output
    assert run("suite", "make", source, "--out", tmp_path / "b", "--sizes", "train=x").exit_code == 2
    assert run("suite", "make", source, "--out", tmp_path / "b", "--sizes", "train=²").exit_code == 2
    assert run("suite", "make", source, "--out", tmp_path / "b", "--seed", "-1").exit_code == 2
    assert run("suite", "make", source, "--out", "/dev/null/b").exit_code == 7


def test_suite_with_a_leak_is_refused(tmp_path):
    folder = write_suite(tmp_path / "leaky", {"train": 8, "fitness": 4, "gate": 4, "test": 4})
    (folder / "test.jsonl").write_text((folder / "train.jsonl").read_text().replace("train-", "other-"))
    result = run("suite", "show", folder)
    assert result.exit_code == 2
    assert "leak" in result.output or "same prompt" in result.output


def test_what_is_interrupted_ends_as_stopped_on_request(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("agentlab.models.listed", interrupted)
    result = run("models", "list")
    assert (result.exit_code, result.output.strip()) == (8, "stopped on request")


def test_models_list_names_the_embedded_one():
    assert "smollm2-135m-instruct" in run("models", "list").output
    assert run("models", "get", "noslash").exit_code == 3


@pytest.mark.notebook
class TestOnAFinishedRun:
    @pytest.fixture(scope="class")
    def experiment(self, tmp_path_factory, tiny_model):
        from support import write_tiny_experiment

        path = write_tiny_experiment(tmp_path_factory.mktemp("cli"), tiny_model)
        path.write_text(path.read_text().replace("generations: 3", "generations: 1"))
        result = run("evolve", path)
        assert result.exit_code == 0, result.output
        assert "g000-c00" in result.output
        return path

    def test_status(self, experiment):
        found = json.loads(run("status", experiment, "--json").output)
        assert found["finished"]
        assert found["finished_generations"] == found["planned_generations"] == 1
        assert not found["running"]

    def test_follow_replays_and_ends(self, experiment):
        result = run("follow", experiment)
        assert result.exit_code == 0
        assert "not running" in result.output
        assert "generation 0 finished" in result.output

    def test_stop_says_that_nothing_runs(self, experiment):
        assert "not running" in run("stop", experiment).output

    def test_stop_and_follow_find_a_run_with_other_settings(self, experiment):
        """Its `--set` was typed in another terminal, and this one knows the experiment's file alone."""
        other = Lab.open(experiment, ["seed=99"]).run
        other.folder.mkdir()
        (other.folder / "config.yaml").write_text(config.dump(other.settings))
        with Lease(other.launcher_lock, "evolving"):
            stopped = run("stop", experiment)
            assert f"asked {other.id} to stop" in stopped.output
            assert f"but {other.id}, with other settings, is" in stopped.output
            assert other.stop_file.exists()
            assert "not running" in run("stop", experiment, "--set", "seed=3").output  # named: no other is meant
        assert "not running" in run("stop", experiment).output
        shutil.rmtree(other.folder)

    def test_report(self, experiment, tmp_path):
        assert run("report", experiment, "--out", tmp_path / "r.html").exit_code == 0
        assert (tmp_path / "r.html").stat().st_size > 10_000
        assert "g000-c00" in run("report", experiment, "--text").output

    def test_adapters_list_show_merge_export_prune(self, experiment, tmp_path):
        assert "g000-c02" in run("adapters", "list", experiment).output
        assert json.loads(run("adapters", "show", experiment, "g000-c01").output)["adapter_id"] == "g000-c01"
        assert run("adapters", "show", experiment, "g000-c99").exit_code == 4
        fittest = run("adapters", "list", experiment).output.splitlines()[1].split()[0]
        assert json.loads(run("adapters", "show", experiment, "best").output)["adapter_id"] == fittest
        merged = tmp_path / "merged"
        result = run("adapters", "merge", experiment, "g000-c00", "g000-c01", "--weights", "0.7,0.3", "--out", merged)
        assert result.exit_code == 0, result.output
        assert (merged / "adapter_model.safetensors").exists()
        assert run("adapters", "merge", experiment, "g000-c00", "--out", merged).exit_code == 4
        assert (
            run("adapters", "merge", experiment, "g000-c00", "--weights", "1,2", "--out", tmp_path / "n").exit_code == 4
        )
        nothing = run("adapters", "merge", experiment, "g000-c00", "--weights", "0", "--out", tmp_path / "n")
        assert nothing.exit_code == 4
        assert "not all 0" in nothing.output
        assert run("adapters", "list", experiment, "--set", "seed=99").exit_code == 5
        assert run("adapters", "list", experiment, "--set", "seed=3").exit_code == 0
        assert run("adapters", "export", experiment, "g000-c00", "--out", tmp_path / "e").exit_code == 0
        model = run("adapters", "export", experiment, "g000-c00", "--out", tmp_path / "m", "--merged")
        assert model.exit_code == 0, model.output
        assert (tmp_path / "m" / "config.json").exists()
        pruned = run("adapters", "prune", experiment, "--keep", "1")
        assert pruned.exit_code == 0, pruned.output
        assert len(list(experiment.parent.glob("tiny/*/adapters/*/adapter_model.safetensors"))) <= 2
        assert "culled" in run("adapters", "list", experiment, "--all").output
        # a kill after the weights had gone and before the records followed
        lab = Lab.open(experiment)
        left = [c for c in lab.run.candidates() if c.state == "culled"]
        for candidate in left:
            lab.run.save_candidate(candidate.model_copy(update={"state": "kept"}))
        assert run("adapters", "prune", experiment, "--keep", "1").exit_code == 0
        assert left
        assert [lab.run.candidate(c.genome.candidate).state for c in left] == ["culled"] * len(left)

    def test_nothing_is_merged_into_a_model_that_has_changed(self, experiment, tmp_path, monkeypatch):
        resolve = models.resolve
        other = "0" * 64
        monkeypatch.setattr(models, "resolve", lambda *known: dataclasses.replace(resolve(*known), sha256=other))
        adapter = Lab.open(experiment).run.result(0).pool[0]
        refused = run("adapters", "export", experiment, adapter, "--out", tmp_path / "m", "--merged")
        assert refused.exit_code == 4
        assert "was trained on another base model" in refused.output
        assert not (tmp_path / "m").exists()


def test_ui_without_a_run_says_that_there_is_none(tiny_experiment):
    result = run("ui", tiny_experiment)
    assert result.exit_code == 5
    assert "no run of" in result.output
