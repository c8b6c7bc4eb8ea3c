"""The workbench of one generation: the run, its suite and the loaded model, wired together."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import transformers

from agentlab import files, inference, models
from agentlab.adapters import Card, Pool
from agentlab.errors import RunError
from agentlab.events import Event, ModelLoaded
from agentlab.evolution.fitness import Rates, answer_limit, calibrate, evaluate
from agentlab.evolution.run import Run
from agentlab.learning import steps_of
from agentlab.records import BASE, Genome, Score
from agentlab.tasks import Suite

if TYPE_CHECKING:
    from agentlab.inference.transformers_engine import TransformersEngine


@dataclasses.dataclass
class Bench:
    """What a generation works with, and how it reports and is stopped."""

    run: Run
    suite: Suite
    engine: "TransformersEngine"
    pool: Pool
    rates: Rates
    limit: int  # most tokens of an answer
    steps: int  # optimiser steps of a candidate that is not a founder
    emit: Callable[[Event], None]
    should_stop: Callable[[], bool]

    def score(self, adapter: str, split: str, latency_items: int = 0) -> Score:
        """Answer and score a split with an adapter of the pool (its weights are verified first) or with "base"."""
        with self.loaded(adapter):
            return evaluate(
                self.engine,
                self.suite,
                self.suite.split(split),
                split,
                adapter,
                self.run.settings,
                self.rates,
                self.limit,
                latency_items=latency_items,
                emit=self.emit,
                should_stop=self.should_stop,
            )

    @contextlib.contextmanager
    def loaded(self, adapter: str) -> Iterator[None]:
        """Have an adapter of the pool in the engine; "base" needs nothing."""
        if adapter == BASE:
            yield
            return
        self.engine.load_adapter(adapter, self.pool.verify(adapter))
        try:
            yield
        finally:
            self.engine.unload_adapter(adapter)

    def write_card(self, genome: Genome, score: Score | None = None) -> Card:
        """The adapter's card from its genome, its weights on disk and, once there is one, its score."""
        weights = self.run.adapter_folder(genome.candidate) / "adapter_model.safetensors"
        metrics = {}
        if score is not None and score.fitness is not None:
            metrics = {"fitness": score.fitness, "accuracy": score.accuracy}
        card = Card(
            adapter_id=genome.candidate,
            name=f"{self.run.settings.name} {genome.candidate}",
            task_domain=self.suite.name,
            rank=genome.rank,
            alpha=genome.alpha,
            dropout=genome.dropout,
            target_modules=genome.target_modules,
            weights=f"{genome.candidate}/{weights.name}",
            performance_metrics=metrics,
            generation=genome.generation,
            parent_ids=genome.parents,
            base_model=self.engine.model_files.name,
            base_sha256=self.engine.model_files.sha256,
            weights_sha256=files.sha256_file(weights),
            operator=genome.operator,
            merge_weights=genome.merge_weights,
            state="trained" if score is None else "evaluated",
            created_at_s=time.time(),
            suite=self.suite.name,
        )
        self.pool.add(card)
        return card


@contextlib.contextmanager
def open_bench(
    run: Run, suite: Suite, emit: Callable[[Event], None], should_stop: Callable[[], bool]
) -> Iterator[Bench]:
    """Load the run's model and wire everything; the model is freed at the end.

    Raises RunError when the model is not the one that the run began with: its scores would not compare.
    """
    model = models.resolve(run.settings.model.primary, run.root)
    _check_model(run, model)
    started = time.monotonic()
    with inference.open_engine(run.settings, model) as engine:
        emit(
            ModelLoaded(
                model=model.name,
                engine=engine.name,
                device=engine.device,
                parameters=engine.parameters(),
                seconds=time.monotonic() - started,
            )
        )
        pool = Pool(run.folder / "adapters", run.settings.population.pool, model.sha256)
        pool.sweep()
        rates = calibrate(run, engine, suite, emit)
        limit = answer_limit(engine, suite, run.settings)
        steps = steps_of(engine, suite, run.settings.training)
        yield Bench(run, suite, engine, pool, rates, limit, steps, emit, should_stop)


def _check_model(run: Run, model: models.ModelFiles) -> None:
    path = run.folder / "model.json"
    if not path.exists():
        versions = {"transformers": transformers.__version__}
        files.write_json(path, {"name": model.name, "sha256": model.sha256, "versions": versions})
    elif (known := files.read_json(path))["sha256"] != model.sha256:
        raise RunError(
            f"the model {model.name} has changed since run {run.id} began (sha256 {known['sha256'][:12]}…, now "
            f"{model.sha256[:12]}…); restore it, or start a new run under another name"
        )
