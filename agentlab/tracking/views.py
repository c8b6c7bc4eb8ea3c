"""What MLflow should show, derived from a run's folder: pure values, nothing is written here."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from agentlab.config import Settings
from agentlab.evolution.run import Run
from agentlab.records import BASE, Candidate, GenerationResult, SealedResult, Verdict
from agentlab.tracking.timeline import Span, Status, Timeline


@dataclasses.dataclass(frozen=True)
class SuiteInfo:
    """The suite as MLflow's dataset inputs need it: `counts` is the number of items of each split."""

    name: str
    digest: str
    folder: str | None
    counts: dict[str, int]


@dataclasses.dataclass
class RunView:
    """One MLflow run as it should be. `curves`: metric → step → value."""

    key: str  # "evolution", "generation-2" or an adapter id
    parent: str | None
    name: str
    status: Status
    tags: dict[str, str]
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    curves: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
    splits: dict[str, str] = dataclasses.field(default_factory=dict)  # split used → context
    span: Span | None = None


def key_of(tags: Mapping[str, str]) -> str:
    """The key of the view that an MLflow run with these tags belongs to."""
    kind = tags.get("agentlab.kind", "")
    if kind == "candidate":
        return tags.get("agentlab.adapter_id", "")
    return f"generation-{tags.get('agentlab.generation')}" if kind == "generation" else kind


def evolution(
    run: Run,
    timeline: Timeline,
    results: list[GenerationResult],
    fitness: Mapping[str, float],
    sealed: SealedResult | None,
) -> RunView:
    """The run of the whole evolution: settings, fitness by generation, the sealed comparison."""
    champion = results[-1].champion if results else BASE
    bred_all = len(results) == run.settings.population.generations
    complete = bred_all and (champion == BASE or (sealed is not None and sealed.champion == champion))
    curves: dict[str, dict[int, float]] = {}
    for result in results:
        for name, value in _fitness_metrics(result, fitness).items():
            curves.setdefault(name, {})[result.generation] = value
    return RunView(
        key="evolution",
        parent=None,
        name=run.id,
        status=timeline.evolution({result.generation for result in results}, complete),
        tags={"agentlab.run": run.id, "agentlab.kind": "evolution", "agentlab.champion": champion},
        params=flat_settings(run.settings),
        metrics=_planned_metrics(run) | (_sealed_metrics(sealed) if sealed else {}),
        curves=curves,
        splits={"test": "eval"} if sealed else {},
        span=timeline.spans.get("evolution"),
    )


def _planned_metrics(run: Run) -> dict[str, float]:
    """What evaluating and training were planned to take, to compare with the candidates' peaks."""
    planned = run.planned_mib() or {}
    return {f"planned_{name}_mib": planned[name] for name in ("evaluate", "train") if name in planned}


def _sealed_metrics(sealed: SealedResult) -> dict[str, float]:
    metrics: dict[str, float] = {"test_items": sealed.items, "test_openings": sealed.openings}
    for name, score in (("base", sealed.base), ("champion", sealed.champion_score)):
        metrics[f"test_accuracy_{name}"] = score.accuracy
        metrics[f"test_accuracy_{name}_ci_low"] = score.accuracy_ci_low
        metrics[f"test_accuracy_{name}_ci_high"] = score.accuracy_ci_high
    return metrics | {
        "test_gain": sealed.gain,
        "test_gain_ci_low": sealed.gain_ci_low,
        "test_gain_ci_high": sealed.gain_ci_high,
    }


def generation(
    run: Run, timeline: Timeline, index: int, result: GenerationResult | None, fitness: Mapping[str, float]
) -> RunView:
    """The run of one generation: its fitness, the gate's verdict, who is champion."""
    key = f"generation-{index}"
    tags = {"agentlab.run": run.id, "agentlab.kind": "generation", "agentlab.generation": str(index)}
    metrics: dict[str, float] = {}
    splits = {"train": "training", "fitness": "eval"}
    if result is not None:
        tags |= {
            "agentlab.champion": result.champion,
            "agentlab.pool": ",".join(result.pool),
            "agentlab.culled": ",".join(result.culled),
        }
        metrics = _fitness_metrics(result, fitness) | {"seconds": result.seconds}
        if result.verdict is not None:
            splits["gate"] = "eval"
            tags |= {
                "agentlab.verdict": result.verdict.verdict,
                "agentlab.challenger": result.verdict.challenger,
                "agentlab.incumbent": result.verdict.incumbent,
            }
            metrics |= _gate_metrics(result.verdict)
    return RunView(
        key=key,
        parent="evolution",
        name=f"generation {index}",
        status=timeline.generation(index, finished=result is not None),
        tags=tags,
        metrics=metrics,
        splits=splits,
        span=timeline.spans.get(key),
    )


