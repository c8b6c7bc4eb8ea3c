"""The workbench of one generation: the run, its suite and the loaded model, wired together."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import transformers

from agentlab import files, models
from agentlab.adapters import Card, Pool
from agentlab.errors import AdapterError, ModelError, RunError, first_line
from agentlab.events import Event, Warned
from agentlab.evolution.engines import Engines, check_learns
from agentlab.evolution.fitness import Rates, answer_limit, calibrate, evaluate, stored_rates
from agentlab.evolution.guard import Guard
from agentlab.evolution.run import Run
from agentlab.hardware import monitor
from agentlab.hardware.rungs import RUNGS
from agentlab.hardware.threads import limit_threads
from agentlab.inference import Engine, EngineError, OutOfMemoryError, choose_engine, vllm_build
from agentlab.inference.opening import EngineName, beside_learner
from agentlab.learning import steps_of
from agentlab.records import BASE, BaseModelRecord, Genome, Score
from agentlab.tasks import Suite

if TYPE_CHECKING:
    from agentlab.inference.transformers_engine import TransformersEngine


_PREDECESSOR_S = 5.0  # until a killed process's vLLM is gone


@dataclasses.dataclass
class Bench:
    """What a generation works with, and how it reports and is stopped."""

    run: Run
    suite: Suite
    engines: Engines
    pool: Pool
    rates: Rates
    limit: int  # most tokens of an answer
    steps: int  # optimiser steps of a child, in the mean over all
    emit: Callable[[Event], None]
    should_stop: Callable[[], bool]

    @property
    def engine(self) -> Engine:
        """The engine that answers, loaded; where another one learns, that one is off the device."""
        return self.engines.answering()

    @property
    def learner(self) -> "TransformersEngine":
        """The resident model that learns, loaded; where another engine answers, that one is off the device."""
        return self.engines.learning()

    @property
    def batch_size(self) -> int:
        """Items that are answered at once: as many as the settings say, or as fit by the plan."""
        wanted = self.run.settings.evaluation.batch_size
        return min(wanted, self.run.planned_rows("evaluate") or wanted)

    @property
    def micro_batch(self) -> int | None:
        """Most items that fit into memory at once while training, by the plan; None where nothing was planned."""
        return self.run.planned_rows("train")

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
                batch_size=self.batch_size,
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
            base_model=self.engines.model_files.name,
            base_sha256=self.engines.model_files.sha256,
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
    """Wire everything, under guard; the run's model is loaded for what needs it first and freed at the end.

    Raises RunError when model or engine is not the one that the run began with: its scores would not compare.
    """
    check_learns(run.settings)
    if monitor.gpus() and monitor.driver_is_too_old():
        emit(
            Warned(message="NVIDIA's driver is too old for torch's CUDA, so this runs on the CPU; see agentlab doctor")
        )
    limit_threads(run.settings.budget.threads)
    model = models.resolve(run.settings.model.primary, run.root)
    with (
        Guard(run.settings.budget, emit, should_stop) as guard,
        contextlib.closing(_engines(run, model, emit)) as engines,
    ):
        pool = Pool(run.folder / "adapters", run.settings.population.pool, model.sha256)
        pool.sweep()
        rates = stored_rates(run) or calibrate(run, engines.answering(), suite, emit)
        limit = answer_limit(engines.templates(), suite, run.settings)
        steps = steps_of(engines.templates(), suite, run.settings.training)
        yield Bench(run, suite, engines, pool, rates, limit, steps, emit, guard.should_stop)


def _engines(run: Run, model: models.ModelFiles, emit: Callable[[Event], None]) -> Engines:
    """The run's engines. Where `auto` chose vLLM it has to show that it works before it scores anything."""
    name = _engine_of(run, model)
    engines = Engines(run.settings, model, name, emit, run.rung())
    if name != "vllm" or run.settings.model.engine != "auto" or stored_rates(run) is not None:
        return engines
    try:
        try:
            engines.rehearse()
        except OutOfMemoryError:  # what a killed predecessor held may only be going
            engines.close()
            time.sleep(_PREDECESSOR_S)
            engines.rehearse()
    except (AdapterError, EngineError, ModelError) as error:
        engines.close()
        why = f"vLLM cannot: {first_line(error)}"
        emit(Warned(message=f"transformers scores this run, because {why}; a run of another name tries vLLM again"))
        _save_model(run, model, "transformers")
        return Engines(run.settings, model, "transformers", emit, run.rung())
    except BaseException:
        engines.close()
        raise
    return engines


def _save_model(run: Run, model: models.ModelFiles, engine: EngineName) -> None:
    versions = {"transformers": transformers.__version__}
    run.save_model(
        BaseModelRecord(name=model.name, sha256=model.sha256, engine=engine, rung=_planned_rung(run), versions=versions)
    )


def _engine_of(run: Run, model: models.ModelFiles) -> EngineName:
    """The run's engine, written down with its model; what `auto` chose first is kept for the whole run."""
    wanted, known = run.settings.model.engine, run.model()
    if known is None:
        chosen = choose_engine(beside_learner(run.settings), model)
        _save_model(run, model, chosen)
        return chosen
    if known.sha256 != model.sha256:
        raise RunError(
            f"the model {model.name} has changed since run {run.id} began (sha256 {known.sha256[:12]}…, now "
            f"{model.sha256[:12]}…); restore it, or start a new run under another name"
        )
    engine = known.engine
    if wanted not in ("auto", engine):
        raise RunError(
            f"the scores of run {run.id} are those of the engine {engine}, not of {wanted}, and do not compare; set "
            f"model.engine: {engine}, or start a new run under another name"
        )
    if engine == "vllm" and vllm_build.device() is None:
        what = "is built for a GPU, and torch sees none" if vllm_build.build() else "is not installed"
        raise RunError(
            f"the scores of run {run.id} are vLLM's, which {what}, and compare with no other engine's; install it, or "
            "start a new run under another name"
        )
    return engine


def _planned_rung(run: Run) -> str | None:
    """The rung on which the run was planned to fit; None for a model that is loaded as it is stored."""
    plan = run.plan()
    rung = plan["models"][0]["rung"] if plan else None
    if rung is None and run.settings.model.rung != "auto":
        return run.settings.model.rung
    return rung if rung in RUNGS else None
