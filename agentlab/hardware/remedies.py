"""What would fit instead of what does not, and what else a person should know of a model's plan."""

from collections.abc import Sequence

from agentlab.config import Settings
from agentlab.hardware import ledger
from agentlab.hardware.ledger import GIB, MIB
from agentlab.hardware.rungs import FP32, LADDER, NF4, RUNGS, Rung, element_bytes
from agentlab.hardware.shape import published, published_names
from agentlab.hardware.sizing import Device, Machine, Model, Phase, Workload, phases_of
from agentlab.hardware.speed import Estimate

_REASONS = ("-r1", "r1-", "qwq", "thinking", "reasoner")


def remedies(
    settings: Settings, model: Model, machine: Machine, workload: Workload, trained: bool, rungs: Sequence[Rung] | None
) -> list[str]:
    """What would fit instead, each computed; for people. rungs: those that are loaded; None: all of the device."""
    found = []
    ladder = rungs or (LADDER if machine.device == "cuda" else (FP32,))
    tried = RUNGS[settings.model.rung] if settings.model.rung != "auto" else None
    if model.weight_bytes is None:
        for rung in ladder:
            if rung is not tried and all(p.fits for p in phases_of(settings, model, machine, workload, rung, trained)):
                found.append(f"model.rung={rung.name}")
                break
        if machine.device == "cuda":
            found.append("a 4-bit GGUF of it through Ollama, which can leave layers in RAM")
    found += [f"{name} at {rung.name}" for name, rung in _smaller(settings, model, machine, workload, trained, ladder)]
    return found


def _smaller(
    settings: Settings, model: Model, machine: Machine, workload: Workload, trained: bool, ladder: Sequence[Rung]
) -> list[tuple[str, Rung]]:
    """Up to three well-known smaller models that fit, the largest first, each at its most precise rung."""
    shapes = [shape for name in published_names() if (shape := published(name)) is not None]
    found: list[tuple[str, Rung]] = []
    for shape in sorted(shapes, key=lambda shape: -shape.parameters):
        if shape.parameters >= model.shape.parameters:
            continue
        other = Model(model.role, shape.name, shape, "")
        for rung in ladder:
            if all(phase.fits for phase in phases_of(settings, other, machine, workload, rung, trained)):
                found.append((shape.name, rung))
                break
    return found[:3]


def notes(
    settings: Settings, model: Model, phases: Sequence[Phase], figures: Estimate, device: Device = "cuda"
) -> list[str]:
    """What a person should know of a model's plan."""
    found = []
    shape = model.shape
    if not shape.exact:
        found.append(f"the family {shape.family} is sized as Llama-like: an estimate")
    tables = ledger.weights(shape, NF4, element_bytes(NF4.name, device))
    untied = tables.embedding + tables.head
    if not shape.tied and untied > settings.budget.vram_gib * GIB / 4:
        bits = 8 * element_bytes(NF4.name, device)
        found.append(f"embedding and head are untied and stay at {bits} bits on every rung: {untied / GIB:.2f} GiB")
    serve = phases[0]
    if serve.fits:
        sizes = dict(serve.lines)
        useful = sum(sizes[name] for name in ("weights", "adapters", "kv_cache"))
        share = useful / (useful + sizes["working"])
        if share < settings.budget.memory_efficiency:
            found.append(
                f"while serving {100 * share:.0f} % of the memory is in use for longer than a step, below "
                f"budget.memory_efficiency = {100 * settings.budget.memory_efficiency:.0f} %"
            )
    if settings.mutation.max_rank > settings.lora.rank and len(phases) == 3:
        more = ledger.lora_parameters(
            shape, settings.mutation.max_rank - settings.lora.rank, settings.lora.target_modules
        )
        if phases[2].fits and phases[2].over_bytes + 16 * more > 0:
            found.append(
                f"a candidate mutated to rank {settings.mutation.max_rank} needs {16 * more / MIB:.0f} MiB more to "
                "train: too much at this micro-batch; lower mutation.max_rank"
            )
    if any(mark in f"-{model.name.lower()}-" for mark in _REASONS):
        found.append(
            f"it reasons before it answers, usually for many hundreds of tokens, and {settings.budget.latency_s:g} s "
            f"are about {figures.tokens_in_target} tokens here: it cannot meet the target without a token budget "
            "(evaluation.max_new_tokens, --max-tokens)"
        )
    return found


def machine_notes(settings: Settings, machine: Machine) -> list[str]:
    budget = settings.budget
    if machine.device == "cpu":
        return []
    wanted = (budget.vram_gib + budget.reserve_gib) * GIB
    if machine.card_bytes is None or wanted <= machine.card_bytes:
        return []
    card, has = machine.card_name or "the card", machine.card_bytes / GIB
    if has < budget.vram_gib:
        text = f"budget.vram_gib = {budget.vram_gib:.2f} GiB is more than {card} has ({has:.2f}), which is planned with"
    else:
        text = f"budget.vram_gib + budget.reserve_gib = {wanted / GIB:.2f} GiB, and {card} has {has:.2f}"
    return [f"{text}: lower the budget, or a screen and other programs will not have enough"]
