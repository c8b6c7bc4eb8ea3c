"""What a run's journal says about its states: who was at work, who still is, and how it ended."""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Literal

from agentlab import events
from agentlab.evolution.run import Run, generation_of
from agentlab.hardware import lease

Status = Literal["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"]
TERMINAL = ("FINISHED", "FAILED", "KILLED")
CHANGES = (
    events.EvolutionStarted,
    events.GenerationStarted,
    events.GenerationFinished,
    events.GenerationFailed,
    events.Stopped,
    events.EvolutionFinished,
)


@dataclasses.dataclass
class Span:
    """First and last sign of something, in milliseconds since the epoch."""

    started_ms: int
    ended_ms: int


class Timeline:
    """States from the journal and from which processes are alive.

    MLflow knows RUNNING, SCHEDULED, FINISHED, FAILED and KILLED. Nothing is RUNNING here without a living process.
    """

    def __init__(
        self, journal: Iterable[events.Event], working: bool, launching: bool, also: events.Event | None = None
    ) -> None:
        self._working = working  # a process is at a generation now
        self._launching = launching  # a launcher is alive
        self._evolution: type[events.Event] | None = None  # the last event that changed the whole run's state
        self._generations: dict[int, Status] = {}
        self._training: set[str] = set()  # begun since their generation last started
        self._open: int | None = None
        self._changed_s = 0.0  # when the state last changed
        self.spans: dict[str, Span] = {}
        for event in journal:
            self._read(event)
        if also is not None and also.time_s > self._changed_s:
            self._read(also)

    @classmethod
    def of(
        cls, run: Run, working: bool = False, launching: bool = False, also: events.Event | None = None
    ) -> "Timeline":
        """Of a run on disk; `working` and `launching` say what the calling process itself does.

        `also` is a change of state that may not be in the journal yet.
        """
        return cls(
            run.journal.replay(),
            working=working or lease.holder(run.worker_lock) is not None,
            launching=launching or lease.holder(run.launcher_lock) is not None,
            also=also,
        )

    def _read(self, event: events.Event) -> None:
        self._mark("evolution", event)
        candidate = getattr(event, "candidate", None)
        if isinstance(candidate, str) and candidate != "base" and not isinstance(event, events.Bred):
            self._mark(candidate, event)
        if isinstance(event, events.TrainingStarted):
            self._training.add(event.candidate)
        if self._open is not None:
            self._mark(f"generation-{self._open}", event)
        if not isinstance(event, CHANGES):
            return
        self._evolution = type(event)
        self._changed_s = event.time_s
        match event:
            case events.GenerationStarted():
                self._generations[event.generation] = "RUNNING"
                self._training.clear()
                self._open = event.generation
                self._mark(f"generation-{event.generation}", event)
            case events.GenerationFailed():
                self._generations[event.generation] = "FAILED"
                self._open = None
            case events.Stopped() if self._open is not None:
                self._generations[self._open] = "KILLED"
                self._open = None
            case events.GenerationFinished() | events.Stopped() | events.EvolutionFinished():
                self._open = None
            case _:
                pass

    def _mark(self, key: str, event: events.Event) -> None:
        now_ms = int(event.time_s * 1000)
        span = self.spans.setdefault(key, Span(now_ms, now_ms))
        span.ended_ms = max(span.ended_ms, now_ms)

    def evolution(self, finished: Collection[int], complete: bool) -> Status:
        """State of the whole run, with the generations that are `finished`; `complete`: nothing is left to do.

        SCHEDULED is a run that waits for somebody to run its next generation.
        """
        if self._evolution is events.EvolutionFinished:
            return "FINISHED"
        if self._evolution is events.GenerationFailed:
            return "FAILED"
        if self._evolution is events.Stopped:
            return "KILLED"
        under_way = self._open is not None and self._open not in finished
        if self._launching or (self._working and under_way):
            return "RUNNING"
        if complete:
            return "FINISHED"
        return "KILLED" if under_way else "SCHEDULED"

    def generation(self, generation: int, finished: bool) -> Status:
        """State of one generation; `finished`: its result is on disk."""
        if finished:
            return "FINISHED"
        said = self._generations.get(generation, "SCHEDULED")
        alive = self._working and self._open == generation
        return "KILLED" if said == "RUNNING" and not alive else said

    def candidate(self, adapter: str, state: str, generation_finished: bool) -> Status:
        """State of one candidate in `state`."""
        if state == "failed":
            return "FAILED"
        if state in ("evaluated", "kept", "culled"):
            return "FINISHED"
        status = self.generation(generation_of(adapter), generation_finished)
        if status == "RUNNING":
            return "RUNNING" if adapter in self._training or state == "trained" else "SCHEDULED"
        return "KILLED" if status == "FINISHED" else status
