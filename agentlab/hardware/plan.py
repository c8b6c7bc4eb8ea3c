"""What of an experiment fits into memory, decided from shapes and settings alone."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agentlab.config import Settings
from agentlab.errors import DoesNotFitError
from agentlab.hardware.ledger import GIB
from agentlab.hardware.remedies import machine_notes, notes, remedies
from agentlab.hardware.rungs import FP32, LADDER, NF4, RUNGS, Rung
from agentlab.hardware.sizing import Device, Machine, Model, Phase, Workload, phases_of
from agentlab.hardware.speed import Estimate, estimate, speed_of


@dataclass(frozen=True)
class ModelPlan:
    """What was chosen for one model. remedies: what would fit instead, where it does not.

    answers_on: the engine that serves and evaluates; training is always on transformers, at `rung`.
    """

    model: Model
    rung: str
    phases: tuple[Phase, ...]
    estimate: Estimate
    notes: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    answers_on: Literal["transformers", "vllm"] = "transformers"

    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases)

    def loaded(self, phase: Phase | None = None) -> str:
        """How the model is loaded for a phase, None: to answer; for people."""
        if self.answers_on == "transformers" or (phase is not None and phase.name == "train"):
            return f"at {self.rung}"
        if self.model.weight_bytes is not None:
            return "on vLLM, as stored"
        return f"on vLLM in {32 if self.rung == 'fp32' else 16} bits"  # fp32 on a CPU alone


@dataclass(frozen=True)
class Plan:
    """An experiment's plan: each model of its chain, on one machine."""

    experiment: str
    machine: Machine
    models: tuple[ModelPlan, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        return all(model.fits for model in self.models)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values; sizes in bytes, as their names say."""
        values = dataclasses.asdict(self)
        values["fits"] = self.fits
        for shown, model in zip(values["models"], self.models, strict=True):
            shown["fits"] = model.fits
            for line, phase in zip(shown["phases"], model.phases, strict=True):
                line["lines_bytes"] = dict(line.pop("lines"))
                line |= {"total_bytes": phase.total_bytes, "over_bytes": phase.over_bytes, "fits": phase.fits}
        return values


def make_plan(
    settings: Settings,
    models: Sequence[Model],
    machine: Machine,
    workload: Workload,
    rungs: Sequence[Rung] | None = None,
) -> Plan:
    """The plan of an experiment. rungs: those to choose from, precise first; None: what the settings and device allow.

    Only the primary model is evaluated and trained; the others of the chain answer.
    """
    chosen = tuple(_plan_model(settings, model, machine, workload, rungs) for model in models)
    return Plan(settings.name, machine, chosen, tuple(machine_notes(settings, machine)))


def check_fits(plan: Plan) -> None:
    """Raise DoesNotFitError, one sentence with numbers and the remedy, unless the primary model fits in every phase."""
    primary = plan.models[0]
    if primary.fits:
        return
    phase = max(primary.phases, key=lambda phase: phase.over_bytes)
    line, size = max(phase.lines, key=lambda line: line[1])
    if is_all_of_the_card(plan.machine, phase):
        allowed = f"{plan.machine.card_name or 'the card'} has {phase.limit_bytes / GIB:.2f} in all"
    elif plan.machine.device == "cuda":
        allowed = f"key budget.vram_gib allows {phase.limit_bytes / GIB:.2f}"
    else:
        allowed = f"this machine allows {phase.limit_bytes / GIB:.2f} (key budget.ram_fraction of its RAM)"
    remedy = "; ".join(primary.remedies) or "a smaller model"
    raise DoesNotFitError(
        f"{primary.model.name} does not fit {primary.loaded(phase)}: to {phase.name} it needs "
        f"{phase.total_bytes / GIB:.2f} GiB "
        f"({line.replace('_', ' ')}: {size / GIB:.2f}), {allowed}, {phase.over_bytes / GIB:.2f} GiB too much; "
        f"what would fit: {remedy}"
    )


def is_all_of_the_card(machine: Machine, phase: Phase) -> bool:
    """Whether the whole card is what limits a phase, so that `budget.vram_gib` is no less."""
    return machine.device == "cuda" and phase.limit_bytes == machine.card_bytes


def allowed_rungs(settings: Settings, device: Device) -> tuple[Rung, ...]:
    """The rungs to choose from, precise first: the one in the settings or, with `auto`, the device's ladder."""
    if settings.model.rung != "auto":
        return (RUNGS[settings.model.rung],)
    return LADDER if device == "cuda" else (FP32,)


def _plan_model(
    settings: Settings, model: Model, machine: Machine, workload: Workload, rungs: Sequence[Rung] | None
) -> ModelPlan:
    if model.weight_bytes is not None:
        choices: Sequence[Rung] = (NF4,)  # for what is restored in working memory; the weights are as stored
    else:
        choices = rungs if rungs is not None else allowed_rungs(settings, machine.device)
    trained = model.role == "primary"
    phases: tuple[Phase, ...] = ()
    for rung in choices:
        phases = phases_of(settings, model, machine, workload, rung, trained)
        if all(phase.fits for phase in phases):
            break
    stored = f"as stored ({model.shape.prequantized})" if model.weight_bytes is not None else rung.name
    instead = (
        [] if all(phase.fits for phase in phases) else remedies(settings, model, machine, workload, trained, rungs)
    )
    speed = speed_of(machine.device, settings.budget.vram_gib)
    weight_bytes = dict(phases[0].lines)["weights"]
    batch = phases[1].chosen["batch_size"] if trained else settings.evaluation.batch_size
    figures = estimate(settings, model.shape, weight_bytes, speed, workload, machine.device, trained, batch)
    return ModelPlan(
        model, stored, phases, figures, tuple(notes(settings, model, phases, figures, machine.device)), tuple(instead)
    )
