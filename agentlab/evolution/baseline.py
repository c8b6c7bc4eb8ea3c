"""The honest rival: one plain SFT that may train as many steps as the whole population did."""

from agentlab import adapters, files
from agentlab.errors import RunError
from agentlab.evolution import seal
from agentlab.evolution.bench import Bench
from agentlab.evolution.breeding import founder
from agentlab.evolution.stats import paired_gain
from agentlab.learning import encode, sample
from agentlab.learning.sft import train
from agentlab.records import BaselineResult, Score, Training

NAME = "plain-sft"


def equal_cost_sft(bench: Bench) -> BaselineResult:
    """Train and score it, or give the kept result. Cost is counted in optimiser steps of the same batch size.

    The settings' own learning rate, LoRA and sampling; as many steps as all candidates of the run together, also those
    that were culled. Raises RunError before the run's own sealed comparison was made.
    """
    run, settings = bench.run, bench.run.settings
    if (kept := run.baseline()) is not None:
        return kept
    sealed = run.sealed()
    if sealed is None:
        raise RunError(f"{run.id} has no sealed comparison yet; finish it first: nothing to compare with")
    trained = [c for c in run.candidates() if c.training is not None]
    steps = sum(c.genome.steps for c in trained)
    genome = founder(settings, 0, 0, steps).model_copy(update={"candidate": NAME})
    items = sample(bench.suite.split("train"), steps * genome.batch_size, {}, genome.seed)
    learner = bench.learner
    examples = [encode(learner, bench.suite, item) for item in items]
    lora, training = train(
        learner,
        genome,
        None,
        examples,
        warmup_steps=settings.training.warmup_steps,
        max_length=settings.training.max_length,
        max_remedies=settings.training.max_remedies,
        micro_batch=bench.micro_batch,
        emit=bench.emit,
        should_stop=bench.should_stop,
    )
    score = _sealed_score(bench, lora)
    gain, low, high = paired_gain(sealed.champion_score.item_scores, score.item_scores)
    result = BaselineResult(
        steps=steps,
        learning_rate=genome.learning_rate,
        train_tokens=training.train_tokens,
        population_train_tokens=sum(t.train_tokens for c in trained if isinstance(t := c.training, Training)),
        score=score,
        champion=sealed.champion,
        champion_accuracy=sealed.champion_score.accuracy,
        gain=gain,
        gain_ci_low=low,
        gain_ci_high=high,
    )
    run.save_baseline(result)
    return result


def _sealed_score(bench: Bench, lora: adapters.Lora) -> Score:
    folder = bench.run.folder / NAME
    adapters.save(lora, folder)
    engine = bench.engine  # loaded first: one that cannot be must not cost an opening of the seal
    engine.load_adapter(NAME, folder)
    try:
        seal.open_for(bench, {NAME: files.sha256_file(folder / "adapter_model.safetensors")})
        return seal.answer(bench, NAME)
    finally:
        engine.unload_adapter(NAME)
