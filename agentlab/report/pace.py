"""How fast a run's kinds of work go, measured from the times of its events."""

from typing import Literal

from agentlab import events
from agentlab.events import Event

Work = Literal["training", "evaluation", "overhead"]
KINDS: tuple[Work, ...] = ("training", "evaluation", "overhead")
# A longer silence was a pause (a closed laptop, a killed run), not work.
IDLE_S = 600.0
_WORK: dict[type[Event], Work] = {
    events.TrainingStep: "training",
    events.RemedyApplied: "training",
    events.Trained: "training",
    events.EvaluationProgress: "evaluation",
    events.Evaluated: "evaluation",
}


class Pace:
    """Seconds spent and units done: optimiser steps, answered items, and for everything else generations begun.

    The time since the event before belongs to the work that an event reports, so the numbers include everything
    around a step or an answer, whatever the events themselves say about seconds.
    """

    def __init__(self) -> None:
        self.units: dict[Work, int] = dict.fromkeys(KINDS, 0)
        self._seconds: dict[Work, float] = dict.fromkeys(KINDS, 0.0)
        self._last_s: float | None = None

    def clock(self, event: Event, resumed: bool) -> None:
        """Account for the time before an event; `resumed`: nobody was working in it."""
        gap = 0.0 if self._last_s is None else event.time_s - self._last_s
        if not resumed and 0 < gap <= IDLE_S:
            self._seconds[_WORK.get(type(event), "overhead")] += gap
        self._last_s = max(event.time_s, self._last_s or event.time_s)

    def elapsed_s(self) -> float:
        """Seconds of work so far."""
        return sum(self._seconds.values())

    def cost_s(self, left: dict[Work, float]) -> float | None:
        """Seconds that the remaining units take; None while the pace of a needed kind is unknown."""
        total = 0.0
        for work, units in left.items():
            if units > 0:
                if not self.units[work] or not self._seconds[work]:
                    return None
                total += units * self._seconds[work] / self.units[work]
        return total
