"""One generation: a function from (run, pool on disk, index) to pool on disk.

Every step writes its result before the next begins and skips what is already written, so that the same call after a
kill finishes what was begun: with the same genomes always, on the same CPU and versions with the same bytes.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence

from agentlab import adapters
from agentlab.errors import AdapterError, RunError
from agentlab.events import (
    Bred,
    CandidateFailed,
    Event,
    GateDecided,
    GenerationFinished,
    GenerationStarted,
    Promoted,
    Selected,
    Trained,
    Warned,
)
from agentlab.evolution import breeding, continuing, gate, lessons, seal
from agentlab.evolution.bench import Bench, open_bench
from agentlab.evolution.run import Run
from agentlab.evolution.selection import Ranked, prune, ranked
from agentlab.evolution.tidying import tidy
from agentlab.learning import TrainingFailed
from agentlab.records import BASE, Candidate, GenerationResult, Genome, Score, Training, Verdict
from agentlab.tasks import Suite


def run_generation(
    run: Run,
    suite: Suite,
    generation: int,
    emit: Callable[[Event], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> GenerationResult:
    """Breed, train, evaluate, gate and select one generation; after the last one, compare on the sealed split.

    A generation that is finished already is only tidied up. Raises RunError when an earlier one is missing or no
    candidate survives, EvolutionStopped when asked to stop.
    """
    check_order(run, generation)
    started = time.monotonic()
    emit(GenerationStarted(generation=generation, pid=os.getpid(), continued=run.population(generation) is not None))
    result = run.result(generation)
    last = generation == run.settings.population.generations - 1
    if result is not None and (not last or _is_sealed(run, result)):
        tidy(run, result)
        emit(GenerationFinished(generation=generation, champion=result.champion, seconds=result.seconds))
        return result
    with open_bench(run, suite, emit, should_stop) as bench:
        if result is None:
            result = _evolve(bench, generation, started)
        tidy(run, result)
        if last and result.champion != BASE:
            _compare_sealed(bench, result.champion)
    seconds = run.seconds_before(generation) + time.monotonic() - started
    emit(GenerationFinished(generation=generation, champion=result.champion, seconds=seconds))
    return result


def check_order(run: Run, generation: int) -> None:
    """Raise RunError unless this generation is planned and the one before it is finished."""
    planned = run.settings.population.generations
    if not 0 <= generation < planned:
        raise RunError(f"generation: {generation}; allowed: 0 to {planned - 1} (population.generations is {planned})")
    if generation and run.result(generation - 1) is None:
        raise RunError(f"generation {generation - 1} of {run.id} is not finished; run that one first")


def _evolve(bench: Bench, generation: int, started: float) -> GenerationResult:
    """The whole of a generation, top to bottom."""
    run = bench.run
    before = run.result(generation - 1) if generation else None
    pool = _rank(run, before.pool if before else [])
    parents = continuing.able(bench.pool, pool, bench.emit)
    if pool and not parents:
        raise RunError(f"no adapter of the pool after generation {generation - 1} has its weights; restore them")
    genomes = _breed(bench, generation, parents)
    _base_score(bench, "fitness")
    for genome in genomes:
        _learn(bench, genome)
    for genome in genomes:
        _score(bench, genome)
    genomes += _blend(bench, generation, genomes)
    elites = [member.adapter for member in parents[: run.settings.population.elites]]
    evaluated = [genome.candidate for genome in genomes if _is_evaluated(run, genome.candidate)]
    if not elites and not evaluated:
        raise RunError(
            f"no candidate of generation {generation} survived: {_reasons(run, genomes)}; change the settings, which "
            "starts another run"
        )
    champion = before.champion if before else BASE
    verdict = _gate(bench, generation, elites + evaluated, champion)
    if verdict is not None and verdict.passed:
        champion = verdict.challenger
    kept, culled = prune([*pool, *_rank(run, evaluated)], run.settings.population.pool, champion)
    result = GenerationResult(
        generation=generation,
        members=elites + [genome.candidate for genome in genomes],
        pool=kept,
        culled=culled,
        champion=champion,
        verdict=verdict,
        seconds=run.seconds_before(generation) + time.monotonic() - started,
    )
    run.save_result(result)
    bench.emit(Selected(generation=generation, pool=kept, culled=culled))
    if verdict is not None and verdict.passed:
        below = verdict.challenger_accuracy < run.settings.gate.accuracy_threshold
        bench.emit(Promoted(generation=generation, adapter=champion, previous=verdict.incumbent, below_threshold=below))
    return result


def _breed(bench: Bench, generation: int, parents: Sequence[Ranked]) -> list[Genome]:
    genomes = bench.run.population(generation)
    if genomes is None:
        genomes = breeding.breed(bench.run.settings, generation, parents, bench.suite.groups(), bench.steps)
        bench.run.save_population(generation, genomes)  # before anything is trained
    for genome in genomes:
        _announce(bench, genome)
    return genomes


def _announce(bench: Bench, genome: Genome) -> None:
    """The genome on disk and in the journal, once, before anything is made of it."""
    if bench.run.candidate(genome.candidate) is not None:
        return
    bench.run.save_candidate(Candidate(genome=genome))
    bench.emit(
        Bred(
            generation=genome.generation,
            candidate=genome.candidate,
            operator=genome.operator,
            parents=genome.parents,
            merge_weights=genome.merge_weights,
            genome=genome.model_dump(mode="json"),
        )
    )


def _blend(bench: Bench, generation: int, genomes: Sequence[Genome]) -> list[Genome]:
    """The generation's two best newcomers merged, as a candidate of its own; empty for founders."""
    newcomers = _rank(bench.run, [g.candidate for g in genomes if _is_evaluated(bench.run, g.candidate)])
    genome = breeding.blend(bench.run.settings, generation, newcomers, len(genomes))
    if genome is None:
        return []
    _announce(bench, genome)
    _learn(bench, genome)
    _score(bench, genome)
    return [genome]


