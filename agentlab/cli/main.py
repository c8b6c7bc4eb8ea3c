"""All commands, one thin function each; errors become one sentence and an exit code."""

import json
import os
import signal
import subprocess
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentlab import __version__
from agentlab.cli.options import existing, experiment, overrides, running
from agentlab.errors import AgentlabError, EvolutionStopped

if TYPE_CHECKING:
    from agentlab.lab import Lab


class _Commands(click.Group):
    """A group whose commands report what a person can put right as one sentence, without a traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except AgentlabError as error:
            click.echo(f"agentlab: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:  # where no command has more to say
            click.echo("\nstopped on request", err=True)
            sys.exit(EvolutionStopped.exit_code)
        except BrokenPipeError:  # `agentlab … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Breed small language models into better agents on one machine.

    Start with: agentlab evolve experiments/demo.yaml
    """


# -- running ------------------------------------------------------------------------------------------------------


def _evolve(experiment: Path, overrides: tuple[str, ...], generations: int | None) -> None:
    """Run the generations of an experiment that are not finished yet.

    Interrupt with Ctrl-C or `agentlab stop`: what is finished is kept, and the same command continues.
    """
    from agentlab.cli.display import Display
    from agentlab.events import Stopped
    from agentlab.lab import Lab
    from agentlab.report.progress import Progress

    lab = Lab.open(experiment, overrides)
    if lab.is_finished():
        click.echo(f"{lab.run.id} is finished already; another seed or name starts a new run.")
    for warning in lab.suite.warnings:
        click.echo(f"note on suite {lab.suite.name}: {warning}", err=True)
    _stop_on_signals(lab)
    stopped = False
    with Display(Progress.of(lab.run.settings), history=lab.run.journal.replay()) as display:
        for event in lab.evolve(generations):
            display.show(event)
            stopped = isinstance(event, Stopped)
    if stopped:
        click.echo(f"stopped; continue with: {lab.command('evolve')}")
        sys.exit(8)
    if lab.is_finished():
        report = lab.report()
        click.echo(lab.summary(report))


@main.command(help=_evolve.__doc__)
@experiment
@overrides
@click.option("--generations", type=click.IntRange(min=1), help="Run at most so many in this call. Default: all.")
def evolve(experiment: Path, overrides: tuple[str, ...], generations: int | None) -> None:
    _evolve(experiment, overrides, generations)


@main.command(help="Continue an interrupted run; the same as evolve.")
@experiment
@overrides
@click.option("--generations", type=click.IntRange(min=1), help="Run at most so many in this call. Default: all.")
def resume(experiment: Path, overrides: tuple[str, ...], generations: int | None) -> None:
    _evolve(experiment, overrides, generations)


def _stop_on_signals(lab: "Lab") -> None:
    """Ctrl-C and SIGTERM ask the run to stop after its current step; a second one ends this process at once."""

    def ask(number: int, _: object) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.default_int_handler)
        if lab.stop():
            click.echo("stopping after the current step; once more ends it at once", err=True)
        else:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)


@main.command()
@experiment
@overrides
def stop(experiment: Path, overrides: tuple[str, ...]) -> None:
    """Ask a running experiment to stop after its current step, from any terminal.

    Without --set, one that was started with other settings is found, too.
    """
    lab = running(experiment, overrides)
    if lab.stop():
        click.echo(f"asked {lab.run.id} to stop; it ends after its current training step or evaluation batch")
    else:
        click.echo(f"{lab.run.id} is not running")


