"""The plan of one run: its models' shapes, its suite's sizes and this machine, put together for the planner."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

from agentlab import models
from agentlab.config import Settings
from agentlab.errors import ConfigError, ModelError
from agentlab.evolution.run import Run
from agentlab.hardware import monitor
from agentlab.hardware.ledger import GIB
from agentlab.hardware.plan import ModelPlan, Plan, check_fits, make_plan
from agentlab.hardware.remedies import notes
from agentlab.hardware.rungs import RUNGS
from agentlab.hardware.shape import ShapeError
from agentlab.hardware.sizing import PROCESS_BYTES, Device, Machine, Model, Phase, Workload
from agentlab.hardware.speed import estimate, speed_of
from agentlab.inference import stored, vllm_build
from agentlab.inference.contract import OutOfMemoryError
from agentlab.inference.opening import (
    beside_learner,
    beside_sleeping,
    check_rung,
    is_worth_vllm,
    only_on_vllm,
    served_rank,
    vllm_loads,
    vllm_settings,
)
from agentlab.inference.vllm_settings import (
    ModelSizes,
    VllmSettings,
    least_for_gpu,
    planned_lines,
    settings_for_cpu,
)
from agentlab.tasks import Suite

_CHARS_PER_TOKEN = 3.0  # English in chat templates; the embedded model's 3.4 leaves room for markup and other languages
_TEMPLATE_TOKENS = 16  # what a chat template adds
_VLLM_BYTES = 2  # of a weight, on a GPU


def plan_run(run: Run, suite: Suite, device: Device | Literal["auto"] = "cuda") -> Plan:
    """What each model of the run needs on a GPU of `budget.vram_gib`, at most as large as the one in use here, or on
    this machine's CPU. Loads nothing.

    Raises ConfigError for models that a server holds and for a `model.rung` that is not to be had, ModelError for one
    whose sizes nobody here knows.
    """
    wanted = run.settings.model
    if wanted.engine == "openai":
        raise ConfigError(
            "key model.engine: 'openai'; allowed for a plan: auto, transformers, vllm: a server's memory is its own"
        )
    here = machine(device)
    if wanted.engine == "vllm":
        check_rung(wanted.rung, here.device)
    chain = [("primary", wanted.primary), ("fallback", wanted.fallback), ("emergency", wanted.emergency)]
    found = [Model(role, name, *models.shape_of(name, run.root)) for role, name in chain if name is not None]
    for model in found:
        _check_own_rung(model, run)
    _check_targets(found[0], run)
    work = workload(suite)
    return _what_only_answers(_on_vllm(make_plan(run.settings, found, here, work), run, work), run)


def refuse_what_does_not_fit(run: Run, suite: Suite) -> Plan:
    """The plan of the run's primary model on this machine, as the engine loads it.

    Raises DoesNotFitError when it cannot be loaded, evaluated and trained here, ConfigError for a `model.rung` that is
    not to be had.
    """
    here = machine("auto")
    if run.settings.model.engine == "vllm":
        check_rung(run.settings.model.rung, here.device)
    name = run.settings.model.primary
    try:
        primary = Model("primary", name, *models.shape_of(name, run.root))
    except ShapeError:  # nobody knows its sizes; what it is quantized with is known all the same
        if not name.endswith(".gguf"):
            stored.check_learns(models.resolve(name, run.root))
        raise
    _check_own_rung(primary, run)
    _check_targets(primary, run)
    if primary.weight_bytes is not None:
        stored.check_learns(models.resolve(name, run.root))
    known = run.rung()  # a run that has begun stays on its rung: its scores compare with nothing else
    work = workload(suite)
    plan = make_plan(run.settings, [primary], here, work, None if known is None else [RUNGS[known]])
    plan = _on_vllm(plan, run, work)
    check_fits(plan)
    return plan


def _on_vllm(plan: Plan, run: Run, work: Workload) -> Plan:
    """`plan` with what vLLM takes of the GPU, or of the RAM, for the models that it would answer with."""
    if plan.machine.device == "cpu":
        found = tuple(_answering_on_vllm_in_ram(model, run) for model in plan.models)
    else:
        found = tuple(_answering_on_vllm(model, plan.machine, run, work) for model in plan.models)
    return dataclasses.replace(plan, models=found)


def _answering_on_vllm_in_ram(plan: ModelPlan, run: Run) -> ModelPlan:
    """What vLLM's process, a second one with torch, takes on a CPU; it ends while another candidate trains."""
    if run.settings.model.engine != "vllm" and not _only_on_vllm(plan, run):
        return plan
    shape, stored_bytes = plan.model.shape, plan.model.weight_bytes
    element = 4 if stored_bytes is None else 2
    sizes = ModelSizes(shape, stored_bytes or element * shape.parameters, element)
    found = settings_for_cpu(sizes, served_rank(run.settings))
    here = ("weights", "adapters", "kv_cache", "working")  # the rest is a GPU's
    lines = (*(line for line in planned_lines(found, sizes) if line[0] in here), ("process", 2 * PROCESS_BYTES))
    serving = {"context_tokens": found.max_model_len, "adapters": found.max_loras}
    phases = tuple(
        phase
        if phase.name == "train"
        else dataclasses.replace(
            phase, lines=lines, wanted={}, chosen=serving if phase.name == "serve" else phase.chosen
        )
        for phase in plan.phases
    )
    return dataclasses.replace(plan, phases=phases, answers_on="vllm")


