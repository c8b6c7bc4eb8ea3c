"""`agentlab plan`: what of an experiment fits into memory, before anything is loaded."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agentlab.cli.options import experiment, overrides
from agentlab.report import words

if TYPE_CHECKING:
    from agentlab.hardware.plan import ModelPlan, Plan
    from agentlab.hardware.sizing import Phase

_MIB, _GIB = 2**20, 2**30
_WORDS = {
    "context_tokens": "{:,} tokens of context",
    "batch_size": "batches of {:,}",
    "micro_batch": "micro-batches of {:,}",
    "accumulation": "{:,} accumulated",
    "tokens": "{:,} tokens an item",
    "longest_context_tokens": "at most {:,} tokens of context",
}


@click.command()
@experiment
@overrides
@click.option(
    "--device", type=click.Choice(["gpu", "cpu"]), default="gpu", show_default=True,
    help="A GPU of budget.vram_gib, at most as large as the one in use here, or this machine's CPU and RAM.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are in bytes.")
def plan(experiment: Path, overrides: tuple[str, ...], device: str, as_json: bool) -> None:
    """Say what of an experiment fits into memory: serving, evaluating and training, line by line.

    Nothing is loaded; a model that is not on this machine is planned from its published config. Whether everything
    fits is the last line, and `fits` in the JSON; the exit code is 0 either way.
    """
    from agentlab.lab import Lab

    found = Lab.open(experiment, overrides).plan("cuda" if device == "gpu" else "cpu")
    click.echo(json.dumps(found.as_dict()) if as_json else text(found))


def text(plan: "Plan") -> str:
    """The plan for people."""
    from agentlab.hardware.plan import is_all_of_the_card

    machine, phase = plan.machine, plan.models[0].phases[0]
    place = "a GPU" if machine.device == "cuda" else "this CPU's RAM"
    place += f", of which {phase.limit_bytes / _GIB:.2f} GiB"
    if is_all_of_the_card(machine, phase):
        place += f", all that {machine.card_name or 'the card'} has,"
    lines = [f"{plan.experiment}: planned for {place} may be used; sizes in MiB"]
    for model in plan.models:
        lines += ["", *_model_lines(model)]
    lines += ["", *(f"! {note}" for note in plan.notes)] if plan.notes else []
    verdict = (
        "everything fits"
        if plan.fits
        else "NOT everything fits: "
        + ", ".join(f"{model.model.role} model {model.loaded()}" for model in plan.models if not model.fits)
    )
    return "\n".join([*lines, "", verdict])


def _model_lines(model: "ModelPlan") -> list[str]:
    shape = model.model.shape
    trained = f", trained at {model.rung}" if model.answers_on == "vllm" and len(model.phases) > 1 else ""
    lines = [
        f"{model.model.role}: {model.model.name}, {shape.parameters / 1e9:.2f} billion weights {model.loaded()}"
        f"{trained} ({model.model.origin})"
    ]
    for phase in model.phases:
        lines += _phase_lines(phase)
    lines += [f"  ! {note}" for note in model.notes]
    if model.remedies:
        lines += ["  what would fit:", *(f"    - {remedy}" for remedy in model.remedies)]
    figures = model.estimate
    lines.append(
        f"  estimate for {figures.assumed}: {figures.decode_tokens_per_s:.0f} tokens/s alone, about "
        f"{figures.tokens_in_target} tokens of answer within the target; {figures.model_disk_mib:,.0f} MiB of "
        "disk in 16 bits"
    )
    if len(model.phases) > 1:
        lines.append(
            f"  estimate of a generation in the mean: training {_minutes(figures.train_minutes)}, evaluating "
            f"{_minutes(figures.evaluate_minutes)}; adapters and kept states of training take about "
            f"{figures.disk_mib:,.0f} MiB of disk"
        )
    return lines


def _phase_lines(phase: "Phase") -> list[str]:
    chosen = ", ".join(
        (words.counted(value, "resident adapter") if name == "adapters" else _WORDS[name].format(value))
        + (f" (wanted: {phase.wanted[name]:,})" if phase.wanted.get(name, value) != value else "")
        for name, value in phase.chosen.items()
    )
    over = phase.over_bytes / _MIB
    verdict = f"fits, {abs(over):,.0f} left" if phase.fits else f"does NOT fit, {over:,.0f} too much"
    lines = [f"  {phase.name}: {verdict} ({chosen})"]
    lines += [f"    {name.replace('_', ' '):<16}{size / _MIB:>9,.0f}" for name, size in phase.lines]
    return [*lines, f"    {'together':<16}{phase.total_bytes / _MIB:>9,.0f} of {phase.limit_bytes / _MIB:,.0f}"]


def _minutes(minutes: float) -> str:
    return f"{minutes:.1f} min" if minutes < 10 else f"{minutes:.0f} min"
