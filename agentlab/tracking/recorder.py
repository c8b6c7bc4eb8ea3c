"""The view that MLflow has of a run: rebuilt from the run's folder, and kept up with events in between.

The disk is the truth. An event only says which part of the view to bring up to date; the values come from the records.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentlab import events
from agentlab.evolution.run import Run
from agentlab.records import BASE, SealedResult
from agentlab.tracking import store
from agentlab.tracking.system import SystemMonitor
from agentlab.tracking.timeline import CHANGES, Status, Timeline
from agentlab.tracking.views import SuiteInfo

if TYPE_CHECKING:
    from agentlab.tracking.mirror import Mirror

Reason = Literal["failed", "stopped", "killed"]
Kind = Literal["evolution", "generation", "candidate"]


class Recorder:
    """Writes one run to MLflow. Opens the store, and imports mlflow, at the first event that matters.

    Nothing here raises because of the store or the disk: what went wrong is one sentence in `problems`, events are
    skipped from then on, and the next generation boundary (or `reconcile`) tries again and catches up. The caller
    empties `problems` into the journal; a sentence appears there only once.
    """

    def __init__(self, run: Run, suite: SuiteInfo, system_metrics: bool = True) -> None:
        self.problems: list[str] = []
        self._run = run
        self._suite = suite
        self._system_metrics = system_metrics
        self._mirror: Mirror | None = None
        self._working: int | None = None  # the generation that this process runs
        self._launching = False  # this process is the launcher
        self._last: events.Event | None = None  # change of state
        self._unscored: dict[str, None] = {}  # evaluated, but the record was not written yet
        self._monitor: SystemMonitor | None = None
        self._behind = False
        self._said: set[str] = set()

    # -- what the rest of the program calls ---------------------------------------------------------------------

    def observe(self, event: events.Event) -> None:
        """Keep MLflow up with one event. Progress ticks cost nothing."""
        if isinstance(event, CHANGES):
            self._last = event
        match event:
            case events.EvolutionStarted():
                self._launching = True
                self.reconcile()
            case events.GenerationStarted():
                self._begin(event)
            case events.TrainingStarted() | events.Trained() | events.CandidateFailed():
                self._update(event.candidate)
            case events.Evaluated() if event.split == "fitness" and event.candidate != BASE:
                self._unscored[event.candidate] = None
                self._update(event.candidate)
            case events.GenerationFinished():
                self._end_work()
                self.reconcile()
            case events.GenerationFailed():
                self.interrupted("failed", event.generation, event.error)
            case events.Stopped():
                self.interrupted("stopped", self._working)
            case events.SealedComparison():
                sealed = self._run.sealed()
                if sealed is not None:
                    self.log_sealed(sealed)
            case events.EvolutionFinished():
                self._launching = False
                self.reconcile()
            case _:
                pass

    def reconcile(self) -> None:
        """Bring MLflow to what the run's folder says, from nothing if need be; any number of times doubles nothing."""
        if self._attempt(lambda mirror: mirror.reconcile(self._timeline())):
            self._behind = False
            self._unscored.clear()

    def set_status(self, kind: Kind, status: Status, generation: int | None = None, adapter: str | None = None) -> None:
        """Set the state of one MLflow run, if it exists."""
        key = {"evolution": "evolution", "generation": f"generation-{generation}", "candidate": adapter or ""}[kind]
        self._attempt(lambda mirror: mirror.set_status(key, status))

    def interrupted(self, reason: Reason, generation: int | None, traceback: str = "") -> None:
        """The generation ended before its result: it, its open candidates and the evolution become FAILED or KILLED."""
        self._end_work()
        self._launching = False
        self.reconcile()
        status: Status = "FAILED" if reason == "failed" else "KILLED"
        self._attempt(lambda mirror: mirror.interrupt(generation, status, traceback))

    def log_generation_artifacts(
        self, generation: int, notebook: Path | None, figures: Mapping[str, Any] | list[Path], error_table: Path | None
    ) -> None:
        """Copy a generation's lab record into its run: notebook, figures as self-contained HTML, table of errors.

        `figures` are files, or names with files, HTML texts or plotly figures. `reconcile` finds by itself what lies in
        the generation's folder as notebook.ipynb, *.html, figures/ and errors.*.
        """
        named = figures if isinstance(figures, Mapping) else {path.stem: path for path in figures}
        self._attempt(lambda mirror: mirror.publish(generation, [notebook, error_table], named))

    def log_sealed(self, result: SealedResult) -> None:
        """Put the sealed comparison on the evolution's run."""
        self._attempt(lambda mirror: mirror.seal(self._timeline(), result))

    def close(self) -> None:
        """Stop what runs in the background, and catch up if something was missed."""
        self._end_work()
        self._launching = False
        if self._behind:
            self.reconcile()

    # -- how ----------------------------------------------------------------------------------------------------

    def _begin(self, event: events.GenerationStarted) -> None:
        if event.pid == os.getpid():
            self._working = event.generation
        self.reconcile()
        if self._working is None or not self._system_metrics or self._behind or self._monitor is not None:
            return
        self._attempt(lambda mirror: self._watch(mirror.run_id(f"generation-{event.generation}")))

    def _watch(self, run_id: str | None) -> None:
        if run_id is not None:
            self._monitor = SystemMonitor(run_id, store.uri(self._run.root))

    def _end_work(self) -> None:
        self._working = None
        if self._monitor is not None:
            self._monitor.stop()
            self._monitor = None

    def _update(self, adapter: str) -> None:
        if self._behind:
            return  # a locked store would be waited for at every event; the generation's end catches up
        names = list(dict.fromkeys([*self._unscored, adapter]))
        scored: list[str] = []
        if self._attempt(lambda mirror: scored.extend(mirror.update(self._timeline(), names))):
            for name in scored:
                self._unscored.pop(name, None)

    def _timeline(self) -> Timeline:
        return Timeline.of(self._run, working=self._working is not None, launching=self._launching, also=self._last)

    def _attempt(self, action: Callable[["Mirror"], None]) -> bool:
        """Do it under the store's lock; whether it worked. An error of the store becomes a problem."""
        try:
            with store.lock(self._run.root):
                if self._mirror is None:
                    from agentlab.tracking.mirror import Mirror

                    self._mirror = Mirror(self._run, self._suite)
                else:
                    store.check(self._run.root)
                action(self._mirror)
            return True
        except Exception as error:
            if not store.is_store_error(error):
                raise
            self._behind = True
            self._mirror = None
            sentence = (
                f"MLflow is behind: {store.first_line(error)}. The run goes on; MLflow is brought up to date later."
            )
            if sentence not in self._said:
                self._said.add(sentence)
                self.problems.append(sentence)
            return False
