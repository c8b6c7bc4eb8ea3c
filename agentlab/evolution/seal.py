"""The one place that opens a suite's `test` split.

A list of models, frozen by their hashes, answers it; the answers are kept, so that every report shows the same ones,
and each opening is counted and written down before the first item is read.
"""

from agentlab import files
from agentlab.events import SealedComparison, SealOpened
from agentlab.evolution.bench import Bench
from agentlab.evolution.fitness import evaluate
from agentlab.evolution.run import Run
from agentlab.evolution.stats import paired_gain
from agentlab.records import BASE, Score, SealedResult
from agentlab.tasks import Item, Suite


def open_for(bench: Bench, models: dict[str, str]) -> int:
    """Write down that these models (name → sha256) are about to answer the sealed split; how often it was opened.

    The same list, interrupted before, is the same opening.
    """
    opened, frozen = bench.run.openings(), list(models.values())
    if frozen not in opened:
        opened.append(frozen)
        files.write_json(bench.run.folder / "seal-openings.json", opened)
    bench.emit(SealOpened(models=list(models), opening=len(opened)))
    return len(opened)


def answer(bench: Bench, model: str) -> Score:
    """One model's answers to the sealed items; `open_for` comes first, and an adapter must be loaded in the engine."""
    return evaluate(
        bench.engine,
        bench.suite,
        bench.suite.open_test(),
        "test",
        model,
        bench.run.settings,
        bench.rates,
        bench.limit,
        batch_size=bench.batch_size,
        latency_items=2 * bench.run.settings.evaluation.latency_items,
        emit=bench.emit,
        should_stop=bench.should_stop,
    )


def compare(bench: Bench, champion: str) -> SealedResult:
    """Base against champion on the sealed split; the kept result if these two were compared before.

    The champion must be loaded in the engine. An opening that was interrupted is finished, not counted again.
    """
    run, emit = bench.run, bench.emit
    base_sha256, champion_sha256 = bench.engines.model_files.sha256, bench.pool.card(champion).weights_sha256 or ""
    kept = run.sealed()
    if kept is not None and kept.champion_sha256 == champion_sha256:
        return kept
    opened = open_for(bench, {BASE: base_sha256, champion: champion_sha256})
    base, best = answer(bench, BASE), answer(bench, champion)
    gain, low, high = paired_gain(best.item_scores, base.item_scores)
    result = SealedResult(
        champion=champion,
        champion_sha256=champion_sha256,
        items=len(base.item_scores),
        base=base,
        champion_score=best,
        gain=gain,
        gain_ci_low=low,
        gain_ci_high=high,
        openings=opened,
    )
    run.save_sealed(result)
    emit(
        SealedComparison(
            champion=champion,
            items=len(base.item_scores),
            base_accuracy=base.accuracy,
            champion_accuracy=best.accuracy,
            gain=gain,
            gain_ci_low=low,
            gain_ci_high=high,
            openings=opened,
        )
    )
    return result


def opened_items(run: Run, suite: Suite) -> list[Item]:
    """The sealed items for showing kept answers beside them; none before the comparison was made."""
    return suite.open_test() if run.sealed() is not None else []
