"""A synthetic run with every kind of record: 13 candidates in three generations, one failed, several culled."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from agentlab import config, files
from agentlab.evolution.run import Run, adapter_id
from agentlab.records import (
    BASE,
    Candidate,
    GenerationResult,
    Genome,
    Score,
    SealedResult,
    Training,
    Verdict,
)

HOSTILE = '<script>document.title="pwned"</script><img src=x onerror=alert(1)>'
ODD_ANSWERS = [HOSTILE, "🦊 emoji ✨ and \u001b[31mred\u001b[0m", "東京の天気は晴れです。" * 3, "word " * 3000, ""]


def wilson(right: float, n: int) -> tuple[float, float]:
    share, z = right / n, 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def make_score(adapter: str, split: str, right: int, items: int, **changes: object) -> Score:
    low, high = wilson(right, items)
    # the failures come last; odd answers sit where readers look first: among the failures
    answers = [f'{{"name": "lookup", "arguments": {{"n": {i}}}}}' for i in range(right)]
    answers += [ODD_ANSWERS[i % len(ODD_ANSWERS)] for i in range(items - right)]
    values: dict[str, object] = {
        "adapter": adapter, "split": split, "suite": "toolcalls", "engine": "transformers/cpu/fp32",
        "item_scores": [1.0] * right + [0.0] * (items - right), "answers": answers,
        "prompt_tokens": [80] * items, "completion_tokens": [24] * items,
        "accuracy": right / items, "accuracy_ci_low": low, "accuracy_ci_high": high,
        "latency_estimated_s": 1.7, "latency_answers": 4 if split == "test" else 2,
        "latency_p50_s": 1.62, "latency_p95_s": 1.94,
        "vram_peak_mib": 0.0, "ram_peak_mib": 1180.0, "eval_seconds": 9.5,
        "fitness": right / items if split == "fitness" else None,
    }  # fmt: skip
    return Score.model_validate(values | changes)


def make_genome(generation: int, index: int, operator: str, parents: list[str], **changes: object) -> Genome:
    weights = [0.62, 0.38] if len(parents) == 2 else [1.0] * len(parents)
    values: dict[str, object] = {
        "candidate": adapter_id(generation, index), "generation": generation, "operator": operator,
        "parents": parents, "merge_weights": weights, "merge_method": "exact", "rank": 16, "alpha": 32.0,
        "dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "learning_rate": 5e-4 * (1 + index / 4), "steps": 8,
        "batch_size": 8, "data_mix": {}, "weight_noise": 0.0, "mutated": [], "seed": 100 * generation + index,
    }  # fmt: skip
    return Genome.model_validate(values | changes)


def make_training(start: float = 2.6, end: float = 0.3, steps: int = 8, remedies: int = 0) -> Training:
    losses = [end + (start - end) * math.exp(-0.45 * step) + 0.04 * math.sin(7 * step) for step in range(steps)]
    remedy = {"problem": "nan", "action": "halve the learning rate", "learning_rate": 2.5e-4, "batch_size": 8,
              "accumulation": 1}  # fmt: skip
    return Training(train_seconds=24.0, train_tokens=4100, losses=losses, remedies=[remedy] * remedies)


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    """Makes an empty run folder; keyword arguments are settings on top of the fixture's."""

    def make(**changes: object) -> Run:
        values: dict[str, object] = {
            "name": "demo", "population": {"size": 5, "generations": 3, "elites": 1, "pool": 4},
        }  # fmt: skip
        settings = config.from_mapping(values | changes, "the test")
        run = Run(root=tmp_path, settings=settings, run_hash="1a2b3c4d")
        run.folder.mkdir(parents=True)
        return run

    return make


@pytest.fixture
def base_run(new_run: Callable[..., Run]) -> Run:
    """Only the base model has been scored."""
    return _with_base(new_run())


def _with_base(run: Run) -> Run:
    run.save_score(make_score(BASE, "fitness", 1, 32, latency_p50_s=2.41, latency_p95_s=3.3, fitness=0.0112))
    return run


def _one_generation(new_run: Callable[..., Run]) -> Run:
    return _with_base(new_run(population={"size": 2, "generations": 1, "elites": 1}))


def _finish(
    run: Run, generation: int, right: dict[str, int], culled: list[str], elites: list[str], verdict: Verdict | None
) -> None:
    before = run.result(generation - 1) if generation else None
    genomes = run.population(generation) or []
    for genome in genomes:
        name = genome.candidate
        if name not in right:
            run.save_candidate(
                Candidate(genome=genome, state="failed", reason="loss is NaN after 3 remedies <b>gave up</b>")
            )
            continue
        score = make_score(name, "fitness", right[name], 32, latency_p50_s=1.4 + genome.seed % 7 / 10)
        run.save_candidate(
            Candidate(
                genome=genome, state="culled" if name in culled else "kept", score=score, weights_sha256="ab" * 32,
                training=make_training(end=1.2 - right[name] / 32, remedies=int(genome.seed % 100 == 2)),
            )
        )  # fmt: skip
    for name in culled:
        old = run.candidate(name)
        assert old is not None
        run.save_candidate(old.model_copy(update={"state": "culled"}))
    everyone = (before.pool if before else []) + [g.candidate for g in genomes if g.candidate in right]
    pool = sorted((n for n in everyone if n not in culled), key=lambda n: -run.candidate(n).fitness)  # type: ignore[union-attr]
    champion = before.champion if before else BASE
    if verdict and verdict.passed:
        champion = verdict.challenger
    run.save_result(
        GenerationResult(
            generation=generation, members=elites + [g.candidate for g in genomes], pool=pool, culled=culled,
            champion=champion, verdict=verdict, seconds=150.0 + generation,
        )
    )  # fmt: skip