def _only_on_vllm(plan: ModelPlan, run: Run) -> bool:
    return plan.model.weight_bytes is not None and only_on_vllm(models.resolve(plan.model.name, run.root))


def _what_only_answers(plan: Plan, run: Run) -> Plan:
    """`plan` without scoring and training where a model is quantized in its files so that it only answers here."""
    first = plan.models[0]  # the primary, the one that is trained
    if first.model.weight_bytes is None:
        return plan
    try:
        stored.check_learns(models.resolve(first.model.name, run.root))
    except ModelError as error:
        told = dataclasses.replace(
            first, notes=(*first.notes, str(error)), phases=first.phases[:1],
            estimate=dataclasses.replace(first.estimate, train_minutes=0.0, evaluate_minutes=0.0, disk_mib=0.0),
        )  # fmt: skip
        return dataclasses.replace(plan, models=(told, *plan.models[1:]))
    return plan


def _check_own_rung(model: Model, run: Run) -> None:
    """Raise ConfigError where a rung is asked for of a model that is quantized in its files."""
    if model.weight_bytes is not None and run.settings.model.rung != "auto":
        raise ConfigError(
            f"key model.rung: {run.settings.model.rung!r}; allowed for {model.name}, which is quantized in its files: "
            "auto"
        )


def _check_targets(model: Model, run: Run) -> None:
    """Raise ConfigError for modules that the model that is trained does not have."""
    unknown = [name for name in run.settings.lora.target_modules if name not in model.shape.linears]
    if unknown and model.shape.exact:
        raise ConfigError(
            f"key lora.target_modules: {', '.join(map(repr, unknown))}; allowed for {model.name}: "
            f"{', '.join(model.shape.linears)}"
        )


def _answering_on_vllm(plan: ModelPlan, where: Machine, run: Run, work: Workload) -> ModelPlan:
    settings, shape = run.settings, plan.model.shape
    sizes = ModelSizes(shape, plan.model.weight_bytes or _VLLM_BYTES * shape.parameters, _VLLM_BYTES)
    scores = beside_learner(settings, where.card_bytes or float("inf")) if len(plan.phases) > 1 else settings
    found, scoring = (_vllm_settings(plan, where, run, sizes, limited) for limited in (settings, scores))
    if found is None or scoring is None:
        return plan
    lines = planned_lines(found, sizes)
    learner = ("learner_context", int(settings.budget.context_gib * GIB))
    serving = {"context_tokens": found.max_model_len, "adapters": found.max_loras}
    phases = []
    extra: list[str] = []
    for phase in plan.phases:
        if phase.name == "train":
            phases.append(_trained_beside(plan, where, run, work, scoring.outside_bytes))
            continue
        tokens = phase.chosen.get("tokens", 0)
        if phase.name == "serve":
            phases.append(dataclasses.replace(phase, lines=lines, chosen=serving, wanted={}))
            continue
        wanted = {"batch_size": settings.evaluation.batch_size}
        chosen = {"batch_size": min(wanted["batch_size"], scoring.max_num_seqs), "tokens": tokens}
        beside = (*planned_lines(scoring, sizes), learner)
        phases.append(dataclasses.replace(phase, lines=beside, chosen=chosen, wanted=wanted))
        if tokens > scoring.max_model_len:
            extra.append(
                f"vLLM would be started with a context of {scoring.max_model_len:,} tokens, and the longest item takes "
                f"{tokens:,}: lower evaluation.max_new_tokens, or set model.engine: transformers"
            )
    figures = estimate(
        settings, shape, sizes.weight_bytes, speed_of("cuda", settings.budget.vram_gib), work, "cuda", len(phases) > 1,
        min(settings.evaluation.batch_size, scoring.max_num_seqs),
    )  # fmt: skip
    remedies: tuple[str, ...] = ()
    if not all(phase.fits for phase in phases):
        remedies = (f"model.engine=transformers, at {plan.rung}",) if plan.fits else plan.remedies
    return dataclasses.replace(
        plan,
        phases=tuple(phases),
        estimate=figures,
        notes=(*notes(settings, plan.model, phases, figures), *extra),
        remedies=remedies,
        answers_on="vllm",
    )


