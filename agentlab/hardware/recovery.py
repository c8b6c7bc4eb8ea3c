"""What to give up when memory runs out, and when to take it back. This room decides; engines and the chain act.

In this order: a shorter context, the adapters that are not in use, the next rung that saves bytes, a smaller model,
the CPU. Every step makes something strictly smaller and an answer may take MAX_STEPS of them, so it always ends.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from agentlab.config import BudgetSettings, RungName
from agentlab.hardware.rungs import FP32, LADDER
from agentlab.hardware.sizing import LEAST_TOKENS, Device
from agentlab.hardware.watch import Sample

_HALVINGS = 9  # of a context of 262,144 tokens, down to the least
_RUNGS = 4
# All that three models, and the last again on the CPU, can give up: their context, rungs, adapters, and their place.
MAX_STEPS = 4 * (_HALVINGS + _RUNGS + 2)
CALM_ANSWERS = 2  # answers without a lack of memory before a step is undone; twice as many after each relapse
MARGIN = 0.1  # so much more than a step has freed has to be free before it is undone
_MOST_RELAPSES = 6

ActionKind = Literal["shrink_context", "offload_adapters", "lower_rung", "smaller_model", "cpu"]


@dataclass(frozen=True)
class Footprint:
    """What a loaded engine holds and could give up; sizes in bytes.

    context_tokens: most that it reads now. rung: None where it cannot be changed. rung_bytes: the base's weights at
    each rung that this engine can load. idle_adapters: on the device and not needed for the answer. elastic_bytes: what
    it has taken beside all that only because there was room, as vLLM its cache.
    """

    device: Device
    context_tokens: int
    bytes_per_token: int
    rung: RungName | None = None
    rung_bytes: Mapping[RungName, int] = field(default_factory=dict)
    idle_adapters: int = 0
    idle_adapter_bytes: int = 0
    elastic_bytes: int = 0


@dataclass(frozen=True)
class Situation:
    """Where memory was lacking, and what is left to try.

    footprint: None where nothing can be given up, as of a model on a server. asked_tokens: prompt and answer of the
    request that failed. least_tokens: what the answer cannot do without. smaller: the next model of the chain.
    cpu: the model that could be loaded on the CPU.
    """

    problem: Literal["serving", "loading"]
    model: str
    footprint: Footprint | None = None
    asked_tokens: int = 0
    least_tokens: int = 0
    smaller: str | None = None
    cpu: str | None = None


@dataclass(frozen=True)
class Action:
    """One step. bytes_expected: what it frees by the ledger's account; 0 where that is not known. elastic_bytes: how
    much of that is taken again only as far as there is room, when it is undone.
    """

    kind: ActionKind
    source: str
    target: str
    bytes_expected: int = 0
    elastic_bytes: int = 0


def next_action(situation: Situation, taken: int, limit: int = MAX_STEPS) -> Action | None:
    """The next step after `taken` of them in this answer; None when nothing is left or the limit is reached."""
    return None if taken >= limit else next(_left(situation), None)


def _left(situation: Situation) -> Iterator[Action]:
    """Everything that could still be given up, in the order in which it is."""
    held = situation.footprint
    own = elastic = 0
    if held is not None and situation.problem == "serving":
        yield from _shorter(situation, held)
        if held.idle_adapters:
            yield Action("offload_adapters", str(held.idle_adapters), "0", held.idle_adapter_bytes)
    if held is not None and held.rung is not None:
        elastic = held.elastic_bytes
        own = held.rung_bytes.get(held.rung, 0) + elastic
        lower = next_rung(held.rung, held.rung_bytes)
        if lower is not None:
            yield Action("lower_rung", held.rung, lower, own - held.rung_bytes[lower], elastic)
    if situation.smaller is not None:
        yield Action("smaller_model", situation.model, situation.smaller, own, elastic)
    if situation.cpu is not None and (held is None or held.device != "cpu"):
        yield Action("cpu", situation.model, f"{situation.cpu} on the CPU", own, elastic)


def _shorter(situation: Situation, held: Footprint) -> Iterator[Action]:
    """Half of what was asked, down to what an agent with tools and this answer need."""
    base = min(held.context_tokens, situation.asked_tokens)
    target = max(base // 2, LEAST_TOKENS, situation.least_tokens)
    if target < base and held.bytes_per_token:
        yield Action("shrink_context", str(held.context_tokens), str(target), (base - target) * held.bytes_per_token)


def next_rung(rung: RungName, rung_bytes: Mapping[RungName, int]) -> RungName | None:
    """The most precise rung below `rung` whose weights take fewer bytes; None when there is none."""
    names = [one.name for one in (FP32, *LADDER)]
    for name in names[names.index(rung) + 1 :]:
        if name in rung_bytes and rung_bytes[name] < rung_bytes[rung]:
            return name
    return None


def may_undo(
    action: Action, free_bytes: int, calm_answers: int, relapses: int, nothing_left: bool = False
) -> bool:  # fmt: skip
    """Whether memory has returned for good enough to take a step back.

    calm_answers: answers since memory was last lacking or a step was undone. relapses: how often this step had to be
    taken again after it had been undone. A step whose size nobody knows is tried wherever anything is free: when it has
    to be taken again, its next undoing waits longer. nothing_left: no model answers without it, so that there is no
    calm to wait for and nothing to lose.
    """
    needed = 0 if nothing_left else CALM_ANSWERS * 2 ** min(relapses, _MOST_RELAPSES)
    wanted = action.bytes_expected - action.elastic_bytes
    return calm_answers >= needed and free_bytes >= max(1.0, (1 + MARGIN) * wanted)


def free_bytes(sample: Sample, budget: BudgetSettings) -> int:
    """What may still be taken by the monitor's reading: up to `memory_alert` of the memory, and within the budget.

    Memory that is reserved on purpose and idle counts as free.
    """
    limit = budget.memory_alert * sample.total_mib
    left = limit - (sample.used_mib - sample.idle_mib)
    if sample.device == "cuda":
        held = sum(size for owner, size in sample.owners.items() if owner != "other_processes") - sample.idle_mib
        left = min(left, budget.vram_gib * 1024 - held)
    return max(0, int(left * 2**20))
