"""What an engine is: one loaded base model that answers batches of chats, each request with its own adapter.

Every implementation passes the conformance suite in `tests/inference/conformance.py`.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from agentlab.config import RungName
from agentlab.errors import AdapterError, AgentlabError
from agentlab.events import RecoveryStep
from agentlab.hardware.recovery import Action, Footprint
from agentlab.models import ModelFiles
from agentlab.toolformat import CallStyle, Tool


class EngineError(AgentlabError):
    """A request that this engine cannot answer as asked."""


class LimitTooSmallError(EngineError):
    """max_new_tokens leaves no room for the call that the request demands."""


class OutOfMemoryError(EngineError):
    """The device's memory did not suffice even for the smallest batch."""


class NoRoomElsewhereError(OutOfMemoryError):
    """The RAM does not suffice for a model that is to be moved to the CPU, at no rung."""


class EngineBroken(EngineError):
    """The engine's process died or does not answer as it should; whoever opens it anew can go on."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One chat to answer.

    messages: [{"role", "content"}, …], with "tool_calls" and whatever else the chat template reads.
    adapter: an id loaded with `load_adapter`; None: the base model.
    temperature 0 is greedy; above 0 the answer is a function of (request, seed), whatever else is in the batch.
    stop: the answer ends before the first of these strings. logprobs: also return each token's log-probability, that of
    the model without any structure. structure: an xgrammar structural tag that the answer fits (`toolformat.structure`
    makes one); it is complete within max_new_tokens, and a call that there is no room for does not begin.
    tools: shown by the chat template; refused where it shows none. reuse_prompt: what an earlier request has read of
    the same prompt need not be read again; False for whoever measures reading.
    """

    messages: list[dict[str, Any]]
    adapter: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    structure: Mapping[str, Any] | None = None
    tools: Sequence[Tool] | None = None
    reuse_prompt: bool = True


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer. `token_ids` are the generated tokens without the end token; `logprobs` has one value for each.

    finish_reason: "stop" (end token, stop string or a complete structure), "length" (limit reached), "cancelled".
    latency_s: from the start of the request's batch to its last token. cached_tokens: of the prompt, how many an
    earlier request had read; 0 where it is not known.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    latency_s: float
    logprobs: list[float] | None = None
    cached_tokens: int = 0

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What an engine can do; a request for anything else is refused with an EngineError, never answered without it.

    logprobs, structure: as in `Request`. seeds: whether a temperature above 0 is taken. tools: whether the chat
    template shows them. adapters: whether any can be loaded. exact_tokens: whether `token_ids` and token counts are
    the model's own; where not, -1 stands for a token that is only known to have been there.
    """

    logprobs: bool = True
    seeds: bool = True
    structure: bool = True
    tools: bool = True
    adapters: bool = True
    exact_tokens: bool = True


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer; the last one carries the whole completion."""

    text: str
    completion: Completion | None = None


class Engine(abc.ABC):
    """One base model in memory. Not thread-safe: one call at a time."""

    name: str
    device: str
    model_files: ModelFiles
    is_elsewhere = False
    """Whether the model lies in the memory of a server that is not this program's."""
    tell: Callable[[RecoveryStep], None] = staticmethod(lambda step: None)
    """Called with what the engine gave up by itself for lack of memory; for whoever opened it to set."""
    note = ""
    """What a person should know of how it was opened, in one sentence; mostly nothing."""

    def capabilities(self) -> Capabilities:
        """What this engine, and the server behind it, can do."""
        return Capabilities(tools=self.call_style() is not None)

    @abc.abstractmethod
    def load_adapter(self, adapter: str, folder: Path) -> None:
        """Make `adapter` usable in requests. Loading the same id again replaces it.

        Raises AdapterError, or what the lack of memory is called; then the old one is still there.
        """

    @abc.abstractmethod
    def unload_adapter(self, adapter: str) -> None:
        """Free it; unknown ids are ignored."""

    def pin(self, adapter: str) -> None:
        """Keep a loaded adapter where it answers fastest, whatever else is used; nothing where there is but one place.

        Raises AdapterError for one that is not loaded, EngineError where every place is taken.
        """
        if adapter not in self.adapters():
            raise AdapterError(f"adapter {adapter} is not loaded; loaded: {', '.join(self.adapters()) or 'none'}")

    @abc.abstractmethod
    def adapters(self) -> list[str]:
        """Ids loaded now."""

    @abc.abstractmethod
    def answers(
        self, requests: Sequence[Request], batch_size: int = 32, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Completion]]:
        """(index, completion) of each request, batch by batch, in the order in which they are ready.

        When `should_stop()` turns true, running requests end as "cancelled" with what they have; the rest is left out.
        """

    @abc.abstractmethod
    def stream(self, request: Request, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Chunk]:
        """Pieces of one answer as they are generated; together exactly the completion's text."""

    @abc.abstractmethod
    def count_tokens(self, messages: list[dict[str, Any]], tools: Sequence[Tool] | None = None) -> int:
        """Tokens of the rendered prompt."""

    def cached_tokens(self, request: Request) -> int:
        """How many tokens of the request's prompt need not be read, because an earlier request has; 0 if unknown."""
        return 0

    @abc.abstractmethod
    def call_style(self) -> CallStyle | None:
        """How the model's own chat template writes a tool call; None where it knows no tools, or writes unreadably."""

    def opens_thought(self, messages: list[dict[str, Any]]) -> bool:
        """Whether the chat template itself begins the answer with <think>, so that only its end is written."""
        return False

    @abc.abstractmethod
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""

    def parameters(self) -> int:
        """Number of weights of the base model; 0 where it is not known."""
        return 0

    def vram_peak_mib(self) -> float:
        """Peak of the accelerator memory reserved by processes of the engine's own; 0 where it works in this one."""
        return 0.0

    def ram_peak_mib(self) -> float:
        """Peak of the RAM of processes of the engine's own, since they were started; 0 where it works in this one."""
        return 0.0

    def planned_vram_mib(self, rows: int, tokens: int) -> float:
        """The accelerator memory that a batch of `rows` requests of `tokens` tokens is planned to take; 0 on a CPU."""
        return 0.0

    def change_rung(self, rung: RungName, room_bytes: int = 0) -> int:
        """Load the model anew at another rung and keep the adapters; the bytes that this saves. Raises EngineError."""
        raise EngineError(f"the engine {self.name} keeps the rung that it was opened at; allowed: transformers")

    def footprint(self, adapter: str | None = None) -> Footprint | None:
        """What could be given up while `adapter` answers; None for one that gives nothing up once it is loaded."""
        return None

    def relieve(self, action: Action, adapter: str | None = None) -> None:
        """Take a step that `footprint` allows; `adapter` stays. Raises EngineError, and OutOfMemoryError where a
        reload failed: the engine is broken then."""
        raise EngineError(f"the engine {self.name} cannot {action.kind.replace('_', ' ')}")

    def restore(self, action: Action) -> None:
        """Undo a step that `relieve` took. Raises what `relieve` raises."""
        raise EngineError(f"the engine {self.name} cannot undo {action.kind.replace('_', ' ')}")

    @abc.abstractmethod
    def close(self) -> None:
        """Free the model; the engine is unusable afterwards. Harmless when repeated."""

    def generate(self, requests: Sequence[Request], batch_size: int = 32) -> list[Completion]:
        """All completions in the requests' order."""
        found = dict(self.answers(requests, batch_size))
        return [found[index] for index in range(len(requests))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
