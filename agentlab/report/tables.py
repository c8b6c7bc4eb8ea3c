"""Tables of a run: its candidates, and what a model got wrong."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agentlab.errors import RunError
from agentlab.evolution.run import Run
from agentlab.records import BASE, Candidate, Score

if TYPE_CHECKING:
    import pandas

# column → field of the genome, of the fitness score and of the training record
_GENOME = {
    name: name
    for name in (
        "learning_rate", "steps", "rank", "alpha", "dropout", "batch_size", "weight_noise", "merge_method", "advisor",
        "seed",
    )
}  # fmt: skip
_SCORE = {
    "fitness": "fitness",
    "accuracy": "accuracy",
    "ci_low": "accuracy_ci_low",
    "ci_high": "accuracy_ci_high",
    "latency_p50_s": "latency_p50_s",
    "latency_p95_s": "latency_p95_s",
    "latency_estimated_s": "latency_estimated_s",
    "vram_peak_mib": "vram_peak_mib",
    "ram_peak_mib": "ram_peak_mib",
    "eval_seconds": "eval_seconds",
}
_TRAINING = {
    "train_seconds": "train_seconds",
    "train_tokens": "train_tokens",
    "train_vram_peak_mib": "vram_peak_mib",
    "train_ram_peak_mib": "ram_peak_mib",
}
_OWN = ("candidate", "generation", "operator", "parents", "merge_weights", "state", "champion", "in_pool")
COLUMNS = [*_OWN, *_SCORE, *_GENOME, "mutated", *_TRAINING, "loss_last", "remedies", "reason"]


def candidates_table(run: Run) -> "pandas.DataFrame":
    """One row per candidate in breeding order; what is not known yet is NaN, latency in seconds, memory in MiB."""
    import pandas

    results = run.results()
    pool = results[-1].pool if results else []
    rows = [_row(candidate, run.champion(), pool) for candidate in run.candidates()]
    frame = pandas.DataFrame(rows, columns=COLUMNS)
    for name in (*_SCORE, "loss_last", *(name for name in _TRAINING if name != "train_tokens")):
        frame[name] = frame[name].astype(float)
    frame["train_tokens"] = frame["train_tokens"].astype("Int64")
    return frame


def _row(candidate: Candidate, champion: str, pool: Sequence[str]) -> dict[str, Any]:
    genome, score, training = candidate.genome, candidate.score, candidate.training
    return {
        "candidate": genome.candidate,
        "generation": genome.generation,
        "operator": genome.operator,
        "parents": ", ".join(genome.parents),
        "merge_weights": ", ".join(f"{weight:.3f}" for weight in genome.merge_weights),
        "state": candidate.state,
        "champion": genome.candidate == champion,
        "in_pool": genome.candidate in pool,
        "mutated": ", ".join(genome.mutated),
        "loss_last": training.losses[-1] if training and training.losses else None,
        "remedies": len(training.remedies) if training else 0,
        "reason": candidate.reason,
        **{column: getattr(score, field, None) for column, field in _SCORE.items()},
        **{column: getattr(genome, field) for column, field in _GENOME.items()},
        **{column: getattr(training, field, None) for column, field in _TRAINING.items()},
    }


def error_table(
    run: Run,
    adapter: str,
    split: str = "gate",
    prompts: Mapping[str, str] | None = None,
    expected: Mapping[str, str] | None = None,
) -> "pandas.DataFrame":
    """One row per item of `split` that `adapter` (an id, or "base") did not get fully right, with the base's answer.

    `split` is fitness, gate or test; test comes from the sealed record and is never opened here. `prompts` and
    `expected` map an item's position ("0", "1", …) or its id, in the split's order, to text; columns without a source
    stay empty. Raises RunError if this model has no answers on this split.
    """
    import pandas

    score = score_of(run, adapter, split)
    if score is None:
        raise RunError(f"{adapter} has no answers on the {split} split in {run.folder}; continue the run first")
    base = score_of(run, BASE, split) if adapter != BASE else None
    rows = []
    for item, (points, answer) in enumerate(zip(score.item_scores, score.answers, strict=True)):
        if points >= 1:
            continue
        known = base is not None and item < len(base.answers)
        rows.append(
            {
                "item": item,
                "prompt": text_of(prompts, item),
                "expected": text_of(expected, item),
                "answer": answer,
                "score": points,
                "base_answer": base.answers[item] if base and known else "",
                "base_score": base.item_scores[item] if base and known else float("nan"),
            }
        )
    columns = ["item", "prompt", "expected", "answer", "score", "base_answer", "base_score"]
    return pandas.DataFrame(rows, columns=columns)


def score_of(run: Run, adapter: str, split: str) -> Score | None:
    """A model's recorded score on any split, the sealed one included; None where it never answered it."""
    if split != "test":
        return run.score(adapter, split)
    sealed = run.sealed()
    if sealed is None:
        return None
    if adapter == BASE:
        return sealed.base
    return sealed.champion_score if adapter == sealed.champion else None


def text_of(texts: Mapping[str, str] | None, item: int) -> str:
    """The text for the item at a position, keyed by that position or, in the split's order, by ids; "" if unknown."""
    if not texts:
        return ""
    if (found := texts.get(str(item))) is not None:
        return found
    values = list(texts.values())
    return values[item] if "0" not in texts and item < len(values) else ""
