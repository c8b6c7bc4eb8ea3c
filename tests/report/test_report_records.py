"""Tables, figures, tree and summary: what they show is what the records say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentlab import files
from agentlab.errors import RunError
from agentlab.evolution.run import Run
from agentlab.records import BASE, BaselineResult
from agentlab.report import figures
from agentlab.report.lineage import _layout
from agentlab.report.summary import headline, summary
from agentlab.report.tables import COLUMNS, candidates_table, error_table
from agentlab.report.tree import WIDTH, family_tree
from agentlab.report.words import clean, duration, width

GOLDEN = Path(__file__).parent / "golden"
ANY_STATE = ["base_run", "half_run", "failed_run", "base_champion_run", "full_run"]


@pytest.fixture(params=["empty", *ANY_STATE])
def any_run(request: pytest.FixtureRequest) -> Run:
    """A run in every state that a person may ask about."""
    if request.param == "empty":
        return request.getfixturevalue("new_run")()
    return request.getfixturevalue(request.param)


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8"), "UPDATE_GOLDEN=1 rewrites it; explain the change"


def test_candidates_table_equals_the_records(full_run: Run) -> None:
    table = candidates_table(full_run).set_index("candidate")
    assert len(table) == 13
    for candidate in full_run.candidates():
        row = table.loc[candidate.genome.candidate]
        assert row["state"] == candidate.state
        assert row["learning_rate"] == candidate.genome.learning_rate
        if candidate.score:
            assert (row["accuracy"], row["ci_low"], row["ci_high"], row["fitness"]) == (
                candidate.score.accuracy, candidate.score.accuracy_ci_low, candidate.score.accuracy_ci_high,
                candidate.score.fitness,
            )  # fmt: skip
    assert table.loc["g000-c03", "reason"].startswith("loss is NaN")
    assert table.loc["g000-c03", ["accuracy", "train_tokens"]].isna().all()
    assert list(table.index[table["champion"]]) == ["g002-c01"]
    assert table.loc["g002-c01", "parents"] == "g001-c00, g001-c02"
    assert table.loc["g002-c01", "merge_weights"] == "0.620, 0.380"


def test_candidates_table_has_the_same_columns_in_every_state(any_run: Run) -> None:
    table = candidates_table(any_run)
    assert list(table.columns) == COLUMNS
    assert table["accuracy"].dtype == float


def test_error_table_has_the_failures_with_the_bases_answers(full_run: Run) -> None:
    prompts = {f"id-{i}": f"prompt {i}" for i in range(100)}
    table = error_table(full_run, "g002-c01", "gate", prompts, {"99": "right"})
    score, base = full_run.score("g002-c01", "gate"), full_run.score(BASE, "gate")
    assert score
    assert base
    assert list(table["item"]) == [i for i, s in enumerate(score.item_scores) if s < 1]
    last = table.iloc[-1]
    assert (last["prompt"], last["expected"], last["answer"]) == ("prompt 99", "right", score.answers[99])
    assert last["base_answer"] == base.answers[99]
    assert len(error_table(full_run, "g002-c01", "test")) == 13
    assert len(error_table(full_run, BASE, "test")) == 196


def test_error_table_of_a_model_without_answers_is_refused(full_run: Run) -> None:
    with pytest.raises(RunError, match="g000-c00 has no answers on the gate split"):
        error_table(full_run, "g000-c00", "gate")


def traces(figure: object, name: str) -> list[dict]:  # type: ignore[type-arg]
    return [trace for trace in figure.to_plotly_json()["data"] if trace.get("name") == name]  # type: ignore[attr-defined]


def test_fitness_figure_shows_every_score_and_interval(full_run: Run) -> None:
    figure = figures.fitness_by_generation(full_run)
    scored = {round(c.fitness, 9): c.score for c in full_run.candidates() if c.score}
    shown = 0
    for trace in traces(figure, "kept so far") + traces(figure, "culled"):
        for y, up, down in zip(trace["y"], trace["error_y"]["array"], trace["error_y"]["arrayminus"], strict=True):
            score = scored[round(y, 9)]
            assert y + up == pytest.approx(score.accuracy_ci_high)
            assert y - down == pytest.approx(score.accuracy_ci_low)
            shown += 1
    assert shown == 12
    assert len(traces(figure, "failed, no score")[0]["x"]) == 1
    assert traces(figure, "best so far")[0]["y"] == [19 / 32] * 2 + [24 / 32] * 2 + [30 / 32] * 2
    assert traces(figure, "base model 0.011")


def test_lineage_has_an_edge_per_parent_with_its_weight(full_run: Run) -> None:
    figure = figures.lineage(full_run)
    hovers = [text for trace in figure.to_plotly_json()["data"] for text in (trace.get("text") or []) if "→" in text]
    assert "g001-c02 → g002-c01<br>merge weight 38 %" in hovers
    assert len(hovers) == sum(len(c.genome.parents) for c in full_run.candidates())
    assert traces(figure, "champion")
    failed = [t for t in traces(figure, "failed") if t["x"] != [None]]
    assert failed[0]["marker"]["symbol"] == "x"


def test_a_blend_stands_beside_its_parents_and_keeps_no_place_from_siblings(full_run: Run) -> None:
    candidates = full_run.candidates()
    first, second, *_ = [c for c in candidates if c.genome.generation == 1]
    names = [first.genome.candidate, second.genome.candidate]
    genome = first.genome.model_copy(update={"candidate": "g001-c09", "operator": "blend", "parents": names})
    without, spots = _layout(candidates), _layout([*candidates, first.model_copy(update={"genome": genome})])
    assert {name: place for name, place in spots.items() if name != "g001-c09"} == without
    x, y = spots["g001-c09"]
    assert 1 < x < 1.5
    assert y == (spots[names[0]][1] + spots[names[1]][1]) / 2


@pytest.mark.parametrize(("steps", "ticks"), [(3, 1), (200, None)])
def test_few_training_steps_are_named_once_each(full_run: Run, steps: int, ticks: int | None) -> None:
    for genome in full_run.population(0) or []:
        candidate = full_run.candidate(genome.candidate)
        training = candidate.training and candidate.training.model_copy(update={"losses": [1.0] * steps})
        full_run.save_candidate(candidate.model_copy(update={"training": training}))
    assert figures.training_curves(full_run, 0).layout.xaxis.dtick == ticks


def test_generation_figures_show_the_records(full_run: Run) -> None:
    curves = figures.training_curves(full_run, 0)
    for candidate in full_run.candidates()[:5]:
        if candidate.training:
            assert traces(curves, candidate.genome.candidate)[0]["y"] == candidate.training.losses
    assert traces(curves, "g000-c02: 1 remedy")
    scores = figures.scores(full_run, 1)
    assert "g000-c01 elite" in traces(scores, "accuracy, 95 % interval")[0]["y"]
    verdict = figures.gate_verdict(full_run, 1).to_plotly_json()
    text = verdict["layout"]["annotations"][0]["text"]
    assert "<b>9</b>" in text
    assert "<b>6</b>" in text
    assert [trace["x"] for trace in verdict["data"]] == [[0.58], [pytest.approx(0.61)]]


def test_tradeoff_uses_the_measured_latency_and_the_target(full_run: Run) -> None:
    figure = figures.tradeoff(full_run)
    base = traces(figure, "base model")[0]
    assert (base["x"], base["y"]) == ([2.41], [1 / 32])
    assert figure.layout.shapes[0].x0 == full_run.settings.budget.latency_s


def test_every_figure_can_be_drawn_in_every_state(any_run: Run) -> None:
    for figure in (figures.fitness_by_generation(any_run), figures.lineage(any_run), figures.tradeoff(any_run)):
        assert figure.to_json()
    for draw in (figures.scores, figures.training_curves, figures.gate_verdict):
        assert draw(any_run, 0).to_json()


def test_no_figure_offers_to_upload_itself(full_run: Run) -> None:
    assert "sendChartToCloud" in figures.lineage(full_run).layout.modebar.remove


def test_tree_golden(full_run: Run) -> None:
    golden("tree.txt", family_tree(full_run))


def test_tree_keeps_its_width_whatever_a_reason_says(full_run: Run) -> None:
    failed = full_run.candidate("g000-c03")
    assert failed
    full_run.save_candidate(failed.model_copy(update={"reason": "メモリが足りません\n\x1b[2J" * 40}))
    lines = family_tree(full_run).splitlines()
    assert max(width(line) for line in lines) <= WIDTH
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("state", [*ANY_STATE])
def test_summary_golden(state: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Run = request.getfixturevalue(state)
    monkeypatch.chdir(run.root)
    (run.generation_folder(0) / "notebook.ipynb").parent.mkdir(parents=True, exist_ok=True)
    (run.generation_folder(0) / "notebook.ipynb").touch()
    text = summary(run, report=run.folder / "report.html", store="sqlite:///mlruns/mlflow.db", commands=["agentlab ui"])
    golden(f"summary-{state}.txt", text)


def test_summary_is_honest_about_a_weak_champion(full_run: Run) -> None:
    sealed = full_run.sealed()
    assert sealed
    weak = sealed.champion_score.model_copy(update={"accuracy": 0.03})
    full_run.save_sealed(
        sealed.model_copy(update={"champion_score": weak, "gain": 0.01, "gain_ci_low": -0.02, "gain_ci_high": 0.04})
    )
    text = summary(full_run)
    assert "below the accuracy threshold of 85.0 %" in text
    assert "The interval includes zero" in text
    assert "may be chance" in headline(full_run)
    full_run.save_sealed(sealed.model_copy(update={"champion": "g000-c01"}))
    assert "The champion is g002-c01 by now" in summary(full_run)


def test_texts_work_in_every_state(any_run: Run) -> None:
    assert any_run.id in summary(any_run)
    assert family_tree(any_run).startswith("base model")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 s"), (59.6, "1 min 00 s"), (432, "7 min 12 s"), (3725, "1 h 02 min"), (None, "–")]
)
def test_duration(value: float | None, text: str) -> None:
    assert duration(value) == text


def test_clean_takes_control_codes_and_bidi_marks_out() -> None:
    assert clean("a\x1b[31m\n\u202eb\x07 東京") == "a[31m b 東京"


def test_the_room_imports_nothing_heavy() -> None:
    code = (
        "import sys, agentlab.report, agentlab.cli.display; "
        "print([m for m in ('plotly', 'pandas', 'rich', 'torch', 'mlflow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_baseline_stands_beside_the_champion_and_its_opening_is_counted(full_run: Run) -> None:
    sealed = full_run.sealed()
    assert sealed
    assert "opened once" in summary(full_run)
    rival = BaselineResult(
        steps=84,
        learning_rate=2e-3,
        train_tokens=1000,
        population_train_tokens=1000,
        score=sealed.base.model_copy(update={"adapter": "plain-sft", "accuracy": 0.5}),
        champion=sealed.champion,
        champion_accuracy=sealed.champion_score.accuracy,
        gain=-0.036,
        gain_ci_low=-0.07,
        gain_ci_high=-0.002,
    )
    full_run.save_baseline(rival)
    files.write_json(full_run.folder / "seal-openings.json", [["base", "champion"], ["plain-sft"]])
    text = summary(full_run)
    assert "opened twice" in text
    assert "one SFT, 84 steps     50.0 %" in text
    assert "champion over it      -3.6 points" in text
    full_run.save_baseline(rival.model_copy(update={"champion": "g000-c00"}))  # measured beside an earlier champion
    assert "one SFT" not in summary(full_run)
