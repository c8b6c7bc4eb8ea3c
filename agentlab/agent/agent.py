"""`Agent`: answers tasks with tools and a memory, step by step, on time, and says truthfully how it went."""

import asyncio
import contextlib
import dataclasses
import math
import queue
import re
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from agentlab.agent.budget import Budget, Speed
from agentlab.agent.confidence import joint
from agentlab.agent.formats import Message
from agentlab.agent.loop import Loop, Options
from agentlab.agent.measuring import measure
from agentlab.agent.recalling import Recall
from agentlab.agent.steps import Answered, ModelInfo, ReasoningResult, State, Step
from agentlab.agent.tools import Tool, builtin, tool
from agentlab.errors import AgentError, MemoryStoreError
from agentlab.hardware.monitor import memory_stats, process_ram_mb
from agentlab.inference import Engine
from agentlab.inference.chain import Chain
from agentlab.inference.links import ChainExhausted, Link

if TYPE_CHECKING:
    from agentlab.memory import Memory

_WARM_UP_S = 30.0
_STORING_S = 1.0  # how long an answer with a deadline waits for its turn to be stored
_GRACE_S = 1.0  # how long a cancelled answer may take to end by itself
# what text in SQLite and JSON cannot hold, and a model that talks nonsense writes
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class Agent:
    """A model that answers, uses tools and remembers. One answer at a time; others wait for their turn.

    chain: the models, see `Lab.agent` for how they are chosen. tools: plain typed functions or `Tool`s; the built-in
    `memory_search` and `remember` (with a memory) and `gpu_monitor`, `calculator` and `now` are there as well unless
    builtin_tools is False. memory: where it recalls from; turns of sessions are remembered in it.

    >>> with lab.agent() as agent: print(agent.ask("What is 17 % of 2340?").final_answer)
    """

    def __init__(
        self, chain: Chain, tools: Iterable[Tool | Callable[..., Any]] = (), *, memory: "Memory | None" = None,
        builtin_tools: bool = True, python: bool = False, run: str = "", options: Options | None = None,
        describe: Callable[[Link], dict[str, Any]] = lambda link: {}, on_close: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.chain = chain
        self.memory = memory
        self.options = checked(options or Options())
        self.run_id = run
        self.speeds: dict[str, Speed] = {}
        self.own_tools = [_as_tool(one) for one in tools] if isinstance(tools, Iterable) else [_as_tool(tools)]
        self.switches = {"builtin_tools": builtin_tools, "python": python}
        names = [one.name for one in self._tools(Recall(), None)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise AgentError(f"two tools are called {twice[0]}; allowed: one of each name")
        self._describe = describe
        self._on_close = on_close
        self._closed = False
        # of the answers that were asked for; an answer that nobody wants any more takes its own along
        self._cancels: set[weakref.ref[threading.Event]] = set()
        self._storing: threading.Thread | None = None

    # -- answering ----------------------------------------------------------------------------------------------------

    def run(
        self, task: str, *, deadline_s: float | None = None, session_id: str | None = None,
        history: Sequence[Message] = (), options: Options | None = None, cancel: threading.Event | None = None,
    ) -> Iterator[Step]:  # fmt: skip
        """The steps of one answer as they happen; the last is `Answered`, whatever happens.

        deadline_s: seconds from now by which `Answered` comes, with the best answer there is. session_id: the talk that
        this task continues; it is shown to the model, and the turn is remembered. history: the talk so far, as messages
        {"role": "user" | "assistant", "content"}, where the asker keeps it: it is shown instead of the session's turns,
        cut like them. options: for this answer instead of the agent's own. Setting `cancel`, calling `agent.cancel()`
        and leaving the loop all end the work. Raises AgentError for an empty task, an impossible deadline, history or
        option, or a session without a memory.
        """
        check_asked(task, deadline_s, history)
        if session_id is not None and self.memory is None:
            raise AgentError(f"session {session_id!r} needs a memory to be kept in; give the agent one")
        if session_id is not None:
            check_session(session_id)
        options = self.options if options is None else checked(options)
        budget = Budget(deadline_s, cancel)
        self._cancels.add(weakref.ref(budget.cancel, self._cancels.discard))
        return self._steps(task, budget, session_id, history, options)

    def ask(
        self, task: str, *, deadline_s: float | None = None, session_id: str | None = None,
        history: Sequence[Message] = (), on_step: Callable[[Step], None] = lambda step: None,
    ) -> ReasoningResult:  # fmt: skip
        """The answer to one task; `on_step` is called with every step on the way. See `run`."""
        result: ReasoningResult | None = None
        for step in self.run(task, deadline_s=deadline_s, session_id=session_id, history=history):
            on_step(step)
            if isinstance(step, Answered):
                result = step.result
        assert result is not None
        return result

    def arun(
        self, task: str, *, deadline_s: float | None = None, session_id: str | None = None,
        history: Sequence[Message] = (),
    ) -> AsyncIterator[Step]:  # fmt: skip
        """`run` for asyncio: other coroutines go on while the model writes."""
        cancel = threading.Event()
        steps = self.run(task, deadline_s=deadline_s, session_id=session_id, history=history, cancel=cancel)
        return _awaitable(steps, cancel)

    async def aask(
        self, task: str, *, deadline_s: float | None = None, session_id: str | None = None,
        history: Sequence[Message] = (),
    ) -> ReasoningResult:  # fmt: skip
        """`ask` for asyncio."""
        result: ReasoningResult | None = None
        async for step in self.arun(task, deadline_s=deadline_s, session_id=session_id, history=history):
            if isinstance(step, Answered):
                result = step.result
        assert result is not None
        return result

    def cancel(self) -> None:
        """End what is being answered, from any thread; it comes back with state "cancelled"."""
        for known in list(self._cancels):
            if (cancel := known()) is not None:
                cancel.set()

    def _steps(
        self, task: str, budget: Budget, session_id: str | None, history: Sequence[Message], options: Options
    ) -> Iterator[Step]:
        """Works in a thread of its own, so that whatever hangs there, the deadline is kept here."""
        task_id = uuid.uuid4().hex[:12]
        steps: queue.SimpleQueue[Step | BaseException | None] = queue.SimpleQueue()
        recall = Recall(self.memory, session_id, options.recall, options.context_tokens, history)
        tools = self._tools(recall, session_id, notes=options.notes)
        loop = Loop(
            task=task, chain=self.chain, tools={one.name: one for one in tools},
            options=options, budget=budget, recall=recall, speeds=self.speeds, describe=self.describe,
        )  # fmt: skip

        def work() -> None:
            try:
                while not self._take_turn(loop):
                    if budget.over():
                        return
                try:
                    if self._closed:
                        raise AgentError("the agent is closed; open another one")
                    recall.storing = self._storing  # the turn before is part of this one's talk
                    loop.chain.rewind()  # whoever fell in the last answer may try again
                    for step in loop.run():
                        steps.put(step)
                finally:
                    loop.chain.lock.release()
            except BaseException as error:  # handed to the consumer, who raises it
                steps.put(error)
            finally:
                steps.put(None)

        threading.Thread(target=work, name=f"agent-{task_id}", daemon=True).start()
        try:
            while (item := _next(steps, budget)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
            answered_s, result = time.time(), self._result(task_id, loop, budget, session_id)
            # a turn holds the agent's own words, also those that the deadline cut off, but not a tool's
            own_words = result.state == "answered" or (result.state == "deadline" and not loop.best_is_a_result)
            said = result.final_answer if own_words else ""
            if session_id is not None and (said or recall.notes):  # without its turn nothing would take a note back
                self._keep(recall, result, said, budget)
            yield Answered(step_number=len(loop.done), result=result, time_s=answered_s)
        finally:
            budget.cancel.set()

    def _take_turn(self, loop: Loop) -> bool:
        """Whether it is this answer's turn now, with the chain's lock held. An abandoned one ends at its next token."""
        chain = self.chain
        if not chain.lock.acquire(timeout=0.02):
            return False
        if chain is not self.chain:  # other models were taken meanwhile
            chain.lock.release()
            return False
        if chain is not loop.chain:
            loop.chain = chain
            loop.options = dataclasses.replace(loop.options, single_call=self.options.single_call)  # is the adapter's
        return True

    def _keep(self, recall: Recall, result: ReasoningResult, said: str, budget: Budget) -> None:
        """Remember the turn, in which the agent `said` this. A failure is a warning, not raised.

        An answer with a deadline, or one that was cancelled, waits a second for it.
        """
        before = self._storing

        def store() -> None:
            if before is not None:
                before.join()
            try:
                if recall.conversation is None:
                    raise MemoryStoreError("the memory could not be opened")
                recall.conversation.add(
                    result.prompt, _UNSTORABLE.sub("\ufffd", said) or "…", context_used=result.context_used,
                    notes=recall.notes, cut_off=result.state != "answered", agent=str(result.model_info),
                    metadata={"task_id": result.task_id, "state": result.state},
                )  # fmt: skip
            except Exception as error:
                result.warnings.append(f"this turn was not remembered: {error}")

        self._storing = threading.Thread(target=store, name="agent-remembers")  # not a daemon: nothing is lost
        self._storing.start()
        patient = budget.deadline_s is None and not budget.cancelled()
        self.stored(math.inf if patient else min(budget.left_s, _STORING_S))
        if self._storing.is_alive() and budget.left_s > 0:
            result.warnings.append("this turn is not stored yet: the memory is busy; it goes on with that")

    def stored(self, wait_s: float = math.inf) -> None:
        """Wait until the turn before is remembered."""
        if self._storing is not None:
            self._storing.join(None if wait_s == math.inf else max(0.0, wait_s))

    def _result(self, task_id: str, loop: Loop, budget: Budget, session_id: str | None) -> ReasoningResult:
        state: State = loop.state
        if state == "failed" and not loop.error:
            state = "cancelled" if budget.cancelled() else "deadline" if budget.over() else "failed"
        whole = state == "answered" and not loop.cut_short
        return ReasoningResult(
            task_id=task_id,
            prompt=loop.task,
            reasoning_steps=list(loop.done),
            final_answer=loop.best if state != "failed" else "",
            confidence_score=joint([step.confidence for step in loop.done]) if whole else 0.0,
            processing_time=budget.elapsed_s,
            memory_usage=memory_stats(),
            model_info=loop.model_info or self.describe(self.chain.link, None),
            state=state,
            context_used=list(loop.recall.used),
            session_id=session_id,
            prompt_tokens=loop.prompt_tokens,
            completion_tokens=loop.completion_tokens,
            process_ram_mb=process_ram_mb(),
            cut_short=loop.cut_short,
            answer_adapter=loop.answer_adapter,
            warnings=loop.warnings,
            fallbacks=list(loop.fallbacks),
            refused=loop.refused if state == "failed" else None,
            error=loop.error or ("the model wrote nothing usable" if state == "failed" else ""),
        )

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def tools(self) -> list[Tool]:
        """All tools that the model may call."""
        return self._tools(Recall(self.memory), None)

    def _tools(self, recall: Recall, session_id: str | None, *, notes: bool = True) -> list[Tool]:
        found = list(self.own_tools)
        if self.switches["builtin_tools"]:
            if self.memory is not None:
                found.append(builtin.memory_search(self.memory, on_recalled=recall.noted))
                if notes:
                    found.append(
                        builtin.remember(
                            self.memory, session_id, derived_from=lambda: recall.used, on_remembered=recall.notes.append
                        )
                    )
            found += [builtin.calculator(), builtin.now(), builtin.gpu_monitor()]
        if self.switches["python"]:
            found.append(builtin.python())
        return found

    def describe(self, link: Link, engine: Engine | None = None) -> ModelInfo:
        """Which model, adapter and run a link of the chain is."""
        known = self._describe(link)
        return ModelInfo(
            model=link.model, model_sha256=known.get("model_sha256", ""), role=link.role,
            engine=engine.name if engine else "", device=engine.device if engine else "", adapter=link.adapter,
            adapter_sha256=link.adapter_sha256 if link.adapter else None, run=self.run_id,
        )  # fmt: skip

    def load(self) -> ModelInfo:
        """Load the model whose turn it is, measure its speed, and wake the memory, so that no answer waits for that.

        A model that breaks at it is passed over like anywhere else. Raises ChainExhausted when none is left.
        """
        if self.memory is not None and self.options.recall:
            with contextlib.suppress(MemoryStoreError):  # answers will say what is wrong with it
                self.memory.recall("hello", 1, count=False)
        with self.chain.lock:
            while True:
                try:
                    link, engine = self.chain.current()
                    self._warm_up(link, engine)
                    return self.describe(link, engine)
                except Exception as error:
                    if isinstance(error, ChainExhausted):
                        raise
                    self.chain.broken(error)

    def _warm_up(self, link: Link, engine: Engine) -> None:
        speed = self.speeds.setdefault(link.model, Speed())
        if not speed.known:
            # a server that stalls must not keep everybody waiting for a measurement
            if engine.device != "cpu":  # a GPU compiles kernels for its first answer, a server loads its model
                measure(engine, link.adapter, Speed(), Budget(_WARM_UP_S).over)
            measure(engine, link.adapter, speed, Budget(_WARM_UP_S).over)

    def take_chain(self, other: "Agent") -> ModelInfo:
        """Answer with the models of `other`, an agent that was never loaded, from now on; who answers.

        The own models are freed first, as both may not fit. Raises ChainExhausted, and the own ones stay, when none of
        the others can be loaded.
        """
        own = self.chain, self._describe, self.run_id, self.options
        self._change_to(other.chain, other._describe, other.run_id, other.options)
        try:
            return self.load()
        except BaseException:
            self._change_to(*own)
            raise

    def _change_to(
        self, chain: Chain, describe: Callable[[Link], dict[str, Any]], run_id: str, options: Options
    ) -> None:
        with self.chain.lock:
            self.chain.close()
            self.chain, self._describe, self.run_id, self.options = chain, describe, run_id, options

    def close(self) -> None:
        """End what is being answered and free the models; harmless when repeated."""
        self.cancel()
        self._closed = True
        with self.chain.lock:
            self.chain.close()
        self.stored()
        self._on_close()
        self._on_close = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _awaitable(steps: Iterator[Step], cancel: threading.Event) -> AsyncIterator[Step]:
    """`steps` for an event loop. They are waited for in a thread of their own: the loop's own are few, and others need
    them. Leaving it sets `cancel`.
    """
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[Step | BaseException | None] = asyncio.Queue()

    def tell(item: Step | BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(news.put_nowait, item)
        except RuntimeError:  # the event loop is closed: nobody waits any more
            cancel.set()

    def walk() -> None:
        try:
            for step in steps:
                tell(step)
        except BaseException as error:  # handed to the consumer, who raises it
            tell(error)
        finally:
            tell(None)

    threading.Thread(target=walk, name="agent-awaited", daemon=True).start()
    try:
        while (item := await news.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        cancel.set()


def _next(steps: "queue.SimpleQueue[Step | BaseException | None]", budget: Budget) -> "Step | BaseException | None":
    """The next news of the work; None when it has ended, or when time is up and it does not end by itself."""
    waited_s = 0.0
    while True:
        left_s = budget.left_s
        if budget.cancelled():
            left_s = min(left_s, _GRACE_S - waited_s)
        try:
            return steps.get(timeout=max(0.0, min(left_s, 0.05)))
        except queue.Empty:
            if budget.cancelled():
                waited_s += 0.05
            if left_s <= 0:
                return None


def checked(options: Options) -> Options:
    """`options` if they are possible; raises AgentError that says what is allowed."""
    if not isinstance(options, Options):
        raise AgentError(f"options: {options!r:.80}; allowed: Options(…)")
    for name in ("thinking", "constrained", "single_call", "notes"):
        if not isinstance(getattr(options, name), bool):
            raise AgentError(f"{name}: {getattr(options, name)!r}; allowed: True or False")
    if not isinstance(options.system, str):
        raise AgentError(f"system: {options.system!r:.80}; allowed: text")
    for name, least in (("max_steps", 1), ("max_new_tokens", 1), ("recall", 0), ("context_tokens", 0)):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise AgentError(f"{name}: {value!r}; allowed: a whole number from {least}")
    if options.format not in ("auto", "native", "tags", "react"):
        raise AgentError(f"format: {options.format!r}; allowed: auto, native, tags, react")
    if options.tool_choice not in ("auto", "required", "none"):
        raise AgentError(f"tool_choice: {options.tool_choice!r}; allowed: auto, required, none")
    if not _is_number(options.temperature) or not 0 <= options.temperature <= 10:
        raise AgentError(f"temperature: {options.temperature!r}; allowed: 0 to 10")
    if not isinstance(options.seed, int) or not -(2**63) <= options.seed < 2**63:
        raise AgentError(f"seed: {options.seed!r}; allowed: a whole number of 64 bits")
    if not isinstance(options.stop, tuple | list) or not all(isinstance(text, str) and text for text in options.stop):
        raise AgentError(f"stop: {options.stop!r:.80}; allowed: a tuple of strings of one character or more")
    return options


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_tool(given: Any) -> Tool:
    if isinstance(given, Tool):
        return given
    if not callable(given):
        raise AgentError(f"tools: {given!r:.80} is no tool; allowed: a list of typed functions and Tools")
    return tool(given)


def check_session(session_id: Any) -> str:
    """`session_id` if a memory can keep it; raises AgentError."""
    from agentlab.memory.records import check_text

    try:
        return check_text("session_id", session_id)
    except MemoryStoreError as error:
        raise AgentError(str(error)) from None


def check_asked(task: str, deadline_s: float | None = None, history: Sequence[Message] = ()) -> None:
    """Raise AgentError for a task, a deadline or a history that no agent can take."""
    if isinstance(history, str) or not isinstance(history, Sequence):
        raise AgentError(f"history: {history!r:.80}; allowed: a list of messages")
    for message in history:
        known = isinstance(message, Mapping) and message.get("role") in ("user", "assistant")
        if not known or not isinstance(message.get("content"), str):
            raise AgentError(f'history: {message!r:.80}; allowed: {{"role": "user" or "assistant", "content": text}}')
    if not isinstance(task, str) or not task.strip():
        raise AgentError("the task is empty; allowed: text with at least one visible character")
    if any("\x00" in text for text in (task, *(message["content"] for message in history))):
        raise AgentError("the task or its history contains a NUL character, which text cannot hold")
    with contextlib.suppress(UnicodeEncodeError):
        "".join([task, *(message["content"] for message in history)]).encode()
        if deadline_s is not None and not (_is_number(deadline_s) and 0 < deadline_s < 1e6):
            raise AgentError(f"deadline_s: {deadline_s!r}; allowed: seconds above 0, or None")
        return
    raise AgentError("the task or its history contains half a surrogate pair, which UTF-8 cannot hold")
