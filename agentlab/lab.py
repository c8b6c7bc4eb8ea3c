"""`Lab`: one experiment, wired together. The notebook, the command line and the panels all stand on it."""

import contextlib
import os
import queue
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentlab import config, files, models
from agentlab.bookkeeping import Books
from agentlab.errors import EvolutionStopped, LeaseHeldError, RunError
from agentlab.events import (
    Event,
    EvolutionFinished,
    EvolutionStarted,
    Stopped,
    Warned,
)
from agentlab.evolution.run import Run, newest_config
from agentlab.hardware.lease import Lease, describe, holder
from agentlab.hardware.shape import ShapeError
from agentlab.launcher import die_with_launcher, run_notebook
from agentlab.records import BaselineResult
from agentlab.tasks import Suite, load
from agentlab.working import Work

if TYPE_CHECKING:
    import pandas as pd

    from agentlab.agent import Agent, Options, Step, Tool
    from agentlab.hardware.plan import Plan
    from agentlab.hardware.sizing import Device
    from agentlab.memory import Memory


class Lab:
    """One experiment's run: where it is on disk, and what can be done with it.

    >>> lab = Lab.open("experiments/demo.yaml")
    >>> for event in lab.evolve(): print(event)
    """

    def __init__(self, run: Run, suite: Suite, experiment: Path, overrides: Sequence[str] = ()) -> None:
        self.run = run
        self.suite = suite
        self.experiment = experiment
        self.overrides = list(overrides)
        self._leases: list[Lease] = []
        self._agents: list[Agent] = []
        self._work: Work | None = None  # what runs in this process
        self._memory: Memory | None = None
        self._books = Books(run, suite)

    @classmethod
    def open(cls, experiment: str | Path, overrides: Iterable[str] = ()) -> "Lab":
        """Read and check an experiment's YAML and its suite; nothing is loaded and nothing but config.yaml written.

        overrides: like "training.steps=12". Raises ConfigError or SuiteError with one sentence.
        """
        path, overrides = Path(experiment), list(overrides)
        settings = config.load(path, overrides)
        root = config.project_root(path)
        suite = load(settings.suite, root)
        run = Run(root, settings, settings.run_hash(suite.digest), str(suite.folder or ""))
        return cls(run, suite, path.resolve(), overrides)

    @classmethod
    def open_existing(cls, experiment: str | Path, overrides: Iterable[str] = ()) -> "Lab":
        """The run that `open` names or, if that one was never started, the newest run of the experiment.

        Raises RunError when the experiment has no run yet.
        """
        lab = cls.open(experiment, overrides)
        if lab.run.folder.exists():
            return lab
        runs = sorted(lab.run.folder.parent.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
        if not runs or lab.overrides:
            raise RunError(f"no run of {experiment} with these settings yet; start one: {lab.command('evolve')}")
        return cls._of(runs[-1], lab.run.root, lab.experiment)

    @classmethod
    def open_running(cls, experiment: str | Path, overrides: Iterable[str] = ()) -> "Lab":
        """What `open_existing` finds or, where nobody works on that and no settings were named, another run of the
        experiment that somebody works on: one that was started with other settings.
        """
        lab = cls.open_existing(experiment, overrides)
        if lab.is_running() or lab.overrides:
            return lab
        paths = sorted(lab.run.folder.parent.glob("*/config.yaml"))
        others = (cls._of(path, lab.run.root, lab.experiment) for path in paths if path.parent != lab.run.folder)
        return next((other for other in others if other.is_running()), lab)

    @classmethod
    def _of(cls, path: Path, root: Path, experiment: Path | None = None) -> "Lab":
        """The run whose config.yaml is `path`."""
        settings = config.load(path)
        suite = load(settings.suite, root)
        run = Run(root, settings, path.parent.name, str(suite.folder or ""))
        return cls(run, suite, experiment or root / "experiments" / f"{settings.name}.yaml")

    def command(self, *words: str) -> str:
        """The command line that means this run: `agentlab` with these words, the experiment, and every `--set`."""
        shown = os.path.relpath(self.experiment)
        name, *rest = words
        sets = [part for override in self.overrides for part in ("--set", override)]
        return shlex.join(["agentlab", *name.split(), shown, *sets, *rest])

    @classmethod
    def newest(cls, root: Path | None = None) -> "Lab":
        """The run below `root` (default: the working directory) that last crowned a champion, else its newest run.

        Without any run the first experiment there is, and outside a project the defaults: there the base model answers.
        """
        root = (root or Path.cwd()).resolve()
        if (path := newest_config(root)) is not None:
            return cls._of(path, root)
        experiments = sorted((root / "experiments").glob("*.yaml"))
        if experiments:
            return cls.open(experiments[0])
        settings = config.Settings(name="default")
        suite = load(settings.suite, root)
        return cls(Run(config.home(), settings, settings.run_hash(suite.digest)), suite, root / "default.yaml")

    # -- the agent and its memory ---------------------------------------------------------------------------------

    @property
    def memory(self) -> "Memory":
        """The memory that this experiment's agent uses: `memory.path` below the project, else the person's own."""
        if self._memory is None:
            from agentlab.memory import Memory

            path = self.run.settings.memory.path
            self._memory = Memory.open(None if path is None else self.run.root / Path(path).expanduser())
        return self._memory

    def agent(
        self, adapter: str = "champion", *, tools: "Iterable[Tool | Callable[..., Any]]" = (), remember: bool = True,
        builtin_tools: bool = True, python: bool = False, lease: bool = True, load: bool = True,
        options: "Options | None" = None,
    ) -> "Agent":  # fmt: skip
        """The agent of this run, its models loaded; close it, or use `with`, to free them and the accelerator.

        adapter: "champion" (the base model as long as there is none), "base", or an id of the pool. tools: plain typed
        functions beside the built-in ones. remember: use `lab.memory`. python: also let it run code in a sandbox.
        Raises AdapterError, ModelError, or LeaseHeldError naming who has the accelerator.
        """
        from agentlab.answering import open_agent

        agent = open_agent(
            self.run, adapter, self.memory if remember else None, tools, lease, load, options, self.suite.metric,
            builtin_tools=builtin_tools, python=python,
        )  # fmt: skip
        self._agents.append(agent)
        return agent

    def close(self) -> None:
        """Give up what this process holds and close the memory; harmless when repeated."""
        self.release()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def trace(self, steps: "Sequence[Step]") -> str:
        """Keep one answer, given as all its steps, as an MLflow trace in this project; the trace's id."""
        from agentlab.tracking.traces import write_trace

        return write_trace(self.run.root, self.run.settings.name, steps)

    # -- what fits --------------------------------------------------------------------------------------------------

    def plan(self, device: "Device | Literal['auto']" = "cuda") -> "Plan":
        """What each model of this experiment needs, and what fits: on a GPU of `budget.vram_gib`, or on this CPU.

        The GPU is at most as large as the one in use here. Loads nothing. Raises ModelError for a model of which no
        config is known.
        """
        from agentlab.planning import plan_run

        return plan_run(self.run, self.suite, device)

    # -- one generation, in this process ------------------------------------------------------------------------

    def generation(self, generation: int) -> Iterator[Event]:
        """Run one generation here and yield its events as they happen; each is in the journal before it is yielded.

        A KeyboardInterrupt (the notebook's stop button) stops it cleanly. When it was stopped, the last event is
        `Stopped`; when it failed, `GenerationFailed` comes last and then the error is raised.
        """
        from agentlab.evolution.generation import run_generation

        die_with_launcher()
        plan = self._check_generation(generation)
        self._acquire(f"generation {generation} of {self.run.id}")
        recorder = self._books.recorder()
        work = self._work = Work(self.run.journal.append, self.run.stop_file)
        ended = False
        try:
            self._books.open()
            if isinstance(plan, Warned):
                yield self._books.append(plan)
            else:
                self.run.save_plan(plan.as_dict())
            if "AGENTLAB_LAUNCHER_PID" not in os.environ:  # under a launcher the request may be meant for this kernel
                self.run.stop_file.unlink(missing_ok=True)
            work.start(lambda emit, should_stop: run_generation(self.run, self.suite, generation, emit, should_stop))
            while not ended:
                try:
                    item = work.items.get(timeout=0.5)
                    ended = not isinstance(item, Event)
                    following = self._books.take(item, recorder, generation)
                except queue.Empty:
                    continue
                except KeyboardInterrupt:
                    work.interrupt()
                    if not ended:
                        continue
                    following = []  # it was ending anyway: with what, is in the journal
                yield from following
                if isinstance(item, BaseException) and not isinstance(item, EvolutionStopped):
                    raise item
        finally:  # also when the consumer walks away: the work ends and its end is written down
            work.end()
            while not ended and not work.items.empty():
                item = work.items.get()
                ended = not isinstance(item, Event)
                self._books.take(item, recorder, generation)
            recorder.close()
            self._give_up()

    def _check_generation(self, generation: int) -> "Plan | Warned":
        """Refuse what cannot be done before it leaves a trace in the run; its memory's plan, or why there is none."""
        from agentlab.evolution.engines import check_learns
        from agentlab.evolution.generation import check_order
        from agentlab.planning import refuse_what_does_not_fit

        check_learns(self.run.settings)
        check_order(self.run, generation)
        try:
            return refuse_what_does_not_fit(self.run, self.suite)
        except ShapeError as error:
            return Warned(message=f"memory is not planned: {error}")

    # -- leases -------------------------------------------------------------------------------------------------

    def _acquire(self, purpose: str) -> None:
        """The run's folder and the accelerator, or a LeaseHeldError that names who has them."""
        if self._leases:
            raise LeaseHeldError(f"this process is already running a generation of {self.run.id}")
        for path in (self.run.worker_lock, config.home() / "accelerator.lock"):
            try:
                self._leases.append(Lease(path, purpose).acquire(wait_s=3.0))
            except BaseException:
                self._give_up()
                raise

    def _wait_for_accelerator(self) -> None:
        """Refuse before a kernel is started when another run has the accelerator; an ending one is waited for."""
        path = config.home() / "accelerator.lock"
        for _ in range(6):
            if holder(path) is None:
                return
            time.sleep(0.5)
        raise LeaseHeldError(f"{self.run.id} must wait for the accelerator: {describe(path)}")

    def release(self) -> None:
        """Free the accelerator: close this lab's agents, end what it runs in this process, give up the leases.

        A generation that runs here stops after its current step and can be continued; kernels of `evolve` are other
        processes, which `stop` ends. Harmless when nothing is held.
        """
        while self._agents:
            self._agents.pop().close()
        if self._work is not None:
            self._work.end()
        self._give_up()

    def _give_up(self) -> None:
        self._work = None
        while self._leases:
            self._leases.pop().release()

    # -- the whole run, one kernel per generation -----------------------------------------------------------------

    def evolve(self, generations: int | None = None) -> Iterator[Event]:
        """Run what is unfinished, one kernel per generation (papermill), and yield the journal's events.

        generations: so many at most in this call; None: all that are planned. Raises LeaseHeldError when another
        process is running this run, RunError when a generation fails.
        """
        from agentlab.evolution.engines import check_learns
        from agentlab.planning import refuse_what_does_not_fit

        check_learns(self.run.settings)
        models.check(self.run.settings.model.primary, self.run.root)
        with contextlib.suppress(ShapeError):  # each generation says it
            refuse_what_does_not_fit(self.run, self.suite)
        launcher = Lease(self.run.launcher_lock, f"evolving {self.run.id}").acquire(wait_s=1.0)
        try:
            if holder(self.run.worker_lock):
                time.sleep(2.0)  # a kernel whose launcher was killed is going down with it
            if holder(self.run.worker_lock):
                raise LeaseHeldError(f"evolving {self.run.id} must wait: {describe(self.run.worker_lock)}")
            self._books.open()
            self._books.complete()
            self.run.stop_file.unlink(missing_ok=True)
            planned = self.run.settings.population.generations
            todo = [k for k in range(planned) if not self._is_finished(k)]
            if generations is not None:
                todo = todo[:generations]
            started = time.monotonic()
            yield self._books.append(
                EvolutionStarted(
                    run=self.run.id,
                    name=self.run.settings.name,
                    generations=planned,
                    population=self.run.settings.population.size,
                    continued=self.run.population(0) is not None,
                )
            )
            for k in todo:
                self._wait_for_accelerator()
                last: Event | None = None
                for last in run_notebook(self, k):
                    yield last
                if isinstance(last, Stopped):
                    return
            if self.is_finished():
                yield self._books.append(
                    EvolutionFinished(champion=self.run.champion(), seconds=time.monotonic() - started)
                )
        finally:
            self.run.stop_file.unlink(missing_ok=True)
            launcher.release()
            self.reconcile()

    def reconcile(self) -> None:
        """Bring MLflow to what the run's folder says: states, metrics, artifacts; repeating it doubles nothing."""
        recorder = self._books.recorder()
        recorder.reconcile()
        recorder.close()

    def was_killed(self, generation: int) -> None:
        """Say to MLflow that the process of this generation is gone without a word."""
        recorder = self._books.recorder()
        recorder.interrupted("killed", generation)
        recorder.close()

    def _is_finished(self, generation: int) -> bool:
        result = self.run.result(generation)
        if result is None:
            return False
        if generation < self.run.settings.population.generations - 1 or result.champion == "base":
            return True
        sealed = self.run.sealed()
        return sealed is not None and sealed.champion == result.champion

    def is_finished(self) -> bool:
        """Whether every planned generation is done and the sealed comparison made."""
        return all(self._is_finished(k) for k in range(self.run.settings.population.generations))

    def baseline(self, emit: Callable[[Event], None] = lambda event: None) -> "BaselineResult":
        """One plain SFT of equal cost against the champion, on the sealed items; minutes the first time, then kept."""
        from agentlab.evolution.baseline import equal_cost_sft
        from agentlab.evolution.bench import open_bench

        if self.run.baseline() is None:
            self._check_baseline()
        self._acquire(f"the baseline of {self.run.id}")
        self.run.stop_file.unlink(missing_ok=True)
        work = self._work = Work(stop_file=self.run.stop_file)
        try:
            with open_bench(self.run, self.suite, emit, work.should_stop) as bench:
                return equal_cost_sft(bench)
        finally:
            self.run.stop_file.unlink(missing_ok=True)
            work.done()
            self._give_up()

    def _check_baseline(self) -> None:
        """Raise RunError, before anything is loaded, where there is nothing to compare with."""
        if self._books.suite_changed():
            raise RunError(f"{self.run.id}: its suite has changed since, so nothing compares with its answers")
        if self.run.sealed() is None:
            missing = "has no champion" if self.is_finished() else "is not finished"
            raise RunError(f"{self.run.id} {missing}, so there is no sealed comparison to compare with")

    # -- watching and stopping ------------------------------------------------------------------------------------

    def is_running(self) -> bool:
        """Whether some process is working on this run now."""
        return holder(self.run.launcher_lock) is not None or holder(self.run.worker_lock) is not None

    def follow(self, from_start: bool = True) -> Iterator[Event]:
        """Events of a run that somebody else started, until it ends; with `from_start`, what has happened first."""
        offset = 0 if from_start else self.run.journal.size()
        yield from self.run.journal.follow(offset, alive=self.is_running)

    def stop(self) -> bool:
        """Ask the process that works on this run to stop after its current step; False when there is none."""
        if not self.is_running():
            return False
        files.write_text(self.run.stop_file, f"asked by process {os.getpid()}\n")
        return True

    # -- results ----------------------------------------------------------------------------------------------------

    def results(self) -> "pd.DataFrame":
        """One row per candidate with everything that is known about it."""
        from agentlab.report import candidates_table

        return candidates_table(self.run)

    def report(self, out: Path | None = None) -> Path:
        """Write the self-contained HTML report; by default report.html in the run's folder."""
        from agentlab.report import write_report

        prompts, expected = self._books.shown_texts()
        return write_report(self.run, out or self.run.folder / "report.html", prompts, expected)

    def summary(self, report: Path | None = None) -> str:
        """What is worth knowing at the end, as text: results, family tree, speed, memory, where everything lies."""
        from agentlab import report as reports
        from agentlab.tracking.store import database

        purposes = {
            self.command("ui"): "compare runs in MLflow, in the browser",
            self.command("report", "--open"): "the report in the browser",
            self.command("adapters list"): "the pool",
        }
        width = max(map(len, purposes))
        commands = [f"{command:<{width}}   {purpose}" for command, purpose in purposes.items()]
        store = str(database(self.run.root))
        return reports.summary(self.run, report=report, store=store, commands=commands)

    def status(self) -> dict[str, Any]:
        """What is done, what is running and who holds it."""
        planned = self.run.settings.population.generations
        candidates = self.run.candidates()
        states: dict[str, int] = {}
        for candidate in candidates:
            states[candidate.state] = states.get(candidate.state, 0) + 1
        return {
            "run": self.run.id,
            "folder": str(self.run.folder),
            "running": self.is_running(),
            "holder": holder(self.run.launcher_lock) or holder(self.run.worker_lock),
            "accelerator": holder(config.home() / "accelerator.lock"),
            "finished_generations": sum(self._is_finished(k) for k in range(planned)),
            "planned_generations": planned,
            "candidates": states,
            "champion": self.run.champion(),
            "finished": self.is_finished(),
        }
