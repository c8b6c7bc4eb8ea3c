"""What watches memory and heat while a generation runs: warnings as events, and pauses of a hot card."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from agentlab.config import BudgetSettings
from agentlab.events import Event, Waiting, Warned
from agentlab.hardware.watch import HEAT_MARGIN_C, OWNERS, Alert, Monitor


class Guard:
    """`with Guard(budget, emit, should_stop) as guard:` and poll `guard.should_stop` where work can be stopped.

    Alerts become Warned events at the next poll, in the thread that works. While the card is too hot a poll does not
    return, unless somebody asks to stop.
    """

    def __init__(
        self,
        budget: BudgetSettings,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
        *,
        nvml: Any = None,
        interval_s: float = 1.0,
    ) -> None:
        self._emit = emit
        self._asked_to_stop = should_stop
        self._interval_s = interval_s
        self._alerts: deque[Alert] = deque()
        self.monitor = Monitor(budget, owners=OWNERS, on_alert=self._alerts.append, nvml=nvml, interval_s=interval_s)

    def __enter__(self) -> "Guard":
        self.monitor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.monitor.stop()

    def should_stop(self) -> bool:
        """Whether somebody asked to stop; waits while the card is too hot."""
        waits = False
        while True:
            while self._alerts:
                self._emit(Warned(message=self._alerts.popleft().message))
            if self._asked_to_stop() or not self.monitor.is_too_hot():
                return self._asked_to_stop()
            if not waits:
                waits = True
                cool_c = self.monitor.budget.temperature_c - HEAT_MARGIN_C
                self._emit(Waiting(reason=f"the card is too hot; it goes on below {cool_c:.0f} °C"))
            time.sleep(self._interval_s)
