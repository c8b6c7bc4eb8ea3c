"""Memory and heat once a second: bounded history, who holds what, and alerts that say what to do."""

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from agentlab.config import BudgetSettings
from agentlab.hardware import monitor

OTHERS = "other_processes"
UNATTRIBUTED = "unattributed"  # of this process and those that it started, but nobody registered it
AlertKind = Literal["memory", "temperature", "swap"]

_log = logging.getLogger(__name__)
# An alert ends only this far below its limit, so that a value that swings about the limit warns once.
_MEMORY_MARGIN = 0.05
HEAT_MARGIN_C = 5.0
_SWAP_MARGIN = 0.9
SILENCE_S = 60.0  # a card that was too hot counts as such for so long after the driver last told its temperature


@dataclass(frozen=True)
class Holding:
    """What one owner holds, in MiB. idle_mib: reserved on purpose and not in use, as an empty KV cache is."""

    held_mib: float
    idle_mib: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One reading. Memory is that of the GPU in use, else the RAM: where there is none, where torch does not use it, or
    where nobody can read its memory. None: the driver does not report it.

    owners: MiB of each owner, with OTHERS and UNATTRIBUTED; the two are missing where the share of this process and of
    those that it started is unknown.
    """

    time_s: float
    device: Literal["cuda", "cpu"]
    name: str
    total_mib: float
    used_mib: float
    swap_used_mib: float
    utilisation_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    owners: Mapping[str, float] = field(default_factory=dict)
    idle_mib: float = 0.0

    @property
    def pressure(self) -> float:
        """Share of the memory that is in use, 0 to 1, without what is reserved on purpose and idle."""
        return max(0.0, self.used_mib - self.idle_mib) / self.total_mib if self.total_mib else 0.0

    @property
    def efficiency(self) -> float | None:
        """Useful over reserved memory of the registered owners, 0 to 1; None when nobody registered."""
        held = sum(size for owner, size in self.owners.items() if owner not in (OTHERS, UNATTRIBUTED))
        return (held - self.idle_mib) / held if held else None


@dataclass(frozen=True)
class Alert:
    """A limit that is passed; `message` is a sentence with what to do."""

    kind: AlertKind
    value: float
    limit: float
    message: str


class Owners:
    """Who holds what. Thread-safe; owners are, by convention, base, adapters, kv_cache and training."""

    def __init__(self) -> None:
        self._owners: dict[str, Callable[[], Holding]] = {}
        self._lock = threading.Lock()

    def register(self, owner: str, holding: Holding | Callable[[], Holding]) -> None:
        """Say what an owner holds, as a value or a function asked at every sample; again replaces it."""
        if owner in (OTHERS, UNATTRIBUTED):
            raise ValueError(f"owner: {owner!r}; allowed: any name but {OTHERS} and {UNATTRIBUTED}, which are computed")
        with self._lock:
            self._owners[owner] = holding if callable(holding) else lambda: holding

    def unregister(self, owner: str) -> None:
        """The owner has freed its memory; unknown ones are ignored."""
        with self._lock:
            self._owners.pop(owner, None)

    def holdings(self) -> dict[str, Holding]:
        """What each owner holds now; one that cannot say it is left out."""
        with self._lock:
            owners = dict(self._owners)
        found = {}
        for owner, ask in owners.items():
            with contextlib.suppress(Exception):  # an owner that is just being freed has nothing to say
                found[owner] = ask()
        return found


OWNERS = Owners()  # this process's


class Monitor:
    """Samples in a daemon thread: `with Monitor(budget) as watching: …; watching.history()[-1]`.

    The same with and without a GPU. on_alert is called in the sampling thread, once when a limit is passed; the alert
    stays in `alerts()` until the value is well below it again. It is called once more where a driver that fell silent
    ends an alert of heat. owners: a registry of their own, unless it is OWNERS. nvml: the library to ask instead of
    pynvml. clock: seconds, of whatever beginning.
    """

    def __init__(
        self,
        budget: BudgetSettings | None = None,
        *,
        interval_s: float = 1.0,
        keep: int = 3600,
        device_index: int = 0,
        on_alert: Callable[[Alert], None] = lambda alert: None,
        owners: Owners | None = None,
        nvml: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = budget or BudgetSettings()
        self.interval_s = interval_s
        self._device_index = device_index
        self._on_alert = on_alert
        self._nvml = nvml
        self._clock = clock
        self._heat_told_s = 0.0  # by the clock
        self._history: deque[Sample] = deque(maxlen=keep)
        self.owners = owners or Owners()
        self._alerts: dict[AlertKind, Alert] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    # -- sampling -----------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to sample; harmless when it runs."""
        if self._thread is None:
            self._ending.clear()
            self._thread = threading.Thread(target=self._run, name="agentlab-monitor", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread; the history stays. Harmless when it does not run."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        following = time.monotonic()
        while not self._ending.is_set():
            try:
                self.sample()
            except Exception:  # a consumer's mistake must not end the watch
                _log.exception("the memory monitor goes on after an error")
            following = max(following + self.interval_s, time.monotonic())
            self._ending.wait(following - time.monotonic())

    def sample(self) -> Sample:
        """Read now, keep the sample, and judge it."""
        found = read(self.owners.holdings(), self._device_index, self._nvml)
        raised = []
        with self._lock:
            self._history.append(found)
            verdict = judge(found, self.budget, frozenset(self._alerts))
            if found.temperature_c is not None:
                self._heat_told_s = self._clock()
            elif (hot := self._alerts.get("temperature")) is not None:
                if self._clock() - self._heat_told_s < SILENCE_S:
                    verdict["temperature"] = hot
                else:
                    raised.append(_silent(hot))
            for kind, alert in verdict.items():
                if alert is None:
                    self._alerts.pop(kind, None)
                else:
                    if kind not in self._alerts:
                        raised.append(alert)
                    self._alerts[kind] = alert
        for alert in raised:
            self._on_alert(alert)
        return found

    def history(self) -> list[Sample]:
        """The last samples, oldest first."""
        with self._lock:
            return list(self._history)

    def alerts(self) -> list[Alert]:
        """Limits that are passed now."""
        with self._lock:
            return list(self._alerts.values())

    def is_too_hot(self) -> bool:
        """Whether training should pause until the card has cooled down."""
        with self._lock:
            return "temperature" in self._alerts

    def prometheus(self) -> str:
        """The newest sample in Prometheus' text format; see `exposition`."""
        from agentlab.hardware.exposition import exposition

        history = self.history()
        return exposition(history[-1] if history else self.sample(), self.alerts())


def read(holdings: Mapping[str, Holding], device_index: int = 0, nvml: Any = None) -> Sample:
    """One sample of the GPU of that index where torch runs on one, else of the RAM.

    holdings: of the memory that torch runs in; where a GPU cannot be read the RAM is, of which they hold nothing.
    """
    on_a_card = monitor.accelerator() == "cuda"
    cards = monitor.gpus(nvml) if on_a_card else []
    card = cards[device_index] if device_index < len(cards) else None
    stats = monitor.memory_stats()
    owners = {owner: holding.held_mib for owner, holding in holdings.items()}
    idle = sum(holding.idle_mib for holding in holdings.values())
    device: Literal["cuda", "cpu"] = "cuda"
    own: float | None
    if card is None or card.memory_total_mb is None or card.memory_used_mb is None:
        device, name = "cpu", "RAM"
        total, used, own = stats.cpu_total, stats.cpu_used, monitor.family_ram_mb()
        if on_a_card:
            owners, idle = {}, 0.0
    else:
        name = card.name
        total, used, own = card.memory_total_mb, card.memory_used_mb, monitor.process_vram_mb(device_index, nvml)
    if own is not None:
        owners[UNATTRIBUTED] = max(0.0, own - sum(owners.values()))
        owners[OTHERS] = max(0.0, used - own)
    return Sample(
        time_s=time.time(),
        device=device,
        name=name,
        total_mib=total,
        used_mib=used,
        swap_used_mib=stats.swap_used,
        utilisation_percent=None if card is None else card.utilisation_percent,
        temperature_c=None if card is None else card.temperature_c,
        power_w=None if card is None else card.power_w,
        owners=owners,
        idle_mib=idle,
    )


def judge(sample: Sample, budget: BudgetSettings, active: frozenset[AlertKind]) -> dict[AlertKind, Alert | None]:
    """For each kind the alert that holds after this sample, or None. active: those that held before it."""
    kinds: dict[AlertKind, Alert | None] = {"memory": None, "temperature": None, "swap": None}
    limit = budget.memory_alert
    if sample.pressure >= limit - (_MEMORY_MARGIN if "memory" in active else 0.0):
        kinds["memory"] = Alert("memory", sample.pressure, limit, _memory_message(sample, limit))
    heat, hot = sample.temperature_c, budget.temperature_c
    if heat is not None and heat >= hot - (HEAT_MARGIN_C if "temperature" in active else 0.0):
        text = (
            f"{sample.name} is at {heat:.0f} °C, the limit is {hot:.0f} °C: free its air ways or "
            "lower its power limit (nvidia-smi --power-limit)"
        )
        kinds["temperature"] = Alert("temperature", heat, hot, text)
    swap_mib = budget.swap_gib * 1024
    if sample.swap_used_mib > swap_mib * (_SWAP_MARGIN if "swap" in active else 1.0):
        text = (
            f"{sample.swap_used_mib / 1024:.1f} GiB of swap are in use, the limit is {budget.swap_gib:g} GiB: close "
            "other programs, or choose a smaller model or a lower model.rung"
        )
        kinds["swap"] = Alert("swap", sample.swap_used_mib, swap_mib, text)
    return kinds


def _silent(hot: Alert) -> Alert:
    """What to tell where a card that was hot is taken for cool because nobody knows any longer."""
    text = (
        f"the driver has told no temperature for {SILENCE_S:.0f} s, the last was {hot.value:.0f} °C: training goes on; "
        "look at nvidia-smi"
    )
    return dataclasses.replace(hot, message=text)


def _memory_message(sample: Sample, limit: float) -> str:
    what = "GPU memory" if sample.device == "cuda" else "RAM"
    owner, size = max(sample.owners.items(), key=lambda item: item[1], default=("nobody known", 0.0))
    remedy = {
        OTHERS: "close other programs that use it",
        "adapters": "unload adapters that are not in use",
        "kv_cache": "shorten the context or lower evaluation.batch_size",
        "training": "lower training.batch_size or training.max_length",
        "base": "choose a lower model.rung or a smaller model",
    }.get(owner, "lower evaluation.batch_size or training.batch_size, or choose a smaller model")
    return (
        f"{100 * sample.pressure:.0f} % of {sample.total_mib:,.0f} MiB of {what} are in use, the limit is "
        f"{100 * limit:.0f} %; "
        f"most is held by {owner.replace('_', ' ')} ({size:,.0f} MiB): {remedy}"
    )