def _gate_metrics(verdict: Verdict) -> dict[str, float]:
    names = (
        "wins", "losses", "items", "challenger_accuracy", "incumbent_accuracy",
        "p_value", "alpha", "detectable_gain", "passed",
    )  # fmt: skip
    return {f"gate_{name}": float(getattr(verdict, name)) for name in names}


def _fitness_metrics(result: GenerationResult, fitness: Mapping[str, float]) -> dict[str, float]:
    values = [fitness[member] for member in result.members if member in fitness]
    return {"best_fitness": max(values), "mean_fitness": sum(values) / len(values)} if values else {}


def candidate(run: Run, timeline: Timeline, value: Candidate, generation_finished: bool) -> RunView:
    """The run of one candidate: its genome, training curve and scores."""
    genome = value.genome
    tags = {"agentlab.kind": "candidate", **lineage_tags(run, value)}
    if value.reason:
        tags["agentlab.reason"] = value.reason
    splits: dict[str, str] = {}
    curves: dict[str, dict[int, float]] = {}
    if value.training is not None:
        splits["train"] = "training"
        curves["loss"] = dict(enumerate(value.training.losses, start=1))
        if value.training.remedies:
            tags["agentlab.remedies"] = json.dumps(value.training.remedies, ensure_ascii=False)
    if value.score is not None:
        splits["fitness"] = "eval"
    return RunView(
        key=genome.candidate,
        parent=f"generation-{genome.generation}",
        name=genome.candidate,
        status=timeline.candidate(genome.candidate, value.state, generation_finished),
        tags=tags,
        params=flat_genome(value),
        metrics=candidate_metrics(run.settings, value),
        curves=curves,
        splits=splits,
        span=timeline.spans.get(genome.candidate),
    )


def lineage_tags(run: Run, value: Candidate) -> dict[str, str]:
    """Tags that a candidate's MLflow run and its LoggedModel share."""
    genome = value.genome
    return {
        "agentlab.run": run.id,
        "agentlab.adapter_id": genome.candidate,
        "agentlab.parents": ",".join(genome.parents),
        "agentlab.operator": genome.operator,
        "agentlab.generation": str(genome.generation),
        "agentlab.state": value.state,
        "agentlab.advisor": genome.advisor,
    }


def candidate_metrics(settings: Settings, value: Candidate) -> dict[str, float]:
    """What is known of a candidate in numbers; what was not measured is left out."""
    metrics: dict[str, float | None] = {}
    if value.training is not None:
        metrics |= {
            "train_seconds": value.training.train_seconds,
            "train_tokens": value.training.train_tokens,
            "train_remedies": len(value.training.remedies),
        }
        if value.training.ram_peak_mib:
            metrics |= {
                "train_vram_peak_mib": value.training.vram_peak_mib, "train_ram_peak_mib": value.training.ram_peak_mib
            }  # fmt: skip
    if value.score is not None:
        score = value.score
        for name in (
            "fitness", "accuracy", "accuracy_ci_low", "accuracy_ci_high", "latency_estimated_s", "latency_p50_s",
            "latency_p95_s", "vram_peak_mib", "ram_peak_mib", "eval_seconds",
        ):  # fmt: skip
            metrics[name] = getattr(score, name)
        if score.latency_p95_s is not None:
            metrics["latency_target_met"] = float(score.latency_p95_s <= settings.budget.latency_s)
    return {name: float(number) for name, number in metrics.items() if number is not None}


def flat_genome(value: Candidate) -> dict[str, str]:
    """A genome as MLflow params; the relative weight of each group of training items is `data_mix.<group>`."""
    return _flat(value.genome.model_dump(mode="json"))


def flat_settings(settings: Settings) -> dict[str, str]:
    """All settings as MLflow params, keys as in the YAML: `training.steps`."""
    return _flat(settings.model_dump(mode="json"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = prefix + re.sub(r"[^\w\-. :]", "_", str(key))  # what MLflow allows, but no paths
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, list):
            flat[name] = ",".join(str(part) for part in value)
        else:
            flat[name] = "null" if value is None else str(value)
    return flat


def same(a: float | None, b: float) -> bool:
    """Equal as MLflow stores numbers: NaN equals NaN."""
    return a is not None and (a == b or (math.isnan(a) and math.isnan(b)))
