"""What an agent yields while it works, and the `ReasoningResult` that comes out at the end. Times in seconds."""

import dataclasses
import json
from typing import Any, ClassVar, Literal

from agentlab.events import Event
from agentlab.hardware.monitor import MemoryStats

Refusal = Literal["task", "limit"]
State = Literal["answered", "deadline", "cancelled", "failed"]
"""How an answer ended: in full; with the best there was at its deadline; stopped by somebody; without an answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Which model, adapter and run answered. `role` is its place in the fallback chain; run "" for none."""

    model: str
    model_sha256: str
    role: str  # primary, fallback, emergency
    engine: str
    device: str
    adapter: str | None = None
    adapter_sha256: str | None = None
    run: str = ""

    def __str__(self) -> str:
        who = f"{self.model} + {self.adapter}" if self.adapter else f"{self.model}, base model"
        return who + (f" of {self.run}" if self.adapter and self.run else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningStep:
    """One turn of the loop. `action` is {"name", "arguments"} of the executed call, with "original" if it was repaired.

    confidence: the model's probability of what it wrote in this step, per token (geometric mean), 0 to 1; None where
    the engine tells no log-probabilities.
    """

    step_number: int
    thought: str
    action: dict[str, Any] | None
    observation: str | None
    confidence: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningResult:
    """An answer and how it came about.

    confidence_score: 0 to 1, see docs/AGENT.md; None where it is not known. processing_time: seconds from asking to
    answering. memory_usage: the machine's after the answer, in MB; `process_ram_mb` is this process's part.
    context_used: ids of the memories that the model was shown. cut_short: the answer ran into max_new_tokens.
    answer_adapter: who wrote the answer's words; None: the base model. warnings: what went wrong beside it, the memory
    that could not be asked or written. `error` says in one sentence why state is "failed"; `refused`: because of what
    was asked, a task that is too long for the model, or a limit on its tokens too small for the call that it demands.
    """

    task_id: str
    prompt: str
    reasoning_steps: list[ReasoningStep]
    final_answer: str
    confidence_score: float | None
    processing_time: float
    memory_usage: MemoryStats
    model_info: ModelInfo
    state: State
    context_used: list[str] = dataclasses.field(default_factory=list)
    session_id: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    process_ram_mb: float = 0.0
    cut_short: bool = False
    answer_adapter: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    fallbacks: list[str] = dataclasses.field(default_factory=list)
    error: str = ""
    refused: Refusal | None = None

    def to_json(self) -> str:
        """One JSON object with every field."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, default=str)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Event):
    """Base of what `agent.run` yields, at its end. Steps carry a person's words, so no journal gets them."""

    journaled: ClassVar[bool] = False
    step_number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recalled(Step):
    """Memories and earlier turns that the model is shown, as it is shown them."""

    query: str
    text: str
    memory_ids: list[str]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta(Step):
    """A piece of text as the model writes it; together the pieces of one part are that part."""

    text: str
    part: Literal["thought", "call", "answer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retracted(Step):
    """What this step has written as answer so far was a thought: its end came, and nothing had marked its beginning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated(Step):
    """One whole output of the model, as it came; `messages` is what it answered."""

    messages: list[dict[str, Any]] = dataclasses.field(repr=False)
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    confidence: float | None
    seconds: float
    model_info: ModelInfo = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thought(Step):
    """What the model thought before it acted or answered; never part of the answer."""

    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejected(Step):
    """An output that cannot be used, and what is done about it. `repair` goes with the call that came of it."""

    text: str
    problems: list[str]
    remedy: Literal["repair", "re-ask", "fallback", "give up"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCalled(Step):
    """A call that is about to be executed; `original` is the model's own text where it had to be repaired."""

    name: str
    arguments: dict[str, Any]
    original: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed(Step):
    """What came of a call: `problem` is None, "timeout", "error" or "cancelled"."""

    name: str
    text: str
    ok: bool
    problem: str | None
    truncated: bool
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FellBack(Step):
    """Another model of the chain took over, or the same one was opened anew because its process had died."""

    from_model: str
    to_model: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovered(Step):
    """Memory was lacking and something was given up for it, or it has returned and a step was undone.

    The fields are those of `events.RecoveryStep`. The answer goes on where it was; the talk is untouched.
    """

    model: str
    action: str
    source: str
    target: str
    bytes_expected: int
    undone: bool
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered(Step):
    """Always the last step."""

    result: ReasoningResult
