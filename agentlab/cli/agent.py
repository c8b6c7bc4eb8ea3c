"""`agentlab ask` and `agentlab chat`: one answer, or a talk, with the champion of an experiment."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agentlab.cli.options import SECONDS, existing, overrides

if TYPE_CHECKING:
    from agentlab.agent import Agent, ReasoningResult, Step
    from agentlab.agent.formats import Message
    from agentlab.lab import Lab


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `ask` and `chat` have in common."""
    for option in reversed(
        (
            click.option(
                "--experiment", type=click.Path(path_type=Path),
                help="Whose champion answers. Default: the newest champion in this project.",
            ),
            overrides,
            click.option(
                "--adapter", default="champion", show_default=True, help="champion, base, or an id of the pool."
            ),
            click.option("--deadline", type=SECONDS, help="Seconds for one answer."),
            click.option("--thinking", is_flag=True, help="Let it reason in words first."),
            click.option("--python", is_flag=True, help="Let it run Python in a sandbox."),
            click.option("--no-memory", is_flag=True, help="Neither recall nor remember."),
            click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True),
            click.option(
                "--format", "call_format", type=click.Choice(["auto", "native", "tags", "react"]), default="auto",
                show_default=True, help="How tools are shown and calls are written.",
            ),
            click.option("--trace", is_flag=True, help="Keep a trace of every answer in MLflow."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@contextlib.contextmanager
def _opened(
    experiment: Path | None, overrides: tuple[str, ...], adapter: str, thinking: bool, python: bool, no_memory: bool,
    max_tokens: int, call_format: str,
) -> "Iterator[tuple[Lab, Agent]]":  # fmt: skip
    from agentlab.agent import Options

    lab = _chosen(experiment, overrides)
    started = time.monotonic()
    options = Options(thinking=thinking, max_new_tokens=max_tokens, format=call_format)
    try:
        with lab.agent(adapter, remember=not no_memory, python=python, options=options, load=False) as agent:
            if sys.stderr.isatty():  # it takes seconds, and with vLLM on a GPU half a minute
                click.echo(f"loading {agent.chain.link.model} ...", err=True)
            info = agent.load()
            click.echo(f"{info} on {info.device}, loaded in {time.monotonic() - started:.1f} s", err=True)
            yield lab, agent
    finally:
        lab.close()


def _chosen(experiment: Path | None, overrides: tuple[str, ...]) -> "Lab":
    from agentlab.errors import RunError
    from agentlab.lab import Lab

    if experiment is None:
        if overrides:
            raise click.UsageError("--set needs --experiment: it changes that experiment's settings")
        return Lab.newest()
    try:
        return existing(experiment, overrides)
    except RunError:  # no run yet: the experiment's base model answers
        return Lab.open(experiment, overrides)


@click.command()
@click.argument("task")
@_shared
@click.option("--session", help="Continue this talk, and remember the turn in it.")
@click.option("--steps", is_flag=True, help="Show thoughts, calls and what was recalled.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as one JSON object.")
def ask(
    task: str, experiment: Path | None, overrides: tuple[str, ...], adapter: str, deadline: float | None,
    thinking: bool, python: bool, no_memory: bool, max_tokens: int, call_format: str, trace: bool,
    session: str | None, steps: bool, as_json: bool,
) -> None:  # fmt: skip
    """Answer TASK with the champion of an experiment, its tools and the memory.

    Nothing is remembered of it without --session, except what the agent itself notes with its tool.
    """
    from agentlab.agent.agent import check_asked
    from agentlab.memory.records import check_text

    # what cannot be answered is refused before the model is loaded
    if session is not None and no_memory:
        raise click.UsageError("--session keeps the talk in a memory, --no-memory keeps nothing; allowed: one of them")
    check_asked(task, deadline)
    if session is not None:
        check_text("--session", session)
    chosen = (experiment, overrides, adapter, thinking, python, no_memory, max_tokens, call_format)
    with _opened(*chosen) as (lab, agent):
        show = _Printer(steps=steps, silent=as_json)
        result = _answer(lab, agent, task, deadline, session, show, trace)
    if as_json:
        click.echo(result.to_json())
    elif ending := _ending(result):
        click.echo(f"({ending})", err=True)
    if result.state == "failed":
        sys.exit(11)
    if result.state == "cancelled":
        sys.exit(8)


def _answer(
    lab: "Lab", agent: "Agent", task: str, deadline: float | None, session: str | None, show: "_Printer", trace: bool,
    history: "Sequence[Message]" = (),
) -> "ReasoningResult":  # fmt: skip
    """One answer, shown as it comes; Ctrl-C cancels it."""
    before = signal.signal(signal.SIGINT, lambda *_: agent.cancel())
    seen: list[Step] = []

    def on_step(step: "Step") -> None:
        seen.append(step)
        show.step(step)

    try:
        result = agent.ask(task, deadline_s=deadline, session_id=session, history=history, on_step=on_step)
    finally:
        signal.signal(signal.SIGINT, before)
    show.end(result)
    if trace:
        try:
            click.echo(f"trace {lab.trace(seen)}", err=True)
        except Exception as error:  # whatever is wrong with the store, the answer is there
            click.echo(f"no trace was written: {_short(str(error) or type(error).__name__)}", err=True)
    return result


def _ending(result: "ReasoningResult") -> str:
    if result.state == "answered":
        return "cut at --max-tokens" if result.cut_short else ""
    if result.state == "deadline":
        return f"deadline: the best there was after {result.processing_time:.1f} s"
    return result.state + (f": {result.error}" if result.error else "")


class _Printer:
    """Shows steps on the terminal: the answer on stdout as it is written, everything else dimmed on stderr."""

    def __init__(self, *, steps: bool, silent: bool = False) -> None:
        self.steps = steps
        self.silent = silent
        self._written = ""
        self._thinking = False

    def step(self, step: "Step") -> None:
        if self.silent:
            return
        from agentlab.agent import steps as kinds

        if isinstance(step, kinds.Delta) and step.part == "answer":
            self._written += step.text
            click.echo(step.text, nl=False)
        elif isinstance(step, kinds.Delta) and step.part == "thought" and self.steps:
            self._thinking = True
            click.secho(step.text, nl=False, err=True, dim=True)
        elif isinstance(step, kinds.Retracted):
            self._note("(that was a thought)")
        elif isinstance(step, kinds.Generated) and self._thinking:
            self._thinking = False
            click.echo(err=True)
        elif isinstance(step, kinds.Recalled) and self.steps:
            self._note("recalled: " + "; ".join(step.text.splitlines()[1:]))
        elif isinstance(step, kinds.ToolCalled):
            values = ", ".join(f"{name}={value!r}" for name, value in step.arguments.items())
            self._note(f"→ {step.name}({values})" + (" (repaired)" if step.original else ""))
        elif isinstance(step, kinds.Observed):
            self._note(f"← {_short(step.text)}" + ("" if step.ok else f" ({step.problem})"))
        elif isinstance(step, kinds.Rejected) and step.remedy != "repair":
            self._line()
            self._note(f"not usable: {_short(step.problems[0])}; {step.remedy}")
        elif isinstance(step, kinds.FellBack):
            self._note(f"{step.from_model} → {step.to_model}: {step.reason}")
        elif isinstance(step, kinds.Recovered):
            what = f"{step.action.replace('_', ' ')} {step.source} → {step.target}"
            self._note(f"{step.model}: {'undone: ' if step.undone else ''}{what}: {step.reason}")

    def end(self, result: "ReasoningResult") -> None:
        """Close the line; an answer that was not written piece by piece is shown whole."""
        if self.silent:
            return
        if result.final_answer and result.final_answer not in self._written:
            click.echo(("\n" if self._written else "") + result.final_answer)
        elif self._written:
            click.echo()
        self._written = ""
        for warning in result.warnings:
            self._note(warning)
        if self.steps:
            sure = "unknown" if result.confidence_score is None else f"{result.confidence_score:.0%}"
            self._note(
                f"{result.processing_time:.2f} s, confidence {sure}, "
                f"{result.prompt_tokens} + {result.completion_tokens} tokens, {len(result.context_used)} memories"
            )

    def _line(self) -> None:
        """What was written so far was not the answer: the answer begins on a line of its own."""
        if self._written and not self._written.endswith("\n"):
            click.echo()
        self._written = ""

    def _note(self, text: str) -> None:
        self._line()
        click.secho(text, err=True, dim=True)


def _short(text: str, limit: int = 300) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[:limit] + " …"


@click.command()
@_shared
@click.option("--session", default="chat", show_default=True, help="The talk to continue; it is remembered.")
def chat(
    experiment: Path | None, overrides: tuple[str, ...], adapter: str, deadline: float | None, thinking: bool,
    python: bool, no_memory: bool, max_tokens: int, call_format: str, trace: bool, session: str,
) -> None:  # fmt: skip
    """Talk with the champion of an experiment; /help lists what can be typed."""
    from agentlab.cli.talk import Talk
    from agentlab.memory.records import check_text

    check_text("--session", session)
    chosen: tuple[Any, ...] = (experiment, overrides, adapter, thinking, python, no_memory, max_tokens, call_format)
    with _opened(*chosen) as (lab, agent):
        Talk(lab, agent, None if no_memory else session, deadline, trace).run()
