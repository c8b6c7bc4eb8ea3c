"""kill -9 at random moments, on launcher, kernel or both: the continuation ends in the same population."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from support import write_tiny_experiment

from agentlab import Lab
from agentlab.tracking import configure

pytestmark = pytest.mark.notebook


def evolve(experiment, **options):
    command = [sys.executable, "-m", "agentlab", "evolve", str(experiment)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def finish(experiment):
    process = evolve(experiment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def two_generations(folder, tiny_model):
    """The tiny experiment, a generation shorter: each costs a kernel's start."""
    experiment = write_tiny_experiment(folder, tiny_model)
    experiment.write_text(experiment.read_text().replace("generations: 3", "generations: 2"))
    return experiment


def population(lab):
    """Everything that has to be the same: who was bred how, with which bytes, who stayed, who won."""
    lineage = [
        (c.genome.model_dump(), c.state, c.weights_sha256, c.score and c.score.item_scores, c.fitness)
        for c in lab.run.candidates()
    ]
    results = [(r.members, r.pool, r.culled, r.champion) for r in lab.run.results()]
    sealed = lab.run.sealed()
    return lineage, results, sealed and (sealed.champion_sha256, sealed.champion_score.answers, sealed.openings)


def mlflow_counts(lab):
    client = configure(lab.run.root)
    experiment = client.get_experiment_by_name(lab.run.settings.name)
    kinds = {}
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        assert run.info.status == "FINISHED", run.data.tags
        key = (run.data.tags["agentlab.kind"], run.data.tags.get("agentlab.adapter_id", ""))
        kinds[key] = kinds.get(key, 0) + 1
    return kinds


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_model):
    """An undisturbed run, how long it took, and what came out."""
    experiment = two_generations(tmp_path_factory.mktemp("reference"), tiny_model)
    started = time.monotonic()
    finish(experiment)
    return time.monotonic() - started, Lab.open(experiment)


def kill_and_continue(folder, tiny_model, reference, seed):
    duration, undisturbed = reference
    rng = random.Random(seed)
    # the suite's path is part of the settings, and so of the run's hash: the same name, in another folder
    experiment = two_generations(folder, tiny_model)
    victim = ("launcher", "kernel", "both")[seed % 3]
    process = evolve(experiment)
    time.sleep(rng.uniform(0.05, 0.95) * duration)
    children = []
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
    targets = {"launcher": [], "kernel": children, "both": children}[victim]
    if victim != "kernel" or not children:
        os.kill(process.pid, signal.SIGKILL)
    for child in targets:
        child.kill()
    process.communicate(timeout=120)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, f"{alive} outlived the launcher"
    finish(experiment)
    lab = Lab.open(experiment)
    assert population(lab) == population(undisturbed), f"seed {seed}, {victim} killed"
    assert mlflow_counts(lab) == mlflow_counts(undisturbed)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_continues_to_the_same_population(tmp_path, tiny_model, reference, seed):
    kill_and_continue(tmp_path, tiny_model, reference, seed)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_twenty_kills_twenty_continuations(tmp_path, tiny_model, reference):
    for seed in range(100, 120):
        kill_and_continue(tmp_path / str(seed), tiny_model, reference, seed)


@pytest.mark.timeout(300)
def test_sigterm_stops_cleanly_and_can_be_continued(tmp_path, tiny_model, reference):
    experiment = two_generations(tmp_path, tiny_model)
    process = evolve(experiment)
    lab = Lab.open(experiment)
    while not any(event.kind == "bred" for event in lab.run.journal.replay()):
        time.sleep(0.05)
        assert process.poll() is None
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 8, output
    assert "continue with: agentlab evolve" in output
    assert list(lab.run.journal.replay())[-1].kind == "stopped"
    finish(experiment)
    assert population(lab) == population(reference[1])