def _trained_beside(plan: ModelPlan, where: Machine, run: Run, work: Workload, asleep_bytes: int) -> Phase:
    """The training's memory while vLLM sleeps, which gives weights and cache away and keeps its context."""
    rungs = [RUNGS[plan.rung]] if plan.rung in RUNGS else None
    again = make_plan(beside_sleeping(run.settings, asleep_bytes), [plan.model], where, work, rungs)
    (phase,) = (phase for phase in again.models[0].phases if phase.name == "train")
    lines = [(name, size - asleep_bytes if name == "driver_context" else size) for name, size in phase.lines]
    return dataclasses.replace(phase, lines=(*lines, ("vllm_asleep", asleep_bytes)))


def _vllm_settings(
    plan: ModelPlan, where: Machine, run: Run, sizes: ModelSizes, limited: Settings
) -> VllmSettings | None:
    """What vLLM would be started with for this model within `limited`'s budget, the least where nothing fits.

    None where it does not answer.
    """
    engine = run.settings.model.engine
    if engine == "auto":
        # what `auto` chose first is kept for the whole run
        bound = run.model() if plan.model.role == "primary" else None
        if _only_on_vllm(plan, run):
            engine = "vllm"
        elif bound is not None:
            engine = bound.engine
        elif not _auto_may_be_vllm(plan, run):
            return None
    if engine not in ("auto", "vllm"):
        return None
    try:
        card_bytes = where.card_bytes or float("inf")
        return vllm_settings(limited, sizes, min(limited.budget.vram_gib * GIB, card_bytes))
    except OutOfMemoryError:
        if engine == "auto":
            return None
        return least_for_gpu(sizes, served_rank(run.settings), run.settings.budget.context_gib)


def _auto_may_be_vllm(plan: ModelPlan, run: Run) -> bool:
    if not (vllm_build.device() == "cuda" and vllm_loads(run.settings.model.rung, "cuda")):
        return False
    if not is_worth_vllm(plan.model.weight_bytes or _VLLM_BYTES * plan.model.shape.parameters):
        return False
    return stored.by_vllm(plan.model.shape.prequantized, "cuda")


def machine(device: Device | Literal["auto"]) -> Machine:
    """This machine, seen as one with a GPU (`cuda`), as one without (`cpu`), or as it is (`auto`).

    The card is the one that torch runs on; as one with a GPU a machine without is seen with a card of any size.
    """
    stats = monitor.memory_stats()
    here = monitor.accelerator()
    cards = monitor.gpus() if here == "cuda" else []
    card = cards[0] if cards else None
    return Machine(
        device=here if device == "auto" else device,
        ram_bytes=int(stats.cpu_total * 2**20),
        card_bytes=None if card is None or card.memory_total_mb is None else int(card.memory_total_mb * 2**20),
        card_name=None if card is None else card.name,
        capability=None if card is None else card.compute_capability,
    )


def workload(suite: Suite) -> Workload:
    """The suite's sizes; tokens are estimated from characters, because no tokenizer is loaded."""
    items = [*suite.split("train"), *suite.split("fitness"), *suite.split("gate")]
    texts = ["".join(message["content"] for message in suite.chat(item)) for item in items]
    prompts = [_tokens(text) for text in texts]
    answers = [_tokens(suite.target(item)) for item in items]
    return Workload(
        fitness_items=len(suite.split("fitness")),
        gate_items=len(suite.split("gate")),
        prompt_tokens=_mean(prompts) + _TEMPLATE_TOKENS,
        answer_tokens=_mean(answers),
        longest_prompt_tokens=max(prompts, default=0) + _TEMPLATE_TOKENS,
        longest_answer_tokens=max(answers, default=1),
        shared_tokens=_tokens(os.path.commonprefix(texts)),  # noqa: RUF071 (of characters is what is meant)
    )


def _tokens(text: str) -> int:
    # a character outside of ASCII may be a token of its own
    wide = sum(ord(character) > 127 for character in text)
    return round((len(text) - wide) / _CHARS_PER_TOKEN) + wide


def _mean(values: Sequence[int]) -> int:
    return max(1, round(sum(values) / max(1, len(values))))
