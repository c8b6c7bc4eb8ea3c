"""How large each phase of an experiment can be on one model and rung: shrunk until it fits, line by line in bytes."""

from dataclasses import dataclass
from typing import Literal

from agentlab.config import Settings
from agentlab.hardware import ledger
from agentlab.hardware.ledger import GIB
from agentlab.hardware.rungs import Rung, element_bytes
from agentlab.hardware.shape import ModelShape

Device = Literal["cuda", "cpu"]
PhaseName = Literal["serve", "evaluate", "train"]

SERVE_TOKENS = 4096  # a talk of 50 turns whose older part is summed up at 2,000 tokens, its tools and its answer
LEAST_TOKENS = 512  # below this an agent with tools cannot work
_SERVING_THREADS = 1  # that multiply on a GPU; torch keeps a workspace for each
_TRAINING_THREADS = 2  # autograd goes back in one of its own
PROCESS_BYTES = 1 * GIB  # resident memory of Python with torch and transformers before a model is loaded


def halved(rows: int) -> int:
    """The next smaller micro-batch of which a whole number still makes up a step."""
    return rows // 2 if rows % 2 == 0 else 1


@dataclass(frozen=True)
class Machine:
    """Where it runs. card_bytes, capability: the GPU's whole memory and compute capability; None where unknown."""

    device: Device
    ram_bytes: int
    card_bytes: int | None = None
    card_name: str | None = None
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Workload:
    """The suite's share of the plan; tokens are estimates from characters where no tokenizer is loaded."""

    fitness_items: int
    gate_items: int
    prompt_tokens: int  # of a mean item
    answer_tokens: int
    longest_prompt_tokens: int
    longest_answer_tokens: int
    shared_tokens: int = 0  # that all prompts begin with


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


def phases_of(
    settings: Settings, model: Model, machine: Machine, workload: Workload, rung: Rung, trained: bool = True
) -> tuple[Phase, ...]:
    """serve, and for a model that is trained evaluate and train, at one rung, each as large as fits up to its wish."""
    element = element_bytes(rung.name, machine.device)
    weights = model.weight_bytes
    if weights is None:
        weights = ledger.weights(model.shape, rung, element).total
    sizing = _Sizing(settings, model.shape, machine, workload, rung, element, weights, trained)
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
    trained: bool  # else it holds no adapters: they fit the model alone that they were trained on

    @property
    def limit(self) -> int:
        budget = self.settings.budget
        if self.machine.device == "cuda":
            allowed = int(budget.vram_gib * GIB)
            return allowed if self.machine.card_bytes is None else min(allowed, self.machine.card_bytes)
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
    def sums(self) -> int:
        """What the engine keeps of weights with an adapter added, once: in fp32 alone."""
        if self.rung.name != "fp32" or not self.trained:
            return 0
        return ledger.sum_bytes(self.shape, self.settings.lora.target_modules)

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

    def _serving(self, rows: int, tokens: int, adapters: int, shared: int = 0) -> tuple[tuple[str, int], ...]:
        account = ledger.serving(
            self.shape, rows, tokens, weight_bytes=self.weight_bytes, rung=self.rung,
            adapter_bytes=adapters * self.adapter + self.sums, element_bytes=self.element,
            workspace_bytes=self._workspace(_SERVING_THREADS), shared=shared,
        )  # fmt: skip
        return (*account.lines(), self.context)

    def _workspace(self, threads: int) -> int:
        return ledger.blas_bytes(threads, self.machine.capability) if self.machine.device == "cuda" else 0

    def _free(self, adapters: int = 1) -> int:
        fixed = self.weight_bytes + self._workspace(_SERVING_THREADS) + self.context[1]
        return self.limit - fixed - adapters * self.adapter - self.sums

    def serve(self) -> Phase:
        """One talk: the context shrinks down to its least, then adapters are dropped but for the one in use."""
        wanted = {
            "context_tokens": min(SERVE_TOKENS, self.shape.context_length),
            "adapters": self.settings.population.pool if self.trained else 0,
        }
        longest = ledger.longest_context(self.shape, self._free(wanted["adapters"]), 1, self.element, self.rung)
        tokens = max(min(longest, wanted["context_tokens"]), min(LEAST_TOKENS, self.shape.context_length))
        one = sum(size for _, size in self._serving(1, tokens, 0))
        room = ledger.most_adapters(
            self.shape, self.settings.lora.rank, self.settings.lora.target_modules, self.limit - one
        )
        adapters = min(wanted["adapters"], max(1, room))
        chosen = {"context_tokens": tokens, "adapters": adapters}
        if longest > tokens:
            chosen["longest_context_tokens"] = longest
        return Phase("serve", self._serving(1, tokens, adapters), self.limit, chosen, wanted)

    def evaluate(self) -> Phase:
        wanted = {"batch_size": self.settings.evaluation.batch_size}
        tokens, shared = self.evaluated_tokens, self.workload.shared_tokens
        most = ledger.largest_batch(
            self.shape, tokens, self._free(), wanted["batch_size"], self.element, self.rung, shared
        )
        batch = max(1, most)
        chosen = {"batch_size": batch, "tokens": tokens}
        return Phase("evaluate", self._serving(batch, tokens, 1, shared), self.limit, chosen, wanted)

    def train(self) -> Phase:
        """Halve the micro-batch until it fits, with as many accumulated as keep the step's items."""
        batch = self.settings.training.batch_size
        rows = batch
        while True:
            step = ledger.Step(
                rows, self.trained_tokens, self.settings.lora.rank, tuple(self.settings.lora.target_modules),
                dropout=self.settings.lora.dropout > 0, checkpointing=self.machine.device == "cuda",
                mask_bytes=1 if self.machine.device == "cuda" else 4, padded=rows > 1, accumulated=rows < batch,
            )  # fmt: skip
            account = ledger.training(
                self.shape, self.rung, step, weight_bytes=self.weight_bytes, element_bytes=self.element,
                workspace_bytes=self._workspace(_TRAINING_THREADS),
            )  # fmt: skip
            lines = (*account.lines(), self.context)
            if rows == 1 or sum(size for _, size in lines) <= self.limit:
                break
            rows = halved(rows)
        chosen = {"micro_batch": rows, "accumulation": -(-batch // rows), "tokens": self.trained_tokens}
        return Phase("train", lines, self.limit, chosen, {"micro_batch": batch})
