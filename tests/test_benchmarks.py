"""Every benchmark runs at its smallest size and ends in the JSON line its readers expect. No times are judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script, *options):
    """The JSON line that the benchmark ends with."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, options)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_crossover():
    result = run("crossover.py", "--out", 64, "--in", 96, "--rank", 4, "--repeats", 1, "--dense")
    assert result["benchmark"] == "crossover"
    assert {"target_s", "met"} <= result.keys()
    assert [(layer["out"], layer["in"]) for layer in result["layers"]] == [(16, 24), (64, 96)]
    assert all(layer["exact_s"] > 0 and layer["relative_difference"] < 1e-4 for layer in result["layers"])


def test_population(tiny_model):
    size = ("--adapters", 2, "--rank", 4, "--batch", 4, "--tokens", 3, "--repeats", 1)
    result = run("population.py", "--model", tiny_model, *size)
    assert result["benchmark"] == "population"
    assert set(result["ways"]) == {"base", "adapters", "reload"}
    assert all(way["tokens_per_s"] > 0 and way["seconds"] > 0 for way in result["ways"].values())
    assert result["speed_met"] == (result["speed_ratio"] >= result["speed_bar"])
    assert result["switch_cost_met"] == (result["switch_cost_ratio"] >= result["switch_cost_bar"])
    assert result["whole_time_ratio"] > 0


def test_training_agrees_with_bare_trl(tiny_model):
    result = run("training.py", "--model", tiny_model, "--steps", 2, "--batch-size", 2, "--repeats", 1, "--same-loss")
    assert result["benchmark"] == "training"
    assert set(result["ways"]) == {"ours", "bare", "same loss"}
    assert result["met"] == (result["ratio"] <= result["bar"])
    assert result["same_loss_ratio"] > 0
    losses = [way["final_loss"] for way in result["ways"].values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    assert result["final_loss_difference"] == abs(losses[0] - losses[1])


@pytest.mark.notebook
@pytest.mark.timeout(300)
def test_equal_cost(tiny_experiment):
    result = run("equal_cost.py", "--experiment", tiny_experiment, "--suite", tiny_experiment.parent.parent / "suite")
    (row,) = result["seeds"]
    assert row["items"] == 20
    assert row["gain"][0] == pytest.approx(row["champion"] - row["base"])
    assert row["over_sft"][0] == pytest.approx(row["champion"] - row["sft"])
    assert row["sft_train_tokens"] == pytest.approx(row["train_tokens"], rel=0.1)
    assert result["not_below_sft"] == (row["over_sft"][2] >= 0)


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_help_needs_no_model(script):
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), "--help"], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert b"JSON" in done.stdout
