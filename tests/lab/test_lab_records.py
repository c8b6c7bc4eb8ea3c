"""What lies on disk and what has changed since: kills after a result, other suites, damaged and missing files."""

import contextlib
import dataclasses
import json
import shutil

import pytest
from support import write_suite, write_tiny_experiment

from agentlab import Lab, files
from agentlab.errors import EvolutionStopped, ModelError, RunError, StorageError
from agentlab.events import (
    EvolutionStarted,
    GenerationFailed,
    GenerationStarted,
    Journal,
    Stopped,
    TrainingStarted,
    Warned,
)
from agentlab.evolution.fitness import stored_rates
from agentlab.evolution.generation import run_generation

SETTINGS = ["population.generations=2", "population.size=3", "population.pool=2"]


@pytest.fixture(scope="module")
def untidied(tmp_path_factory, tiny_model):
    """A run that was killed right after the result of its first generation was written."""
    lab = Lab.open(write_tiny_experiment(tmp_path_factory.mktemp("project"), tiny_model), SETTINGS)
    lab._books.open()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("agentlab.evolution.generation.tidy", lambda run, result: kill())
        with pytest.raises(KeyboardInterrupt):
            run_generation(lab.run, lab.suite, 0, lambda event: None)
    return lab


def kill():
    raise KeyboardInterrupt


@pytest.fixture
def lab(untidied, tmp_path):
    """A copy of that run in a project of its own."""
    shutil.copytree(untidied.run.root, tmp_path / "project")
    return Lab.open(tmp_path / "project" / "experiments" / untidied.experiment.name, SETTINGS)


def test_a_kill_right_after_the_result_leaves_nothing_undone(lab):
    (culled,) = lab.run.result(0).culled
    weights = lab.run.adapter_folder(culled) / "adapter_model.safetensors"
    assert weights.exists()
    assert {lab.run.candidate(name).state for name in lab.run.result(0).members} == {"evaluated"}
    assert [type(event) for event in lab.evolve(generations=0)] == [EvolutionStarted]
    assert not weights.exists()
    assert lab.run.candidate(culled).state == "culled"
    assert {lab.run.candidate(name).state for name in lab.run.result(0).pool} == {"kept"}
    assert (lab.run.generation_folder(0) / "lineage.html").exists()


def test_a_culled_adapter_whose_card_is_gone_keeps_nobody_from_going_on(lab):
    (culled,) = lab.run.result(0).culled
    shutil.rmtree(lab.run.adapter_folder(culled))
    assert [type(event) for event in lab.evolve(generations=0)] == [EvolutionStarted]
    assert lab.run.candidate(culled).state == "culled"


def test_tables_that_a_kill_left_out_are_written(lab):
    list(lab.evolve(generations=0))
    table = lab.run.generation_folder(0) / "errors.csv"
    table.unlink()
    list(lab.evolve(generations=0))
    assert table.exists()


def test_what_a_person_pruned_stays_pruned(lab):
    from agentlab.adapters import Pool

    list(lab.evolve(generations=0))
    pruned = lab.run.result(0).pool[-1]
    Pool(lab.run.folder / "adapters").cull(pruned)
    list(lab.evolve(generations=0))
    assert lab.run.candidate(pruned).state == "culled"


def test_a_changed_suites_items_are_not_shown_beside_old_answers(lab, tmp_path):
    from agentlab.tasks import load

    assert not lab._books.suite_changed()
    assert "goat 0" in lab.report(tmp_path / "report.html").read_text()
    other = write_suite(tmp_path / "suite", {"train": 24, "fitness": 12, "gate": 20, "test": 20}, labels=("a", "z"))
    changed = Lab(lab.run, load(str(other), tmp_path), lab.experiment)
    assert changed._books.suite_changed()
    assert "goat 0" not in changed.report(tmp_path / "report.html").read_text()
    with pytest.raises(RunError, match="its suite has changed since"):
        changed.baseline()


def test_a_baseline_without_a_comparison_is_refused_before_anything_is_loaded(lab, monkeypatch):
    monkeypatch.setattr("agentlab.evolution.bench.open_bench", lambda *_: pytest.fail("loaded"))
    with pytest.raises(RunError, match="is not finished, so there is no sealed comparison"):
        lab.baseline()