def _verdict(
    generation: int, challenger: str, incumbent: str, wins: int, losses: int, passed: bool, before: float
) -> Verdict:
    p = 1e-9 if passed else 0.31
    sentence = f"{challenger} {'beats' if passed else 'does not beat'} {incumbent}: {wins} wins, {losses} losses"
    return Verdict(
        generation=generation, challenger=challenger, incumbent=incumbent, wins=wins, losses=losses, items=100,
        challenger_accuracy=before + (wins - losses) / 100, incumbent_accuracy=before, p_value=p, alpha=0.0167,
        detectable_gain=0.09, passed=passed, verdict=sentence,
    )  # fmt: skip


@pytest.fixture
def full_run(base_run: Run) -> Run:
    """Three finished generations and the sealed comparison; g002-c01 is champion."""
    run = base_run
    run.save_population(0, [make_genome(0, i, "founder", []) for i in range(5)])
    right = {"g000-c00": 14, "g000-c01": 19, "g000-c02": 11, "g000-c04": 17}  # c03 fails
    run.save_score(make_score(BASE, "gate", 1, 100))
    run.save_score(make_score("g000-c01", "gate", 58, 100))
    _finish(run, 0, right, [], [], _verdict(0, "g000-c01", BASE, 57, 0, True, 0.01))
    run.save_population(
        1,
        [
            make_genome(1, 0, "crossover", ["g000-c01", "g000-c04"]),
            make_genome(1, 1, "mutation", ["g000-c01"], mutated=["learning_rate", "steps"], steps=12),
            make_genome(1, 2, "crossover", ["g000-c01", "g000-c00"]),
            make_genome(1, 3, "founder", []),
        ],
    )
    right = {"g001-c00": 24, "g001-c01": 20, "g001-c02": 22, "g001-c03": 9}
    run.save_score(make_score("g001-c00", "gate", 61, 100))
    _finish(run, 1, right, ["g000-c00", "g000-c02", "g000-c04", "g001-c03"], ["g000-c01"],
            _verdict(1, "g001-c00", "g000-c01", 9, 6, False, 0.58))  # fmt: skip
    run.save_population(
        2,
        [
            make_genome(2, 0, "crossover", ["g001-c00", "g000-c01"]),
            make_genome(2, 1, "crossover", ["g001-c00", "g001-c02"], advisor="improver"),
            make_genome(2, 2, "mutation", ["g001-c02"], mutated=["rank"], rank=8),
            make_genome(2, 3, "crossover", ["g001-c01", "g001-c00"]),
        ],
    )
    right = {"g002-c00": 27, "g002-c01": 30, "g002-c02": 23, "g002-c03": 26}
    run.save_score(make_score("g002-c01", "gate", 93, 100))
    _finish(run, 2, right, ["g000-c01", "g001-c01", "g001-c02", "g002-c02"], ["g001-c00"],
            _verdict(2, "g002-c01", "g000-c01", 36, 1, True, 0.58))  # fmt: skip
    run.save_sealed(
        SealedResult(
            champion="g002-c01", champion_sha256="ab" * 32, items=200, base=make_score(BASE, "test", 4, 200),
            champion_score=make_score("g002-c01", "test", 187, 200), gain=0.915, gain_ci_low=0.868,
            gain_ci_high=0.949, openings=1,
        )
    )  # fmt: skip
    files.write_json(run.folder / "run.json", {"versions": {"torch": "2.13.0"}, "note": HOSTILE})
    return run


@pytest.fixture
def failed_run(new_run: Callable[..., Run]) -> Run:
    """One generation, finished, in which every candidate failed."""
    run = _one_generation(new_run)
    run.save_population(0, [make_genome(0, i, "founder", []) for i in range(2)])
    _finish(run, 0, {}, [], [], None)
    return run


@pytest.fixture
def half_run(base_run: Run) -> Run:
    """Killed in the first generation: one candidate scored, one trained, three bred."""
    genomes = [make_genome(0, i, "founder", []) for i in range(5)]
    base_run.save_population(0, genomes)
    score = make_score("g000-c00", "fitness", 14, 32)
    base_run.save_candidate(Candidate(genome=genomes[0], state="evaluated", training=make_training(), score=score))
    base_run.save_candidate(Candidate(genome=genomes[1], state="trained", training=make_training()))
    return base_run


@pytest.fixture
def base_champion_run(new_run: Callable[..., Run]) -> Run:
    """One finished generation whose best did not pass the gate; the sealed split was answered by the base alone."""
    run = _one_generation(new_run)
    run.save_population(0, [make_genome(0, 0, "founder", [])])
    run.save_score(make_score(BASE, "gate", 1, 100))
    run.save_score(make_score("g000-c00", "gate", 3, 100))
    _finish(run, 0, {"g000-c00": 2}, [], [], _verdict(0, "g000-c00", BASE, 3, 1, False, 0.01))
    base = make_score(BASE, "test", 4, 200)
    run.save_sealed(
        SealedResult(
            champion=BASE, champion_sha256="", items=200, base=base, champion_score=base, gain=0.0, gain_ci_low=0.0,
            gain_ci_high=0.0, openings=1,
        )
    )  # fmt: skip
    return run
