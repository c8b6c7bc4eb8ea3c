"""What of an experiment fits into memory, decided from shapes and settings alone: phases, choices, remedies."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agentlab.config import Settings
from agentlab.errors import DoesNotFitError
from agentlab.hardware import ledger
from agentlab.hardware.ledger import GIB, MIB
from agentlab.hardware.rungs import BF16, FP32, LADDER, NF4, RUNGS, Rung
from agentlab.hardware.shape import ModelShape, published, published_names
from agentlab.hardware.speed import Estimate, estimate, speed_of

Device = Literal["cuda", "cpu"]
PhaseName = Literal["serve", "evaluate", "train"]

SERVE_TOKENS = 4096  # a talk of 50 turns whose older part is summed up at 2,000 tokens, its tools and its answer
LEAST_TOKENS = 512  # below this an agent with tools cannot work
PROCESS_BYTES = 1 * GIB  # resident memory of Python with torch and transformers before a model is loaded
_REASONS = ("-r1", "r1-", "qwq", "thinking", "reasoner")


@dataclass(frozen=True)
class Machine:
    """Where it runs. card_bytes: the whole memory of the GPU, None where unknown."""

    device: Device
    ram_bytes: int
    card_bytes: int | None = None
    card_name: str | None = None


@dataclass(frozen=True)
class Workload:
    """The suite's share of the plan; tokens are estimates from characters where no tokenizer is loaded."""

    fitness_items: int
    gate_items: int
    prompt_tokens: int  # of a mean item
    answer_tokens: int
    longest_prompt_tokens: int
    longest_answer_tokens: int


@dataclass(frozen=True)
class Model:
    """One model of the chain. weight_bytes: the stored size where it is quantized in its files already."""

    role: str
    name: str
    shape: ModelShape
    origin: str  # where the shape comes from, for people
    weight_bytes: int | None = None


@dataclass(frozen=True)
class Phase:
    """One phase's memory, line by line in bytes, what was chosen so that it fits, and what was wanted."""

    name: PhaseName
    lines: tuple[tuple[str, int], ...]
    limit_bytes: int
    chosen: dict[str, int]
    wanted: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.lines)

    @property
    def over_bytes(self) -> int:
        """How much too large it is; negative: what is left."""
        return self.total_bytes - self.limit_bytes

    @property
    def fits(self) -> bool:
        return self.over_bytes <= 0


@dataclass(frozen=True)
class ModelPlan:
    """What was chosen for one model. remedies: what would fit instead, where it does not."""

    model: Model
    rung: str
    phases: tuple[Phase, ...]
    estimate: Estimate
    notes: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases)


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
    return Plan(settings.name, machine, chosen, tuple(_machine_notes(settings, machine)))


def check_fits(plan: Plan) -> None:
    """Raise DoesNotFitError, one sentence with numbers and the remedy, unless the primary model fits in every phase."""
    primary = plan.models[0]
    if primary.fits:
        return
    phase = max(primary.phases, key=lambda phase: phase.over_bytes)
    line, size = max(phase.lines, key=lambda line: line[1])
    if plan.machine.device == "cuda":
        allowed = f"key budget.vram_gib allows {phase.limit_bytes / GIB:.2f}"
    else:
        allowed = f"this machine allows {phase.limit_bytes / GIB:.2f} (key budget.ram_fraction of its RAM)"
    remedy = "; ".join(primary.remedies) or "a smaller model"
    raise DoesNotFitError(
        f"{primary.model.name} does not fit at {primary.rung}: to {phase.name} it needs "
        f"{phase.total_bytes / GIB:.2f} GiB "
        f"({line.replace('_', ' ')}: {size / GIB:.2f}), {allowed}, {phase.over_bytes / GIB:.2f} GiB too much; "
        f"what would fit: {remedy}"
    )


def allowed_rungs(settings: Settings, device: Device) -> tuple[Rung, ...]:
    """The rungs to choose from, precise first: the one in the settings or, with `auto`, the device's ladder."""
    if settings.model.rung != "auto":
        return (RUNGS[settings.model.rung],)
    return LADDER if device == "cuda" else (FP32,)


# -- one model ----------------------------------------------------------------------------------------------------


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
    remedies = [] if all(phase.fits for phase in phases) else _remedies(settings, model, machine, workload, trained)
    speed = speed_of(machine.device, settings.budget.vram_gib)
    weight_bytes = dict(phases[0].lines)["weights"]
    figures = estimate(settings, model.shape, weight_bytes, speed, workload, machine.device, trained)
    return ModelPlan(model, stored, phases, figures, tuple(_notes(settings, model, phases, figures)), tuple(remedies))


