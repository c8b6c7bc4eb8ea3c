"""The talk of `agentlab chat`: reads lines, answers them or does what a /command says."""

import dataclasses
import io
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from agentlab.cli.agent import _answer, _ending, _Printer
from agentlab.cli.lines import Lines, history_path, say_what_stays
from agentlab.errors import AgentError, AgentlabError, StorageError

if TYPE_CHECKING:
    from agentlab.agent import Agent
    from agentlab.agent.formats import Message
    from agentlab.lab import Lab
    from agentlab.memory import Memory

HELP = """\
/adapter [ID]     who answers: champion, base, or an id of the pool; alone: who there is
/memory [WORDS]   what the memory holds on that; alone: how much there is
/remember TEXT    remember a fact
/forget ID        forget a memory, in every byte, and the lines typed so far
/undo             take back the last turn and what was remembered of it
/history          the turns of this talk
/session [NAME]   another talk; alone: which there are
/think on|off     reasoning in words before the answer
/steps on|off     show thoughts, recalled memories, time and confidence
/deadline [S]     seconds for an answer; alone: none
/help   /quit     Ctrl-C ends an answer, Ctrl-D the talk"""


class Talk:
    """One terminal, one agent. Commands that fail say why and the talk goes on."""

    def __init__(self, lab: "Lab", agent: "Agent", session: str | None, deadline_s: float | None, trace: bool) -> None:
        self.lab = lab
        self.agent = agent
        self.session = session
        self.deadline_s = deadline_s
        self.trace = trace
        self.said: list[tuple[str, str]] = []  # the turns of a talk that is kept nowhere else
        self.printer = _Printer(steps=False)
        self.lines = Lines(history_path() if agent.memory is not None else None)
        self._commands: dict[str, Callable[[str], None]] = {
            "adapter": self._adapter,
            "memory": self._memory,
            "remember": self._remember,
            "forget": self._forget,
            "undo": self._undo,
            "history": self._history,
            "session": self._session,
            "think": self._think,
            "steps": self._steps,
            "deadline": self._deadline,
            "help": lambda _: click.echo(HELP),
        }

    def run(self) -> None:
        """Until /quit or the end of the input."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a line that is no UTF-8 is no reason to end
        with self.lines:
            self._run()

    def _run(self) -> None:
        if self.session is not None:
            known = len(self.agent.memory.conversation(self.session).turns()) if self.agent.memory else 0
            click.secho(f"talk {self.session!r}, {known} turns so far; /help lists the commands", err=True, dim=True)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:
                click.echo("\n(/quit or Ctrl-D ends the talk)", err=True)
                continue
            if line in ("/quit", "/exit", "/q"):
                return
            if not line:
                continue
            try:
                self.take(line)
            except AgentlabError as error:
                click.echo(f"agentlab: {error}", err=True)
            except KeyboardInterrupt:
                click.echo("\n(stopped)", err=True)

    def take(self, line: str) -> None:
        """Answer one line, or do what it commands."""
        if line.startswith("/"):
            name, _, rest = line[1:].partition(" ")
            if name not in self._commands:
                raise AgentError(f"no command /{name}; allowed: {', '.join('/' + known for known in self._commands)}")
            self._commands[name](rest.strip())
            return
        history = _messages(self.said) if self.session is None else ()
        result = _answer(self.lab, self.agent, line, self.deadline_s, self.session, self.printer, self.trace, history)
        if self.session is None and result.state in ("answered", "deadline") and result.final_answer:
            self.said.append((line, result.final_answer))
        if ending := _ending(result):
            click.secho(f"({ending})", err=True, dim=True)

    # -- commands -----------------------------------------------------------------------------------------------------

    def _adapter(self, name: str) -> None:
        if not name:
            from agentlab.adapters import Pool

            pool = Pool(self.lab.run.folder / "adapters")
            champion = self.lab.run.champion()
            for card in pool.members():
                mark = "  champion" if card.adapter_id == champion else ""
                click.echo(f"{card.adapter_id}  fitness {card.fitness:.3f}{mark}")
            click.echo(f"answering now: {self.agent.describe(self.agent.chain.link)}")
            return
        # made before the old one is closed: a wrong name leaves things as they are
        fresh = self.lab.agent(
            name, remember=self.agent.memory is not None, tools=self.agent.own_tools, lease=False, load=False,
            options=dataclasses.replace(self.agent.options, single_call=False), **self.agent.switches,
        )  # fmt: skip
        click.secho(str(self.agent.take_chain(fresh)), err=True, dim=True)

    def _memory(self, words: str) -> None:
        memory = self._known()
        if not words:
            click.echo(f"{len(memory)} memories in {memory.path}")
            return
        for hit in memory.recall(words, 5, count=False):
            click.echo(f"{hit.score:.2f}  {hit.memory_id}  {' '.join(hit.content.split())}")

    def _remember(self, text: str) -> None:
        click.echo(self._known().remember(text, memory_type="knowledge", session_id=self.session))

    def _forget(self, memory_id: str) -> None:
        if not memory_id:
            raise AgentError("/forget needs an id; /memory WORDS shows ids")
        memory = self._known()
        try:
            click.echo(f"forgotten: {' '.join(memory.forget(memory_id))}")
        except StorageError:  # it may be forgotten already, and the file not rewritten
            self.lines.clear()
            raise
        self.lines.clear()
        say_what_stays()
        for trace in memory.traces():
            click.secho(f"not everywhere: {trace}", err=True, dim=True)

    def _undo(self, _: str) -> None:
        asked: str | None = None
        if self.session is None:
            asked = self.said.pop()[0] if self.said else None
        else:
            try:
                turn = self._known().conversation(self.session).undo()
            except StorageError:  # as in forgetting
                self.lines.clear()
                raise
            asked = None if turn is None else turn.user_input
        click.echo("nothing to take back" if asked is None else f"taken back: {asked}")
        if asked is not None:
            self.lines.clear()

    def _history(self, _: str) -> None:
        turns = self.said
        if self.session is not None:
            kept = self._known().conversation(self.session).turns()
            turns = [(turn.user_input, turn.agent_response) for turn in kept]
        for asked, answered in turns:
            click.echo(f"> {asked}\n{answered}")

    def _session(self, name: str) -> None:
        memory = self._known()
        if not name:
            for one in memory.sessions():
                click.echo(f"{one.session_id}" + ("  (this one)" if one.session_id == self.session else ""))
            return
        turns = len(memory.conversation(name).turns())  # refuses what is no name, and the talk stays where it is
        self.session = name
        click.echo(f"talk {name!r}, {turns} turns so far")

    def _think(self, value: str) -> None:
        self.agent.options = dataclasses.replace(self.agent.options, thinking=_switch("think", value))

    def _steps(self, value: str) -> None:
        self.printer.steps = _switch("steps", value)

    def _deadline(self, value: str) -> None:
        try:
            seconds = float(value) if value else None
        except ValueError:
            seconds = -1.0
        if seconds is not None and not 0 < seconds < 1e6:
            raise AgentError(f"/deadline {value}; allowed: seconds above 0, or nothing for no deadline")
        self.deadline_s = seconds

    def _known(self) -> "Memory":
        if self.agent.memory is None:
            raise AgentError("this talk has no memory; start it without --no-memory")
        self.agent.stored()  # the last turn may still be on its way
        return self.agent.memory


def _messages(turns: Sequence[tuple[str, str]]) -> "list[Message]":
    """(asked, answered) as a history that an agent takes."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _switch(name: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise AgentError(f"/{name} {value}; allowed: on, off")
    return value == "on"
