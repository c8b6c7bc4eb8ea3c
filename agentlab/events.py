"""What happens during a run, as typed events, and the journal that makes them durable and followable.

Whoever runs a generation appends each event before yielding it; notebooks, terminals, MLflow and tests consume the
same stream, live or replayed. Events carry measurements and ids, never prompts of a person and never secrets.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from agentlab.files import disk_errors

_KINDS: dict[str, type["Event"]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events; `time_s` is seconds since the epoch."""

    kind: ClassVar[str] = ""
    durable: ClassVar[bool] = True  # fsynced before it is yielded; progress ticks are not
    journaled: ClassVar[bool] = True  # what carries a person's words is not, and no journal takes it
    time_s: float = dataclasses.field(default_factory=time.time)

    def __init_subclass__(cls) -> None:
        # GateDecided → gate_decided
        cls.kind = "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).lstrip("_")
        if cls.journaled:
            _KINDS[cls.kind] = cls

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, **dataclasses.asdict(self)}, ensure_ascii=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolutionStarted(Event):
    """A launcher began or continued a run."""

    run: str
    name: str
    generations: int
    population: int
    continued: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationStarted(Event):
    generation: int
    pid: int
    continued: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelLoading(Event):
    """An engine is being opened, which takes vLLM up to some minutes; `model_loaded` follows where it succeeds."""

    durable = False
    model: str
    engine: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelLoaded(Event):
    model: str
    engine: str
    device: str
    parameters: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated(Event):
    """Rates, measured once per run, that turn token counts into the latency used by fitness."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bred(Event):
    generation: int
    candidate: str
    operator: str
    parents: list[str]
    merge_weights: list[float]
    genome: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStarted(Event):
    candidate: str
    steps: int
    learning_rate: float
    rank: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Focused(Event):
    """A continuation looked at training items: so many of them it would probably get wrong just now."""

    candidate: str
    items: int
    doubted: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingStep(Event):
    durable: ClassVar[bool] = False
    candidate: str
    step: int
    steps: int
    loss: float
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemedyApplied(Event):
    """Training failed in a known way and is tried again differently. problem: nan, divergence or out_of_memory."""

    candidate: str
    problem: str
    action: str
    learning_rate: float
    batch_size: int
    accumulation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(Event):
    candidate: str
    train_seconds: float
    train_tokens: int
    loss: float | None  # None: merged without training


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationProgress(Event):
    durable: ClassVar[bool] = False
    candidate: str
    split: str
    done: int
    total: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Scores of one model (an adapter id, or "base") on one split; accuracy with its 95 % interval."""

    candidate: str
    split: str
    accuracy: float
    accuracy_ci_low: float
    accuracy_ci_high: float
    items: int
    fitness: float | None
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CandidateFailed(Event):
    candidate: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selected(Event):
    """The pool after pruning, best first, and who left it."""

    generation: int
    pool: list[str]
    culled: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateDecided(Event):
    generation: int
    challenger: str
    incumbent: str
    wins: int
    losses: int
    items: int
    p_value: float
    alpha: float
    detectable_gain: float
    passed: bool
    verdict: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promoted(Event):
    generation: int
    adapter: str
    previous: str
    below_threshold: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something the person should know that does not stop the run."""

    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waiting(Event):
    """Work pauses until something outside of it has changed; the next event of the work says that it goes on."""

    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryStep(Event):
    """Memory was lacking and something was given up for it, or it has returned and the step was undone.

    action: shrink_context (tokens), offload_adapters (their number), lower_rung, smaller_model, cpu; close_idle (models
    that were kept for later); shrink_batch (requests), which holds for the rest of them.
    bytes_expected: what the step frees by the ledger's account, or takes when it is undone; 0 where nobody knows.
    """

    model: str
    action: str
    source: str
    target: str
    bytes_expected: int
    undone: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationFinished(Event):
    generation: int
    champion: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationFailed(Event):
    """exit_code: that of the error's class, 5 for what no class of the program's own describes."""

    generation: int
    error: str
    exit_code: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SealOpened(Event):
    """The sealed split was answered by these models (adapter hashes; "base")."""

    models: list[str]
    opening: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SealedComparison(Event):
    champion: str
    items: int
    base_accuracy: float
    champion_accuracy: float
    gain: float
    gain_ci_low: float
    gain_ci_high: float
    openings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolutionFinished(Event):
    champion: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """Always the last event of a run that was asked to stop."""

    reason: str


FINAL = (EvolutionFinished, Stopped, GenerationFailed)


def parse(line: str) -> Event | None:
    """The event in one journal line; None for a torn line or a kind this version does not know."""
    try:
        values = json.loads(line)
        event_type = _KINDS[values.pop("kind")]
        known = {field.name for field in dataclasses.fields(event_type)}
        return event_type(**{key: value for key, value in values.items() if key in known})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


class Journal:
    """`events.jsonl` of one run: appended by one process, followed by any number."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Event) -> None:
        """Add one line; durable events are on disk when this returns. Raises StorageError on a full disk."""
        if not event.journaled:
            raise ValueError(f"{event.kind} carries a person's words; a journal holds measurements and ids")
        line = (event.to_json() + "\n").encode()
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                if file.tell() and self._torn(file):
                    line = b"\n" + line  # a kill left half a line: close it, so that this event is not glued to it
                file.write(line)
                file.flush()
                if event.durable:
                    os.fsync(file.fileno())

    @staticmethod
    def _torn(file: Any) -> bool:
        file.seek(-1, os.SEEK_END)
        return bool(file.read(1) != b"\n")

    def replay(self, offset: int = 0) -> Iterator[Event]:
        """All complete events from byte `offset` on."""
        for event, _ in self.read(offset):
            yield event

    def read(self, offset: int) -> Iterator[tuple[Event, int]]:
        """(event, the offset behind it) for each complete line from byte `offset` on."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                event = parse(line.decode(errors="replace"))
                if event is not None:
                    yield event, offset

    def size(self) -> int:
        """Bytes written so far: an offset to follow from."""
        return self.path.stat().st_size if self.path.exists() else 0

    def follow(self, offset: int = 0, alive: Callable[[], bool] = lambda: True, poll_s: float = 0.2) -> Iterator[Event]:
        """Events from `offset` on as they are written, until `alive()` is false and everything is read."""
        position = offset
        while True:
            last_round = not alive()
            for event, end in self.read(position):
                position = end
                yield event
            if last_round:
                return
            time.sleep(poll_s)
