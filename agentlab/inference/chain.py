"""The fallback chain: primary → fallback → emergency model, one of which answers; the CPU where nothing is left."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Literal, Self

from agentlab.errors import AdapterError, AgentlabError, first_line
from agentlab.events import RecoveryStep
from agentlab.hardware import recovery
from agentlab.hardware.oom import is_out_of_memory, let_go
from agentlab.hardware.recovery import Action, Footprint, Situation
from agentlab.inference.contract import (
    Engine,
    EngineBroken,
    EngineError,
    LimitTooSmallError,
    NoRoomElsewhereError,
    OutOfMemoryError,
)
from agentlab.inference.given_up import GivenUp, Step
from agentlab.inference.lineup import Lineup
from agentlab.inference.links import ChainExhausted, Fall, Link, pin
from agentlab.inference.openai_server import ServerError, Unreachable

_MOST_REOPENINGS = 2  # of one model in one answer; then it is given up


class Chain:
    """Models in the order in which they are tried; each is loaded when it is its turn. Not thread-safe: hold `lock`.

    Out of memory is met as `hardware.recovery` decides: the model gives something up and answers again; only then a
    smaller one takes over, and at the end the CPU. free_bytes: what the monitor says may be taken now; steps are undone
    by it at `rewind`, one at a time, the last one first. An engine whose process died is opened anew. A model that
    breaks otherwise, or cannot be loaded for other reasons, is not tried again in this chain's life; one whose output
    was unusable is, at the next `rewind`, one whose server could not be reached at opening after a while (`Lineup`).
    """

    def __init__(
        self, links: Sequence[Link], free_bytes: Callable[[], int] = lambda: 0, max_steps: int = recovery.MAX_STEPS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if not links:
            raise ValueError("a chain needs at least one model")
        self.lock = threading.Lock()  # for whoever answers: engines take one call at a time
        self._free_bytes = free_bytes
        self._max_steps = max_steps
        self._position = 0
        self._news: list[Fall | RecoveryStep] = []  # not yet told
        self._given_up = GivenUp()
        self._models = Lineup(links, self._given_up, self._news.append, clock)
        self._returning: Step | None = None  # was undone for a model that was not opened since
        self._asked_back = False  # whether memory has returned, in this answer
        self._count = 0  # steps in this answer
        self._reopened: dict[int, int] = {}  # how often a model whose process died was opened anew in this answer
        self._least_tokens = 0  # what this answer cannot do without

    @property
    def links(self) -> list[Link]:
        """All models, in their order."""
        return self._models.links

    @property
    def link(self) -> Link:
        """Whose turn it is."""
        return self.links[self._position]

    @property
    def _engine(self) -> Engine | None:
        """The engine of the model whose turn it is, where it is loaded."""
        return self._models.engines.get(self._position)

    # -- loading ------------------------------------------------------------------------------------------------------

    def current(self) -> tuple[Link, Engine]:
        """The model whose turn it is, loaded; falls on where loading fails. Raises ChainExhausted at the end."""
        while True:
            engine = self._engine
            if engine is not None:
                self._given_up.tried()
                return self.link, engine
            if missing := self._models.missing(self._position):
                self._next(missing)
                continue
            try:
                self._models.open(self._position)
            except Exception as error:  # a model fails to load in as many ways as there are libraries under it
                let_go(error)
                self._not_loaded(error)
            if self._returning is not None and self._returning.position == self._position:
                self._returning = None

    def _not_loaded(self, error: Exception) -> None:
        """Do what helps after a model could not be loaded. Raises ChainExhausted where nothing does."""
        position = self._position
        said = first_line(error)
        reason = said if "cannot be loaded" in said else f"{self.link.model} cannot be loaded: {said}"
        if is_out_of_memory(error):
            if not self._close_idle(error):
                self._relieve("loading", error)
        elif self._returning is not None and self._returning.position == position:
            self._given_up.not_undone(self._returning)  # without the step it worked
            self._tell(self._returning.action, reason)
        elif isinstance(error, EngineBroken):
            self._reopen(reason)
        elif isinstance(error, AdapterError):
            self._models.does_not_fit(position, reason)
            self.fall(reason, broken=False)
        elif isinstance(error, ServerError):
            self._models.rests(position, reason)
            self.fall(reason, broken=False)
        else:
            self.fall(reason, broken=True)

    # -- falling ------------------------------------------------------------------------------------------------------

    def fall(self, reason: str, *, broken: bool) -> None:
        """Go on to the next model; a broken one is freed first. Raises ChainExhausted when there is none.

        One that broke on the engine that was chosen for it is the next itself, on another.
        """
        if not (broken and self._models.breaks(self._position, reason)):
            self._next(reason)

    def _next(self, reason: str) -> None:
        """Go on to the next model that may be tried; in the end to the CPU, if memory did not suffice for one."""
        source = self.link.model
        left = self._models.next(self._position)
        if left is not None:
            self._position = left
            self._news.append(Fall(source, self.link.model, reason))
        elif not (self._models.missing(self._position) and (self._last_resort(reason) or self._is_back())):
            raise ChainExhausted(reason if len(self.links) == 1 else f"no model of the chain is left; last: {reason}")

    def _is_back(self) -> bool:
        """Whether memory has returned for a model that was given up; asked once in an answer, when no other is left."""
        if self._asked_back:
            return False
        self._asked_back = True
        return self._undo() and self._begin_anew()

    def _last_resort(self, reason: str) -> bool:
        """Have a model on the CPU answer for the last one that was given up for lack of memory, if there are such."""
        given, place = self._given_up.last_given_up(), self._models.refuge()
        if given is None or place is None or self._count >= self._max_steps:
            return False
        self._count += 1
        target = f"{self.links[place].model} on the CPU"
        action = Action("cpu", given.action.source, target, given.action.bytes_expected, given.action.elastic_bytes)
        self._move_to_cpu(Step(action, place, origin=given.position, reason=given.reason))
        self._tell(action, reason)
        return True

    def _move_to_cpu(self, step: Step) -> None:
        self._models.close(step.origin)
        self._models.close(step.position)
        self._given_up.move_to_cpu(step)
        self._position = step.position

    def broken(self, error: BaseException, asked_tokens: int = 0) -> None:
        """Do what helps after answering raised `error`; a request that no model could take is raised again instead.

        asked_tokens: prompt and answer of the request. Afterwards the same answer can be tried again with `current`.
        Raises ChainExhausted when nothing is left.
        """
        memory = is_out_of_memory(error)
        if isinstance(error, LimitTooSmallError):
            raise error
        if isinstance(error, EngineBroken) and not memory:
            self._reopen(f"{self.link.model} broke: {first_line(error)}")
            return
        if isinstance(error, Unreachable):
            reason = f"{self.link.model}: {first_line(error)}"
            self._models.rests(self._position, reason)
            self.fall(reason, broken=False)
            return
        if isinstance(error, EngineError) and not memory:
            self.fall(f"{self.link.model} cannot take this: {first_line(error)}", broken=False)
            return
        if (isinstance(error, AgentlabError) and not memory) or not isinstance(error, Exception):
            raise error
        if memory:
            let_go(error)
            if not self._close_idle(error):
                self._relieve("serving", error, asked_tokens)
        else:
            self.fall(f"{self.link.model} broke: {first_line(error)}", broken=True)

    def _reopen(self, reason: str) -> None:
        """Free an engine whose process is gone, so that `current` opens it anew; after too often, give its model up."""
        count = self._reopened.get(self._position, 0) + 1
        if count > _MOST_REOPENINGS:
            self.fall(reason, broken=True)
            return
        self._reopened[self._position] = count
        self._models.close(self._position)
        self._news.append(Fall(self.link.model, self.link.model, f"{reason}; it is opened anew"))

    def use(self, link: Link, pressing: bool = False) -> None:
        """Let `link`, the first model with another adapter or none, answer from now on; a loaded model stays loaded.

        Where memory is lacking for the adapter, others give way to it; where an answer waits for it (pressing) the
        model goes to a lower rung as well. Raises what loading the adapter raises, OutOfMemoryError where all of this
        does not help; then the one before answers on.
        """
        before = self.links[0]
        self._models.change(0, link)
        changed = link.adapter == before.adapter and link.adapter_sha256 != before.adapter_sha256
        self._count = 0
        try:
            while link.adapter is not None and link.adapter_folder is not None:
                engine = self._models.engines.get(0)
                if engine is None:
                    return  # it is opened with the adapter
                try:
                    if changed or link.adapter not in engine.adapters():
                        engine.load_adapter(link.adapter, link.adapter_folder)
                    pin(engine, link)
                    return
                except EngineBroken:
                    self._models.close(0)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    let_go(error)
                    if not self._make_room(error, pressing):
                        text = f"adapter {link.adapter} finds no memory: {first_line(error)}"
                        raise OutOfMemoryError(text) from None
        except BaseException:
            self._models.change(0, before)
            raise

    def _make_room(self, error: Exception, pressing: bool) -> bool:
        """Take a step for the adapter of the first model; False where there is none that an adapter is worth."""
        self._position = 0
        if self._close_idle(error):
            return True
        action = recovery.next_action(self._situation("serving", 0), self._count, self._max_steps)
        worth = ("offload_adapters", "lower_rung") if pressing else ("offload_adapters",)
        if action is None or action.kind not in worth:
            return False
        self._relieve("serving", error)
        return True

    def drop_adapters(self, keep: Collection[str | None]) -> None:
        """Free the first model's adapters that are neither its own now nor in `keep`."""
        engine = self._models.engines.get(0)
        for adapter in engine.adapters() if engine is not None else []:
            if engine is not None and adapter != self.links[0].adapter and adapter not in keep:
                with contextlib.suppress(EngineBroken):  # whoever asks next is told
                    engine.unload_adapter(adapter)

    @property
    def others_left(self) -> bool:
        """Whether another model could take over."""
        return self._models.next(self._position) is not None

    @property
    def usable(self) -> bool:
        """Whether a model is left that did not break, and whose server is not known to be down."""
        return self._models.next() is not None

    def take_news(self) -> list[Fall | RecoveryStep]:
        """Falls, and steps for lack of memory, since the last call, oldest first; to a smaller model is a fall."""
        news = list(self._news)
        self._news.clear()  # the list stays: engines write into it, too
        return news

    # -- memory -------------------------------------------------------------------------------------------------------

    def _relieve(self, problem: Literal["serving", "loading"], error: Exception, asked_tokens: int = 0) -> None:
        """Take the next step that is left. Raises ChainExhausted where none is."""
        self._given_up.lacked(asked_tokens)
        while True:
            position, engine = self._position, self._engine
            situation = self._situation(problem, asked_tokens)
            action = recovery.next_action(situation, self._count, self._max_steps)
            if isinstance(error, NoRoomElsewhereError):
                action = None  # at no rung
            self._count += 1
            if action is None or action.kind == "smaller_model":
                what = "ran out of memory" if problem == "serving" else f"cannot be loaded: {first_line(error)}"
                held = situation.footprint
                elastic = 0 if held is None else held.elastic_bytes
                given = action or Action("smaller_model", self.link.model, "", _held_bytes(held), elastic)
                self._give_up(Step(given, position, reason=f"{self.link.model} {what}"))
                return
            reason = first_line(error)
            if engine is not None and action.kind == "lower_rung" and engine.footprint(self.link.adapter) is None:
                reason = f"{reason}; {engine.name} has no rungs, and the model is opened elsewhere"
                self._models.close(position)
                engine = None
            try:
                self._act(action, engine)
            except Exception as failed:
                self._models.close(position)  # it may have lost its base on the way
                if not is_out_of_memory(failed):
                    self.fall(f"{self.link.model} broke: {first_line(failed)}", broken=True)
                    return
                error, problem = failed, "loading"
                if action.kind != "lower_rung":
                    continue
                self._act(action, None)  # where it could not be loaded; the next step goes on from there
            self._tell(action, reason, model=self.links[position].model)
            if problem == "serving" or engine is None:
                return

    def _give_up(self, step: Step) -> None:
        """A model that memory does not suffice for is left alone until it does; the next one takes over."""
        self._models.close(step.position)
        if step.position == self._given_up.on_cpu:
            self._models.finds_no_room(step.position)
        else:
            self._given_up.take(step)
        self._next(step.reason)

    def _situation(self, problem: Literal["serving", "loading"], asked_tokens: int) -> Situation:
        held, is_loaded = self._models.footprint(self._position)
        left, place = self._models.next(self._position), self._models.refuge()
        return Situation(
            problem=problem if is_loaded else "loading",
            model=self.link.model,
            footprint=held,
            asked_tokens=asked_tokens,
            least_tokens=self._least_tokens,
            smaller=None if left is None else self.links[left].model,
            cpu=None if place is None else self.links[place].model,
        )

    def _act(self, action: Action, engine: Engine | None) -> None:
        position = self._position
        place = self._models.refuge()
        if action.kind == "cpu" and place is not None:
            reason = f"{self.link.model} ran out of memory"
            self._move_to_cpu(Step(action, place, origin=position, reason=reason))
        elif engine is not None:
            engine.relieve(action, self.link.adapter)
            self._given_up.take(Step(action, position, engine))
        else:  # it could not be loaded: the next attempt is at this rung
            self._given_up.take(Step(action, position, at_opening=True))

    def whole_context(self) -> int:
        """Most tokens that the loaded model whose turn it is reads while its context is not shrunk; 0 without one."""
        return 0 if self._engine is None else self._given_up.whole_context(self._engine)

    def widen(self, tokens: int) -> bool:
        """Let the model read so many tokens again, without which this answer cannot be given.

        False where its context was not shrunk, or is too small even so.
        """
        engine = self._engine
        if engine is None or not engine.context_length() < tokens <= self.whole_context():
            return False
        action = Action("shrink_context", str(engine.context_length()), str(tokens))
        engine.relieve(action, self.link.adapter)
        self._least_tokens = tokens
        self._tell(action, "this answer needs them", undone=True)
        return True

    def _tell(self, action: Action, reason: str, undone: bool = False, model: str = "") -> None:
        step = RecoveryStep(
            model=model or self.link.model, action=action.kind, source=action.source, target=action.target,
            bytes_expected=action.bytes_expected, undone=undone, reason=reason,
        )  # fmt: skip
        self._news.append(step)

    def rewind(self) -> None:
        """Begin an answer: with the first model that is not broken, and with one step undone if memory has returned.

        Where no model is left, as many as one needs. Harmless while nobody asks: only answers count as calm.
        """
        self._given_up.begin_answer()
        self._count = self._least_tokens = 0
        self._reopened.clear()
        self._models.begin_answer()
        self._asked_back = False
        self._begin_anew()

    def _begin_anew(self) -> bool:
        """Undo what is due and go to the first model that may be tried; whether there is one."""
        while self._undo() and not self.usable:
            pass
        first = self._models.next()
        self._position = len(self.links) - 1 if first is None else first
        return first is not None

    def _undo(self) -> bool:
        """Take the last step back if that is due; whether it was."""
        last = self._given_up.undo(self._free_bytes() - self._working_bytes(), nothing_left=not self.usable)
        if last is None:
            return False
        model = self.links[last.position].model
        if last.at_opening:
            self._returning = last
        try:
            changed = self._take_back(last)
        except Exception as error:
            self._models.close(last.position)
            if is_out_of_memory(error):
                self._given_up.not_undone(last)
            else:
                self._models.breaks(last.position, f"{model} broke: {first_line(error)}")
            return False
        if changed:
            back = dataclasses.replace(last.action, source=last.action.target, target=last.action.source)
            self._tell(back, "memory has returned", undone=True, model=model)
        return True

    def _working_bytes(self) -> int:
        """What an answer takes for as long as it is written, by the largest one that memory did not suffice for."""
        held = next(
            (found for engine in self._models.engines.values() if (found := engine.footprint()) is not None), None
        )
        return 0 if held is None else min(held.context_tokens, self._given_up.asked_tokens) * held.bytes_per_token

    def _take_back(self, step: Step) -> bool:
        """Undo what was done to a loaded engine; what is opened from now on is opened without the step anyway.

        False where there was nothing to undo: an answer may have needed the whole context meanwhile.
        """
        if step.action.kind == "cpu" or step.at_opening:
            self._models.close(step.position)
        elif step.engine is not None:
            if step.action.kind == "shrink_context" and step.engine.context_length() >= int(step.action.source):
                return False
            step.engine.restore(step.action)
        return True

    # -- the end ------------------------------------------------------------------------------------------------------

    def loaded(self) -> list[str]:
        """Models in memory now."""
        return [self.links[position].model for position in sorted(self._models.engines)]

    def _close_idle(self, error: Exception) -> bool:
        """Free what is only kept for later, which may be what takes the room; whether there was anything."""
        idle, engines = self._models.idle(self._position), self._models.engines
        if idle:
            step = RecoveryStep(
                model=self.link.model, action="close_idle", target="none", reason=first_line(error),
                source=", ".join(self.links[position].model for position in idle),
                bytes_expected=sum(_held_bytes(engines[position].footprint()) for position in idle),
            )  # fmt: skip
            self._news.append(step)
        for position in idle:
            self._models.close(position)
        return bool(idle)

    def close(self) -> None:
        """Free every model; harmless when repeated."""
        for position in list(self._models.engines):
            self._models.close(position)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _held_bytes(held: Footprint | None) -> int:
    """What a model that is given up holds, but for its adapters; 0 where nobody knows its weights."""
    return 0 if held is None or held.rung is None else held.rung_bytes.get(held.rung, 0) + held.elastic_bytes