def _learn(bench: Bench, genome: Genome) -> None:
    """Founders: a fresh LoRA; children: merge the parents, add noise. Then a short SFT. A failure is a result.

    A blend is its parents' merge as it is: no steps.
    """
    candidate = bench.run.candidate(genome.candidate) or Candidate(genome=genome)
    if candidate.state != "bred":
        return
    try:
        start = _inherit(bench, genome) if genome.parents else None
        if start is not None and genome.steps == 0:
            lora, training = start, Training(train_seconds=0.0, train_tokens=0, losses=[])
        else:
            lora, training = lessons.teach(bench, genome, start)
    except (TrainingFailed, AdapterError) as error:
        _fail(bench, candidate, str(error))
        return
    folder = bench.run.adapter_folder(genome.candidate)
    adapters.save(lora, folder)
    card = bench.write_card(genome)
    bench.run.save_candidate(
        candidate.model_copy(update={"state": "trained", "training": training, "weights_sha256": card.weights_sha256})
    )
    bench.emit(
        Trained(
            candidate=genome.candidate,
            train_seconds=training.train_seconds,
            train_tokens=training.train_tokens,
            loss=training.losses[-1] if training.losses else None,
        )
    )


def _inherit(bench: Bench, genome: Genome) -> adapters.Lora:
    """The parents merged at the child's rank, with the child's dropout and weight noise."""
    parents = [adapters.load(bench.pool.verify(parent)) for parent in genome.parents]
    for parent in genome.parents:
        bench.pool.count_use(parent)
    if genome.operator == "continuation":  # its very factors: training goes on in them, and they are averaged with
        return dataclasses.replace(parents[0], dropout=genome.dropout)
    merged = adapters.crossover(
        parents,
        genome.merge_weights,
        genome.rank,
        genome.alpha,
        genome.merge_method if len(parents) > 1 else "exact",  # type: ignore[arg-type]
        density=bench.run.settings.crossover.density,
        seed=genome.seed,
    )
    if genome.weight_noise:
        merged = adapters.add_noise(merged, genome.weight_noise, genome.seed)
    return dataclasses.replace(merged, dropout=genome.dropout)