def test_a_baseline_looks_for_the_stop_file(lab, monkeypatch):
    asked = []

    @contextlib.contextmanager
    def bench(run, suite, emit, should_stop):
        assert lab.stop()
        asked.append(should_stop())
        yield None

    monkeypatch.setattr(lab, "_check_baseline", lambda: None)
    monkeypatch.setattr("agentlab.evolution.bench.open_bench", bench)
    monkeypatch.setattr("agentlab.evolution.baseline.equal_cost_sft", lambda bench: "result")
    assert lab.baseline() == "result"
    assert asked == [True]
    assert not lab.run.stop_file.exists()


class Troubled:
    """A recorder whose store fails just when the generation ends."""

    def __init__(self):
        self.problems = []

    def interrupted(self, *_):
        self.problems.append("MLflow cannot be written")


@pytest.mark.parametrize(
    ("end", "last"), [(EvolutionStopped("asked"), Stopped), (ModelError("gone"), GenerationFailed)]
)
def test_what_ends_a_generation_is_the_journals_last_word(lab, end, last):
    before = lab.run.journal.size()
    shown = lab._books.take(end, Troubled(), 0)
    assert [type(event) for event in shown] == [Warned, last]
    assert list(lab.run.journal.replay(before)) == shown


def test_a_second_ctrl_c_loses_no_end(lab):
    class Interrupted(Troubled):
        def interrupted(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab._books.take(ModelError("gone"), Interrupted(), 0)
    assert [type(event) for event in lab.run.journal.replay()][-1] is GenerationFailed


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("generations/000/population.json", "[{}]", lambda run: run.population(0)),
        ("generations/000/population.json", "[]", lambda run: run.population(0)),
        ("generations/000/population.json", "null", lambda run: run.population(0)),
        ("plan.json", "{}", lambda run: run.planned_mib()),
        ("plan.json", '{"models": []}', lambda run: run.planned_mib()),
        ("rates.json", "[]", stored_rates),
        ("rates.json", '{"prefill_tokens_per_s": 0, "decode_tokens_per_s": 1}', stored_rates),
        ("model.json", "[]", lambda run: run.rung()),
        ("model.json", "{}", lambda run: run.rung()),
        ("seal-openings.json", "{}", lambda run: run.openings()),
        ("seal-openings.json", "[1]", lambda run: run.openings()),
    ],
)
def test_json_that_is_something_else_is_a_damaged_record(lab, name, text, read):
    files.write_text(lab.run.folder / name, text)
    with pytest.raises(StorageError, match=rf"{name.rpartition('/')[2]} is damaged .*restore it from a copy"):
        read(lab.run)


def test_the_record_of_a_parent_that_is_gone_is_named_and_nobody_takes_its_place(lab):
    parent = lab.run.result(0).pool[0]
    path = lab.run.generation_folder(0) / f"{parent}.json"
    path.unlink()
    with pytest.raises(StorageError, match=rf"{parent}\.json is missing, and its generation is finished"):
        run_generation(lab.run, lab.suite, 1, lambda event: None)


def test_time_of_earlier_attempts_counts_and_pauses_do_not(lab):
    journal = lab.run.journal
    lab.run.journal.path.unlink(missing_ok=True)
    begun = {"pid": 1, "continued": False}
    training = TrainingStarted(candidate="g001-c00", steps=1, learning_rate=1e-3, rank=4)
    for event in (
        GenerationStarted(generation=0, time_s=0, **begun),
        dataclasses.replace(training, time_s=50),
        GenerationStarted(generation=1, time_s=100, **begun),
        dataclasses.replace(training, time_s=130),  # killed
        EvolutionStarted(run="x", name="x", generations=2, population=3, continued=True, time_s=5_000),
        GenerationStarted(generation=1, time_s=5_010, **begun),
        dataclasses.replace(training, time_s=5_025),
        Stopped(reason="asked", time_s=5_030),
        Warned(message="memory is not planned", time_s=8_999),
        GenerationStarted(generation=1, time_s=9_000, **begun),  # the notebook, by hand
        dataclasses.replace(training, time_s=9_500),
    ):
        journal.append(event)
    assert isinstance(journal, Journal)
    assert lab.run.seconds_before(1) == 30 + 20


def test_an_old_model_record_without_a_rung_is_read(lab):
    record = json.loads((lab.run.folder / "model.json").read_text())
    files.write_text(lab.run.folder / "model.json", json.dumps({"name": record["name"], "sha256": record["sha256"]}))
    assert (lab.run.model().engine, lab.run.rung()) == ("transformers", None)