@main.command()
@experiment
@overrides
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(experiment: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """What is done, what is running, and who holds it."""
    found = existing(experiment, overrides).status()
    if as_json:
        click.echo(json.dumps(found))
        return
    holder = found["holder"]
    running = f"running in process {holder['pid']} ({holder['purpose']})" if holder else "not running"
    states = ", ".join(f"{count} {state}" for state, count in found["candidates"].items()) or "none yet"
    click.echo(
        f"{found['run']}: {found['finished_generations']} of {found['planned_generations']} generations finished"
    )
    if found["accelerator"] and not holder:
        running += (
            f"; the accelerator is with process {found['accelerator']['pid']} ({found['accelerator']['purpose']})"
        )
    click.echo(f"  {running}\n  candidates: {states}\n  champion: {found['champion']}\n  folder: {found['folder']}")


@main.command()
@experiment
@overrides
def follow(experiment: Path, overrides: tuple[str, ...]) -> None:
    """Watch a run that was started elsewhere; Ctrl-C ends the watching alone."""
    from agentlab.cli.display import Display
    from agentlab.report.progress import Progress

    lab = running(experiment, overrides)
    if not lab.is_running():
        click.echo(f"{lab.run.id} is not running; what has happened so far:")
    try:
        with Display(Progress.of(lab.run.settings)) as display:
            for event in lab.follow():
                display.show(event)
    except KeyboardInterrupt:
        click.echo(f"\nno longer watching; {lab.run.id} goes on")


# -- looking ------------------------------------------------------------------------------------------------------


@main.command()
@experiment
@overrides
@click.option("--out", type=click.Path(path_type=Path), help="File to write. Default: report.html in the run's folder.")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
@click.option("--text", is_flag=True, help="Print the summary as text instead.")
def report(experiment: Path, overrides: tuple[str, ...], out: Path | None, show: bool, text: bool) -> None:
    """Write one self-contained HTML report of a run."""
    lab = existing(experiment, overrides)
    if text:
        click.echo(lab.summary())
        return
    path = lab.report(out)
    click.echo(str(path))
    if show:
        webbrowser.open(path.resolve().as_uri())


@main.command()
@experiment
@overrides
def baseline(experiment: Path, overrides: tuple[str, ...]) -> None:
    """Train one plain SFT with as many steps as the whole population had, and compare it with the champion.

    Takes as long as training the population did; its answers to the sealed items are kept.
    """
    from agentlab.events import TrainingStep
    from agentlab.report.describe import describe

    def show(event: object) -> None:
        if isinstance(event, TrainingStep):
            if event.step % 10 == 0 or event.step == event.steps:
                click.echo(f"step {event.step} of {event.steps}, loss {event.loss:.3f}")
        elif text := describe(event):  # type: ignore[arg-type]
            click.echo(text)

    result = existing(experiment, overrides).baseline(show)
    score = result.score
    click.echo(
        f"one SFT of {result.steps} steps ({result.train_tokens:,} tokens; the population trained "
        f"{result.population_train_tokens:,}): {score.accuracy:.1%} "
        f"({score.accuracy_ci_low:.1%}–{score.accuracy_ci_high:.1%}) of {len(score.item_scores)} sealed items"
    )
    click.echo(
        f"champion {result.champion}: {result.champion_accuracy:.1%}, {100 * result.gain:+.1f} points "
        f"({100 * result.gain_ci_low:+.1f} to {100 * result.gain_ci_high:+.1f})"
    )


@main.command()
@experiment
@overrides
@click.option("--port", type=click.IntRange(1, 65_535), default=5000, show_default=True, help="Port on this machine.")
def ui(experiment: Path, overrides: tuple[str, ...], port: int) -> None:
    """Open MLflow's web interface on the experiment's store (this machine only)."""
    from agentlab.config import project_root
    from agentlab.tracking.store import check, database, ui_command

    root = project_root(experiment)
    lab = existing(experiment, overrides)
    if database(root).exists():
        check(root)  # else it is built again from the runs' folders
    if not lab.is_running():
        lab.reconcile()  # what a kill left as running
    click.echo(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends it)")
    sys.exit(subprocess.run(ui_command(root, port)).returncode)


def _add_groups(add: Callable[..., None]) -> None:
    from agentlab.cli import adapters, agent, doctor, memory, models, planning, serve, suites

    for command in (
        agent.ask,
        agent.chat,
        adapters.adapters,
        doctor.doctor,
        memory.memory,
        models.models,
        planning.plan,
        serve.serve,
        suites.suite,
    ):
        add(command)


_add_groups(main.add_command)