def _score(bench: Bench, genome: Genome) -> None:
    """Fitness of a trained candidate, from the weights on disk, so that a continued run scores the same bytes."""
    candidate = bench.run.candidate(genome.candidate)
    if candidate is None or candidate.state != "trained":
        return
    try:
        score = bench.score(genome.candidate, "fitness", bench.run.settings.evaluation.latency_items)
    except AdapterError as error:
        _fail(bench, candidate, str(error))
        return
    candidate = candidate.model_copy(update={"state": "evaluated", "score": score})
    bench.run.save_candidate(candidate)
    bench.write_card(genome, score)


def _base_score(bench: Bench, split: str) -> Score:
    score = bench.run.score(BASE, split)
    if score is None:
        latency_items = bench.run.settings.evaluation.latency_items if split == "fitness" else 0
        score = bench.score(BASE, split, latency_items)
        bench.run.save_score(score)
    return score


def _gate(bench: Bench, generation: int, members: Sequence[str], champion: str) -> Verdict | None:
    """The generation's best beside the champion challenges it; None where nobody is left who could win."""
    challenger = _challenger(bench.run, members, champion)
    if challenger is None:
        return None
    items = len(bench.suite.split("gate"))
    if items < gate.FEW_ITEMS:
        bench.emit(Warned(message=f"the gate has {items} items; below {gate.FEW_ITEMS} most real gains are missed"))
    scores = []
    for adapter in (challenger, champion):
        score = bench.run.score(adapter, "gate")
        if score is None:
            score = bench.score(adapter, "gate")
            bench.run.save_score(score)
        scores.append(score)
    verdict = gate.decide(bench.run.settings, generation, scores[0], scores[1], bench.run.verdicts())
    bench.emit(GateDecided(**verdict.model_dump(exclude={"challenger_accuracy", "incumbent_accuracy"})))
    return verdict


def _challenger(run: Run, members: Sequence[str], champion: str) -> str | None:
    """The fittest that is not the champion, has not lost to it, and is not clearly worse on the fitness items.

    Also where the champion is the fitter one: it was chosen by the luck of its fitness items, too, and would otherwise
    keep out whoever comes after it.
    """
    lost = {verdict.challenger for verdict in run.verdicts() if verdict.incumbent == champion}
    left = _rank(run, [name for name in members if name != champion and name not in lost])
    to_beat = _fitness_score(run, champion)
    return next((one.adapter for one in left if not gate.hopeless(_fitness_score(run, one.adapter), to_beat)), None)


def _fitness_score(run: Run, adapter: str) -> Score:
    score = run.score(BASE, "fitness") if adapter == BASE else run.kept_candidate(adapter).score
    assert score is not None  # members are evaluated, and so is every champion
    return score


def _compare_sealed(bench: Bench, champion: str) -> None:
    with bench.loaded(champion):
        seal.compare(bench, champion)


def _rank(run: Run, names: Sequence[str]) -> list[Ranked]:
    """Selection's view of adapters, best first."""
    found = [run.kept_candidate(name) for name in names]
    return ranked(Ranked(c.genome.candidate, c.fitness, c.genome) for c in found)


def _is_evaluated(run: Run, adapter: str) -> bool:
    candidate = run.candidate(adapter)
    return candidate is not None and candidate.score is not None


def _is_sealed(run: Run, result: GenerationResult) -> bool:
    sealed = run.sealed()
    return result.champion == BASE or (sealed is not None and sealed.champion == result.champion)


def _fail(bench: Bench, candidate: Candidate, reason: str) -> None:
    bench.run.save_candidate(candidate.model_copy(update={"state": "failed", "reason": reason}))
    bench.emit(CandidateFailed(candidate=candidate.genome.candidate, reason=reason))


def _reasons(run: Run, genomes: Sequence[Genome]) -> str:
    found = [run.candidate(genome.candidate) for genome in genomes]
    return "; ".join(f"{c.genome.candidate}: {c.reason}" for c in found if c is not None) or "nothing was bred"