def phases_of(
    settings: Settings, model: Model, machine: Machine, workload: Workload, rung: Rung, trained: bool = True,
    without_embedding: bool = False,
) -> tuple[Phase, ...]:  # fmt: skip
    """serve, and for a model that is trained evaluate and train, at one rung, each as large as fits up to its wish."""
    element = 4 if rung.name == "fp32" else 2
    weights = model.weight_bytes
    if weights is None:
        account = ledger.weights(model.shape, rung, element)
        weights = account.total - (account.embedding if without_embedding else 0)
    sizing = _Sizing(settings, model.shape, machine, workload, rung, element, weights)
    return (sizing.serve(), sizing.evaluate(), sizing.train()) if trained else (sizing.serve(),)


@dataclass(frozen=True)
class _Sizing:
    settings: Settings
    shape: ModelShape
    machine: Machine
    workload: Workload
    rung: Rung
    element: int
    weight_bytes: int

    @property
    def limit(self) -> int:
        budget = self.settings.budget
        if self.machine.device == "cuda":
            return int(budget.vram_gib * GIB)
        return int(budget.ram_fraction * self.machine.ram_bytes)

    @property
    def context(self) -> tuple[str, int]:
        if self.machine.device == "cuda":
            return ("driver_context", int(self.settings.budget.context_gib * GIB))
        return ("process", PROCESS_BYTES)

    @property
    def adapter(self) -> int:
        return ledger.adapter_bytes(self.shape, self.settings.lora.rank, self.settings.lora.target_modules)

    @property
    def trained_tokens(self) -> int:
        """Tokens of the longest item that is trained on."""
        longest = self.workload.longest_prompt_tokens + self.workload.longest_answer_tokens
        return min(longest, self.settings.training.max_length, self.shape.context_length)

    @property
    def evaluated_tokens(self) -> int:
        """Tokens of the longest prompt and the longest answer that is allowed to it."""
        limit = self.settings.evaluation.max_new_tokens or int(1.25 * self.workload.longest_answer_tokens) + 4
        return min(self.workload.longest_prompt_tokens + limit, self.shape.context_length)

    def _serving(self, rows: int, tokens: int, adapters: int) -> tuple[tuple[str, int], ...]:
        account = ledger.serving(
            self.shape, rows, tokens, weight_bytes=self.weight_bytes, rung=self.rung,
            adapter_bytes=adapters * self.adapter, element_bytes=self.element,
        )  # fmt: skip
        return (*account.lines(), self.context)

    def _free(self, adapters: int = 1) -> int:
        fixed = self.weight_bytes + ledger.dequantization_bytes(self.shape, self.rung, self.element) + self.context[1]
        return self.limit - fixed - adapters * self.adapter

    def serve(self) -> Phase:
        """One talk: shrink the context first, then the adapters that stay beside the one in use."""
        wanted = {
            "context_tokens": min(SERVE_TOKENS, self.shape.context_length),
            "adapters": self.settings.population.pool,
        }
        longest = ledger.longest_context(self.shape, self._free(), 1, self.element)
        tokens = max(min(longest, wanted["context_tokens"]), min(LEAST_TOKENS, self.shape.context_length))
        one = sum(size for _, size in self._serving(1, tokens, 0))
        room = ledger.most_adapters(
            self.shape, self.settings.lora.rank, self.settings.lora.target_modules, self.limit - one
        )
        adapters = max(1, min(wanted["adapters"], room))
        chosen = {"context_tokens": tokens, "adapters": adapters}
        if longest > tokens:
            chosen["longest_context_tokens"] = longest
        return Phase("serve", self._serving(1, tokens, adapters), self.limit, chosen, wanted)

    def evaluate(self) -> Phase:
        wanted = {"batch_size": self.settings.evaluation.batch_size}
        tokens = self.evaluated_tokens
        batch = max(1, ledger.largest_batch(self.shape, tokens, self._free(), wanted["batch_size"], self.element))
        chosen = {"batch_size": batch, "tokens": tokens}
        return Phase("evaluate", self._serving(batch, tokens, 1), self.limit, chosen, wanted)

    def train(self) -> Phase:
        """Halve the micro-batch until it fits, with as many accumulated as keep the step's items."""
        batch = self.settings.training.batch_size
        rows = batch
        while True:
            step = ledger.Step(
                rows, self.trained_tokens, self.settings.lora.rank, tuple(self.settings.lora.target_modules),
                dropout=self.settings.lora.dropout > 0, checkpointing=self.machine.device == "cuda",
            )  # fmt: skip
            account = ledger.training(
                self.shape, self.rung, step, weight_bytes=self.weight_bytes, element_bytes=self.element
            )
            lines = (*account.lines(), self.context)
            if rows == 1 or sum(size for _, size in lines) <= self.limit:
                break
            rows = rows // 2 if rows % 2 == 0 else 1
        chosen = {"micro_batch": rows, "accumulation": -(-batch // rows), "tokens": self.trained_tokens}
        return Phase("train", lines, self.limit, chosen, {"micro_batch": batch})


# -- words --------------------------------------------------------------------------------------------------------


def _remedies(settings: Settings, model: Model, machine: Machine, workload: Workload, trained: bool) -> list[str]:
    """What would fit instead, each computed; for people."""
    found = []
    tried = RUNGS[settings.model.rung] if settings.model.rung != "auto" else None
    ladder = LADDER if machine.device == "cuda" else (BF16,)
    if model.weight_bytes is None:
        for rung in ladder:
            if rung is not tried and all(p.fits for p in phases_of(settings, model, machine, workload, rung, trained)):
                found.append(f"model.rung={rung.name}")
                break
        if machine.device == "cuda":
            rung = tried or LADDER[-2]
            found += _embedding_remedy(settings, model, machine, workload, rung, trained)
            found.append("a 4-bit GGUF of it through Ollama, which can leave layers in RAM")
    for name, rung in _smaller(settings, model, machine, workload, trained):
        found.append(f"{name} at {rung.name}")
    return found


def _embedding_remedy(
    settings: Settings, model: Model, machine: Machine, workload: Workload, rung: Rung, trained: bool
) -> list[str]:
    account = ledger.weights(model.shape, rung)
    if model.shape.tied:
        return []
    phases = phases_of(settings, model, machine, workload, rung, trained, without_embedding=True)
    fitting = [phase.name for phase in phases if phase.fits]
    if not fitting or account.embedding > settings.budget.ram_fraction * machine.ram_bytes:
        return []
    left = account.total - account.embedding
    return [
        f"the embedding ({account.embedding / GIB:.2f} GiB) on the CPU, which leaves {left / GIB:.2f} GiB of weights "
        f"and suffices to {_listed(fitting)}"
    ]


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _smaller(
    settings: Settings, model: Model, machine: Machine, workload: Workload, trained: bool
) -> list[tuple[str, Rung]]:
    """Up to three well-known smaller models that fit, the largest first, each at its most precise rung."""
    shapes = [shape for name in published_names() if (shape := published(name)) is not None]
    found = []
    for shape in sorted(shapes, key=lambda shape: -shape.parameters):
        if shape.parameters >= model.shape.parameters:
            continue
        other = Model(model.role, shape.name, shape, "")
        for rung in LADDER[:-1] if machine.device == "cuda" else (FP32,):
            if all(phase.fits for phase in phases_of(settings, other, machine, workload, rung, trained)):
                found.append((shape.name, rung))
                break
    return found[:3]


def _notes(settings: Settings, model: Model, phases: Sequence[Phase], figures: Estimate) -> list[str]:
    notes = []
    shape = model.shape
    if not shape.exact:
        notes.append(f"the family {shape.family} is sized as Llama-like: an estimate")
    tables = ledger.weights(shape, NF4)
    untied = tables.embedding + tables.head
    if not shape.tied and untied > settings.budget.vram_gib * GIB / 4:
        notes.append(f"embedding and head are untied and stay at 16 bits on every rung: {untied / GIB:.2f} GiB")
    serve = phases[0]
    if serve.fits:
        sizes = dict(serve.lines)
        useful = sum(sizes[name] for name in ("weights", "adapters", "kv_cache"))
        share = useful / (useful + sizes["working"])
        if share < settings.budget.memory_efficiency:
            notes.append(
                f"while serving {100 * share:.0f} % of the memory is in use for longer than a step, below "
                f"budget.memory_efficiency = {100 * settings.budget.memory_efficiency:.0f} %"
            )
    if settings.mutation.max_rank > settings.lora.rank and len(phases) == 3:
        more = ledger.lora_parameters(
            shape, settings.mutation.max_rank - settings.lora.rank, settings.lora.target_modules
        )
        if phases[2].fits and phases[2].over_bytes + 16 * more > 0:
            notes.append(
                f"a candidate mutated to rank {settings.mutation.max_rank} needs {16 * more / MIB:.0f} MiB more to "
                "train: too much at this micro-batch; lower mutation.max_rank"
            )
    if any(mark in f"-{model.name.lower()}-" for mark in _REASONS):
        notes.append(
            f"it reasons before it answers, usually for many hundreds of tokens, and {settings.budget.latency_s:g} s "
            f"are about {figures.tokens_in_target} tokens here: it cannot meet the target without a token budget "
            "(evaluation.max_new_tokens, --max-tokens)"
        )
    return notes


def _machine_notes(settings: Settings, machine: Machine) -> list[str]:
    budget = settings.budget
    if machine.device == "cpu":
        return []
    wanted = (budget.vram_gib + budget.reserve_gib) * GIB
    if machine.card_bytes is not None and wanted > machine.card_bytes:
        return [
            f"budget.vram_gib + budget.reserve_gib = {wanted / GIB:.2f} GiB, and {machine.card_name or 'the card'} has "
            f"{machine.card_bytes / GIB:.2f}: lower the budget, or a screen and other programs will not have enough"
        ]
    return []
