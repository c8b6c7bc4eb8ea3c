"""Kills simulated by raising out of `emit`: whatever was on disk then, the same call finishes the generation."""

import contextlib
import resource
import shutil

import pytest
from evolution_helpers import LEARNING, Crash, evolve, lineage, weight_hashes
from support import write_tiny_experiment

from agentlab.errors import EvolutionStopped, RunError, StorageError
from agentlab.evolution.generation import run_generation
from agentlab.evolution.run import Run
from agentlab.lab import Lab

OVERRIDES = [*LEARNING, "population.generations=2"]
POSITIONS = [f"{index / 14:.2f}" for index in range(15)]  # of the last generation's events, as shares


@pytest.fixture(scope="module")
def begun(tiny_model, tmp_path_factory):
    """A run whose first of two generations is finished."""
    lab = Lab.open(write_tiny_experiment(tmp_path_factory.mktemp("begun"), tiny_model), OVERRIDES)
    evolve(lab, generations=[0])
    return lab


def copy_of(lab, folder):
    """The run as it is now, in another project; its settings and so its hash stay."""
    run = Run(folder, lab.run.settings, lab.run.run_hash, lab.run.suite_folder)
    shutil.copytree(lab.run.folder, run.folder)
    return Lab(run, lab.suite, lab.experiment)


@pytest.fixture(scope="module")
def reference(begun, tmp_path_factory):
    """The undisturbed outcome, and the events that led to it."""
    lab, events = copy_of(begun, tmp_path_factory.mktemp("reference")), []
    evolve(lab, events.append, [1])
    assert lab.run.sealed() is not None  # so that the sealed comparison is interrupted too
    return lab.run, events


def crash_after(count, seen):
    def emit(event):
        seen.append(event)
        if len(seen) == count:
            raise Crash

    return emit


def sealed_numbers(run):
    sealed = run.sealed()
    return sealed.champion, sealed.items, sealed.gain, sealed.base.answers, sealed.champion_score.answers


@pytest.mark.parametrize("position", POSITIONS)
def test_a_killed_generation_finishes_the_same(begun, reference, tmp_path, position):
    expected, events = reference
    lab, seen = copy_of(begun, tmp_path), []
    with pytest.raises(Crash):
        evolve(lab, crash_after(1 + round(float(position) * (len(events) - 1)), seen), [1])
    trained_before = {c.genome.candidate for c in lab.run.candidates() if c.state != "bred"}
    genomes_before = lab.run.population(1)
    again = []
    evolve(lab, again.append, [1])
    assert lineage(lab.run) == lineage(expected)
    assert weight_hashes(lab.run) == weight_hashes(expected)
    assert genomes_before in (None, lab.run.population(1))
    assert not trained_before & {event.candidate for event in again if event.kind == "training_started"}
    assert sealed_numbers(lab.run) == sealed_numbers(expected)
    assert lab.run.sealed().openings == 1
    assert not list(lab.run.folder.rglob("*.tmp"))


@contextlib.contextmanager
def files_of_at_most(size):
    """What the kernel refuses here is a file's growth; a full disk takes the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_ever_larger_files_costs_time_alone(begun, reference, tmp_path):
    expected, _ = reference
    lab, refused = copy_of(begun, tmp_path), []
    for size in (0, 500, 2_000, 5_000, 20_000):
        try:
            with files_of_at_most(size):
                evolve(lab, generations=[1])
        except StorageError as error:
            refused.append(str(error))
    evolve(lab, generations=[1])
    assert len(refused) >= 3
    assert all("cannot write" in sentence and "run the same command again" in sentence for sentence in refused)
    assert lineage(lab.run) == lineage(expected)
    assert weight_hashes(lab.run) == weight_hashes(expected)
    assert not list(lab.run.folder.rglob("*.tmp"))


def test_killed_again_and_again_still_finishes_the_same(begun, reference, tmp_path):
    """Each attempt is killed a few events after it began new work; only durable progress carries over."""
    expected, _ = reference
    lab = copy_of(begun, tmp_path)
    trained = []
    for _ in range(40):
        seen = []

        def emit(event, seen=seen):
            seen.append(event)
            if event.kind in ("bred", "trained", "evaluated", "gate_decided", "selected", "seal_opened"):
                raise Crash

        try:
            evolve(lab, emit, [1])
        except Crash:
            trained += [event.candidate for event in seen if event.kind == "trained"]
            if [event.kind for event in seen][-1] == "evaluated":  # its score was not saved: let it through
                evolve_past(lab)
            continue
        break
    evolve(lab, generations=[1])
    assert len(trained) == len(set(trained))
    assert lineage(lab.run) == lineage(expected)
    assert weight_hashes(lab.run) == weight_hashes(expected)


def evolve_past(lab):
    """One more attempt that survives one evaluation."""
    seen = []

    def emit(event):
        seen.append(event.kind)
        if seen.count("evaluated") == 2:
            raise Crash

    with contextlib.suppress(Crash):
        evolve(lab, emit, [1])


def test_a_finished_generation_is_only_tidied(begun, reference, tmp_path):
    run, _ = reference
    lab = copy_of(Lab(run, begun.suite, begun.experiment), tmp_path)
    victim = lab.run.result(1).culled[0]
    card = lab.run.adapter_folder(victim) / "card.json"
    before = {path: path.read_bytes() for path in lab.run.folder.rglob("*") if path.is_file()}
    (lab.run.adapter_folder(victim) / "adapter_model.safetensors").write_bytes(b"left by a kill")
    candidate = lab.run.candidate(victim)
    lab.run.save_candidate(candidate.model_copy(update={"state": "evaluated"}))
    events = []
    evolve(lab, events.append, [0, 1])
    assert [event.kind for event in events] == ["generation_started", "generation_finished"] * 2
    assert before == {path: path.read_bytes() for path in lab.run.folder.rglob("*") if path.is_file()}
    assert card.exists()


@pytest.mark.parametrize("polls", [1, 4, 30, 60])
def test_a_stop_request_leaves_a_run_that_continues_to_the_same(begun, reference, tmp_path, polls):
    expected, _ = reference
    lab, asked = copy_of(begun, tmp_path), []

    def should_stop():
        asked.append(True)
        return len(asked) >= polls

    with pytest.raises(EvolutionStopped, match="stopped while"):
        run_generation(lab.run, lab.suite, 1, lambda event: None, should_stop)
    assert lab.run.result(1) is None or lab.run.sealed() is None
    evolve(lab, generations=[1])
    assert lineage(lab.run) == lineage(expected)
    assert weight_hashes(lab.run) == weight_hashes(expected)


def test_generations_come_in_order_and_within_the_plan(begun, tmp_path):
    lab = copy_of(begun, tmp_path)
    with pytest.raises(RunError, match="allowed: 0 to 1"):
        evolve(lab, generations=[2])
    shutil.rmtree(lab.run.generation_folder(0))
    with pytest.raises(RunError, match=r"generation 0 of tiny/.* is not finished"):
        evolve(lab, generations=[1])
