"""The fallback chain: primary → fallback → emergency model, one of which answers; the CPU where nothing is left."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Literal, Self

from agentlab.errors import AdapterError, AgentlabError
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
from agentlab.inference.links import ChainExhausted, Fall, Link, pin
from agentlab.inference.openai_server import ServerError

REST_S = 30.0  # a server that cannot be reached is left alone for so long: finding out takes seconds of an answer
_MOST_REOPENINGS = 2  # of one model in one answer; then it is given up


class Chain:
    """Models in the order in which they are tried; each is loaded when it is its turn. Not thread-safe: hold `lock`.

    Out of memory is met as `hardware.recovery` decides: the model gives something up and answers again; only then a
    smaller one takes over, and at the end the CPU. free_bytes: what the monitor says may be taken now; steps are undone
    by it at `rewind`, one at a time, the last one first. An engine whose process died is opened anew. A model that
    breaks otherwise, or cannot be loaded for other reasons, is not tried again in this chain's life; one whose output
    was unusable is, at the next `rewind`, one whose server could not be reached at opening after REST_S by `clock`.
    """

    def __init__(
        self, links: Sequence[Link], free_bytes: Callable[[], int] = lambda: 0, max_steps: int = recovery.MAX_STEPS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if not links:
            raise ValueError("a chain needs at least one model")
        self.links = list(links)
        self.lock = threading.Lock()  # for whoever answers: engines take one call at a time
        self._free_bytes = free_bytes
        self._max_steps = max_steps
        self._engines: dict[int, Engine] = {}
        self._broken: dict[int, str] = {}
        self._clock = clock
        self._resting: dict[int, tuple[float, str]] = {}  # until when, and why
        self._position = 0
        self._news: list[Fall | RecoveryStep] = []  # not yet told
        self._given_up = GivenUp()
        self._returning: Step | None = None  # was undone for a model that was not opened since
        self._unfit: dict[int, str] = {}  # models whose adapter, as it is now, cannot be loaded
        self._not_on_cpu: set[int] = set()  # what does not run there
        self._cpu_full: set[int] = set()  # what the RAM did not suffice for in this answer
        self._asked_back = False  # whether memory has returned, in this answer
        self._count = 0  # steps in this answer
        self._reopened: dict[int, int] = {}  # how often a model whose process died was opened anew in this answer
        self._least_tokens = 0  # what this answer cannot do without

    @property
    def link(self) -> Link:
        """Whose turn it is."""
        return self.links[self._position]

    # -- loading ------------------------------------------------------------------------------------------------------

    def current(self) -> tuple[Link, Engine]:
        """The model whose turn it is, loaded; falls on where loading fails. Raises ChainExhausted at the end."""
        while True:
            engine = self._engines.get(self._position)
            if engine is not None:
                self._given_up.tried()
                return self.link, engine
            if missing := self._missing(self._position):
                self._next(missing)
                continue
            try:
                self._engines[self._position] = self._load()
            except Exception as error:  # a model fails to load in as many ways as there are libraries under it
                let_go(error)
                self._not_loaded(error)
            if self._returning is not None and self._returning.position == self._position:
                self._returning = None

    def _not_loaded(self, error: Exception) -> None:
        """Do what helps after a model could not be loaded. Raises ChainExhausted where nothing does."""
        position = self._position
        said = _first_line(error)
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
            self._unfit[position] = reason
            self.fall(reason, broken=False)
        elif isinstance(error, ServerError):  # it may still be starting, or be started later
            self._resting[position] = self._clock() + REST_S, reason
            self.fall(reason, broken=False)
        else:
            self.fall(reason, broken=True)

    def _missing(self, position: int) -> str:
        """Why a model is not tried now; "" where it is."""
        until, reason = self._resting.get(position, (0.0, ""))
        if reason and self._clock() < until:
            return reason
        return self._broken.get(position) or self._unfit.get(position) or self._given_up.reason(position)

    def _load(self) -> Engine:
        link, rung, on_cpu = self.link, self._given_up.rung(self._position), self._given_up.on_cpu == self._position
        engine = link.reopen(rung, on_cpu) if link.reopen is not None and (rung or on_cpu) else link.open()
        engine.tell = self._news.append
        try:
            if link.adapter is not None and link.adapter_folder is not None:
                engine.load_adapter(link.adapter, link.adapter_folder)
                pin(engine, link)
            for action in self._given_up.opened(self._position, engine):
                engine.relieve(action, link.adapter)
        except BaseException:
            self._given_up.closed(engine, lasting=True)
            engine.close()
            raise
        if link.engine not in (None, engine.name):
            self._news.append(
                Fall(link.model, link.model, f"its scores are {link.engine}'s, and {engine.name} answers")
            )
        return engine

    # -- falling ------------------------------------------------------------------------------------------------------

    def fall(self, reason: str, *, broken: bool) -> None:
        """Go on to the next model; a broken one is freed first. Raises ChainExhausted when there is none."""
        position = self._position
        if broken:
            self._close(position)
            if position == self._given_up.on_cpu:  # which says nothing of the card
                self._not_on_cpu.add(position)
                self._given_up.leave_cpu()
            else:
                self._broken[position] = reason
                self._given_up.forget(position)
        self._next(reason)

    def _next(self, reason: str) -> None:
        """Go on to the next model that may be tried; in the end to the CPU, if memory did not suffice for one."""
        source = self.link.model
        left = self._left()
        if left is not None:
            self._position = left
            self._news.append(Fall(source, self.link.model, reason))
        elif not (self._missing(self._position) and (self._last_resort(reason) or self._is_back())):
            raise ChainExhausted(reason if len(self.links) == 1 else f"no model of the chain is left; last: {reason}")

    def _is_back(self) -> bool:
        """Whether memory has returned for a model that was given up; asked once in an answer, when no other is left."""
        if self._asked_back:
            return False
        self._asked_back = True
        return self._undo() and self._begin_anew()

    def _left(self) -> int | None:
        """The next model of the chain that may be tried."""
        return next((at for at in range(self._position + 1, len(self.links)) if not self._missing(at)), None)

    def _last_resort(self, reason: str) -> bool:
        """Have a model on the CPU answer for the last one that was given up for lack of memory, if there are such."""
        given, place = self._given_up.last_given_up(), self._refuge()
        if given is None or place is None or self._count >= self._max_steps:
            return False
        self._count += 1
        action = Action("cpu", given.action.source, self._on_the_cpu(place), given.action.bytes_expected)
        self._move_to_cpu(Step(action, place, origin=given.position, reason=given.reason))
        self._tell(action, reason)
        return True

    def _refuge(self) -> int | None:
        """The last model of the chain that may do on the CPU; None where one is there, or none is left."""
        barred = {*self._broken, *self._unfit, *self._not_on_cpu, *self._cpu_full}
        barred |= {at for at, link in enumerate(self.links) if link.reopen is None}
        found = [at for at in range(len(self.links)) if at not in barred and at not in self._resting]
        return found[-1] if found and self._given_up.on_cpu is None else None

    def _on_the_cpu(self, place: int) -> str:
        return f"{self.links[place].model} on the CPU"

    def _move_to_cpu(self, step: Step) -> None:
        self._close(step.origin)
        self._close(step.position)
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
            self._reopen(f"{self.link.model} broke: {_first_line(error)}")
            return
        if isinstance(error, EngineError) and not memory:
            self.fall(f"{self.link.model} cannot take this: {_first_line(error)}", broken=False)
            return
        if (isinstance(error, AgentlabError) and not memory) or not isinstance(error, Exception):
            raise error
        if memory:
            let_go(error)
            if not self._close_idle(error):
                self._relieve("serving", error, asked_tokens)
        else:
            self.fall(f"{self.link.model} broke: {_first_line(error)}", broken=True)

    def _reopen(self, reason: str) -> None:
        """Free an engine whose process is gone, so that `current` opens it anew; after too often, give its model up."""
        count = self._reopened.get(self._position, 0) + 1
        if count > _MOST_REOPENINGS:
            self.fall(reason, broken=True)
            return
        self._reopened[self._position] = count
        self._close(self._position)
        self._news.append(Fall(self.link.model, self.link.model, f"{reason}; it is opened anew"))

    def use(self, link: Link, pressing: bool = False) -> None:
        """Let `link`, the first model with another adapter or none, answer from now on; a loaded model stays loaded.

        Where memory is lacking for the adapter, others give way to it; where an answer waits for it (pressing) the
        model goes to a lower rung as well. Raises what loading the adapter raises, OutOfMemoryError where all of this
        does not help; then the one before answers on.
        """
        before, self.links[0] = self.links[0], link
        self._unfit.pop(0, None)
        changed = link.adapter == before.adapter and link.adapter_sha256 != before.adapter_sha256
        self._count = 0
        try:
            while link.adapter is not None and link.adapter_folder is not None:
                engine = self._engines.get(0)
                if engine is None:
                    return  # it is opened with the adapter
                try:
                    if changed or link.adapter not in engine.adapters():
                        engine.load_adapter(link.adapter, link.adapter_folder)
                    pin(engine, link)
                    return
                except EngineBroken:
                    self._close(0)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    let_go(error)
                    if not self._make_room(error, pressing):
                        text = f"adapter {link.adapter} finds no memory: {_first_line(error)}"
                        raise OutOfMemoryError(text) from None
        except BaseException:
            self.links[0] = before
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
        engine = self._engines.get(0)
        for adapter in engine.adapters() if engine is not None else []:
            if engine is not None and adapter != self.links[0].adapter and adapter not in keep:
                with contextlib.suppress(EngineBroken):  # whoever asks next is told
                    engine.unload_adapter(adapter)

    @property
    def usable(self) -> bool:
        """Whether a model is left that did not break, and whose server is not known to be down."""
        return not all(self._missing(at) for at in range(len(self.links)))

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
            position, engine = self._position, self._engines.get(self._position)
            situation = self._situation(problem, asked_tokens)
            action = recovery.next_action(situation, self._count, self._max_steps)
            if isinstance(error, NoRoomElsewhereError):
                action = None  # at no rung
            self._count += 1
            if action is None or action.kind == "smaller_model":
                what = "ran out of memory" if problem == "serving" else f"cannot be loaded: {_first_line(error)}"
                given = action or Action("smaller_model", self.link.model, "", _weights(situation.footprint))
                self._give_up(Step(given, position, reason=f"{self.link.model} {what}"))
                return
            reason = _first_line(error)
            if engine is not None and action.kind == "lower_rung" and engine.footprint(self.link.adapter) is None:
                reason = f"{reason}; {engine.name} has no rungs, and the model is opened elsewhere"
                self._close(position)
                engine = None
            try:
                self._act(action, engine)
            except Exception as failed:
                self._close(position)  # it may have lost its base on the way
                if not is_out_of_memory(failed):
                    self.fall(f"{self.link.model} broke: {_first_line(failed)}", broken=True)
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
        self._close(step.position)
        if step.position == self._given_up.on_cpu:  # not even there
            self._cpu_full.add(step.position)
            self._given_up.leave_cpu()
        else:
            self._given_up.take(step)
        self._next(step.reason)

    def _situation(self, problem: Literal["serving", "loading"], asked_tokens: int) -> Situation:
        link, engine = self.link, self._engines.get(self._position)
        held = None if engine is None else engine.footprint(link.adapter)
        if held is None and link.reopen is not None:
            # not loaded, or on an engine with nothing to give up: elsewhere it can be opened at a lower rung
            held, problem = link.planned(), "loading"
            rung, on_cpu = self._given_up.rung(self._position), self._given_up.on_cpu == self._position
            if held is not None and (rung is not None or on_cpu):
                device: Literal["cuda", "cpu"] = "cpu" if on_cpu else held.device
                held = dataclasses.replace(held, rung=rung or held.rung, device=device)
            if engine is not None and held is not None and held.rung is not None:
                taken = max(int(engine.planned_vram_mib(1, 1) * 2**20), held.rung_bytes[held.rung])  # its cache as well
                held = dataclasses.replace(held, rung_bytes={**held.rung_bytes, held.rung: taken})
        left, place = self._left(), self._refuge()
        return Situation(
            problem=problem,
            model=link.model,
            footprint=held,
            asked_tokens=asked_tokens,
            least_tokens=self._least_tokens,
            smaller=None if left is None else self.links[left].model,
            cpu=None if place is None else self.links[place].model,
        )

    def _act(self, action: Action, engine: Engine | None) -> None:
        position = self._position
        place = self._refuge()
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
        engine = self._engines.get(self._position)
        return 0 if engine is None else self._given_up.whole_context(engine)

    def widen(self, tokens: int) -> bool:
        """Let the model read so many tokens again, without which this answer cannot be given.

        False where its context was not shrunk, or is too small even so.
        """
        engine = self._engines.get(self._position)
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
        self._cpu_full.clear()
        self._asked_back = False
        self._begin_anew()

    def _begin_anew(self) -> bool:
        """Undo what is due and go to the first model that may be tried; whether there is one."""
        while self._undo() and not self.usable:
            pass
        whole = [at for at in range(len(self.links)) if not self._missing(at)]
        self._position = whole[0] if whole else len(self.links) - 1
        return bool(whole)

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
            self._close(last.position)
            if is_out_of_memory(error):
                self._given_up.not_undone(last)
            else:
                self._broken[last.position] = f"{model} broke: {_first_line(error)}"
            return False
        if changed:
            back = dataclasses.replace(last.action, source=last.action.target, target=last.action.source)
            self._tell(back, "memory has returned", undone=True, model=model)
        return True

    def _working_bytes(self) -> int:
        """What an answer takes for as long as it is written, by the largest one that memory did not suffice for."""
        held = next((found for engine in self._engines.values() if (found := engine.footprint()) is not None), None)
        return 0 if held is None else min(held.context_tokens, self._given_up.asked_tokens) * held.bytes_per_token

    def _take_back(self, step: Step) -> bool:
        """Undo what was done to a loaded engine; what is opened from now on is opened without the step anyway.

        False where there was nothing to undo: an answer may have needed the whole context meanwhile.
        """
        if step.action.kind == "cpu" or step.at_opening:
            self._close(step.position)
        elif step.engine is not None:
            if step.action.kind == "shrink_context" and step.engine.context_length() >= int(step.action.source):
                return False
            step.engine.restore(step.action)
        return True

    # -- the end ------------------------------------------------------------------------------------------------------

    def loaded(self) -> list[str]:
        """Models in memory now."""
        return [self.links[position].model for position in sorted(self._engines)]

    def _close(self, position: int) -> None:
        """Free one model. It is opened again, if it ever is, with the context and at the rung that it had."""
        engine = self._engines.pop(position, None)
        if engine is None:
            return
        self._given_up.closed(engine, lasting=self.links[position].reopen is not None)
        with contextlib.suppress(Exception):  # it may be broken: what it says at the end helps nobody
            engine.close()

    def _close_idle(self, error: Exception) -> bool:
        """Free what is only kept for later, which may be what takes the room; whether there was anything."""
        idle = [at for at in sorted(self._engines) if at != self._position and not self._engines[at].is_elsewhere]
        if idle:
            step = RecoveryStep(
                model=self.link.model, action="close_idle", target="none", reason=_first_line(error),
                source=", ".join(self.links[position].model for position in idle),
                bytes_expected=sum(_weights(self._engines[position].footprint()) for position in idle),
            )  # fmt: skip
            self._news.append(step)
        for position in idle:
            self._close(position)
        return bool(idle)

    def close(self) -> None:
        """Free every model; harmless when repeated."""
        for position in list(self._engines):
            self._close(position)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first_line(error: BaseException) -> str:
    said = "no memory is left" if isinstance(error, MemoryError) else type(error).__name__
    return (str(error).strip() or said).splitlines()[0]


def _weights(held: Footprint | None) -> int:
    """Bytes of the weights of a model that is given up; 0 where nobody knows them."""
    return 0 if held is None or held.rung is None else held.rung_bytes.get(held.rung, 0)
