"""One answer: recall → (think → act → observe)* → answer, as a stream of steps."""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal

from agentlab.agent.acting import Acting, usable
from agentlab.agent.budget import Budget, Speed
from agentlab.agent.confidence import token_probability
from agentlab.agent.fitting import fitted
from agentlab.agent.formats import FINAL_ANSWER, THINK_FIRST, Format, Message, call_message, choose, result_message
from agentlab.agent.measuring import measure
from agentlab.agent.reading import THINK, Answer, Reader, Said, stopped
from agentlab.agent.recalling import Recall
from agentlab.agent.steps import (
    Delta,
    FellBack,
    Generated,
    ModelInfo,
    ReasoningStep,
    Recalled,
    Recovered,
    Refusal,
    Rejected,
    Retracted,
    State,
    Step,
    Thought,
    ToolCalled,
)
from agentlab.agent.tools import Tool, as_untrusted
from agentlab.errors import AgentError, AgentlabError, ModelError
from agentlab.events import RecoveryStep
from agentlab.inference import Completion, Engine, Request
from agentlab.inference.chain import Chain
from agentlab.inference.contract import LimitTooSmallError
from agentlab.inference.links import ChainExhausted, Fall, Link
from agentlab.toolformat import NO_TOOL, Call, parse_calls, repair, structure

Choice = Literal["auto", "required", "none"]
_CALL_TOKENS = 48  # a usual call, for planning steps before a deadline
_ANSWER_TOKENS = 32
_LEAST_TOKENS = 4  # fewer new tokens are no answer: the deadline has come


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How an agent answers.

    format: auto, native, tags or react. thinking: reason in words before acting. recall: how many memories are shown at
    most; context_tokens: how many tokens they and earlier turns may take. constrained: calls are decoded under a
    grammar, so that they always parse. tool_choice: whether the first step may ("auto"), must ("required", where it is
    constrained) or must not ("none") call a tool. single_call: the adapter was taught one call and nothing else (a
    `tool_call` suite does that), so after a result, and where no tool applies, the base model answers in words.
    stop: the answer ends before the first of these strings; thoughts and calls are not looked at. notes: whether it may
    keep what it hears with its `remember` tool.
    """

    max_steps: int = 5
    max_new_tokens: int = 256
    format: str = "auto"
    thinking: bool = False
    tool_choice: Choice = "auto"
    single_call: bool = False
    constrained: bool = True
    temperature: float = 0.0
    seed: int = 0
    system: str = ""
    recall: int = 5
    context_tokens: int = 512
    stop: tuple[str, ...] = ()
    notes: bool = True


@dataclasses.dataclass(frozen=True)
class Written:
    """One whole output of a model and the format that it was asked in."""

    form: Format
    text: str
    confidence: float | None
    cut_short: bool
    adapter: str | None


@dataclasses.dataclass
class Loop:
    """One task on its way. What is known so far can be read from another thread at any time, and is at a deadline."""

    task: str
    chain: Chain
    tools: Mapping[str, Tool]
    options: Options
    budget: Budget
    recall: Recall
    speeds: dict[str, Speed]
    describe: Callable[[Link, Engine], ModelInfo]

    def __post_init__(self) -> None:
        self.best = ""
        self.best_is_a_result = False  # a tool's words, not the model's
        self.state: State = "failed"
        self.error = ""
        self.refused: Refusal | None = None  # no other model is loaded to see whether it could take that
        self.cut_short = False
        self.done: list[ReasoningStep] = []
        self.model_info: ModelInfo | None = None
        self.answer_adapter: str | None = None
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.fallbacks: list[str] = []
        self.warnings: list[str] = []
        self._system: list[Message] = []
        self._earlier: list[Message] = []  # turns before the task; the oldest are left out where room is short
        self._talk: list[Message] = []  # the task and what came of it
        self._acting = Acting(self.tools, self.budget)
        self._show_tools = bool(self.tools)
        self._asked_tokens = 0  # prompt and answer of what is being written
        self._asked_limit = 0  # most tokens of its answer
        self._known_tokens = 0  # of its prompt, those that need not be read
        self._answer = Answer(())  # the one that is being written
        self._short_of_time = False  # whether time, and not max_new_tokens, limits what is being written

    # -- the whole flow -----------------------------------------------------------------------------------------------

    def run(self) -> Iterator[Step]:
        """Every step as it happens; afterwards `state`, `best` and the rest say how it ended."""
        try:
            yield from self._run()
        except AgentlabError as error:
            self.error, self.refused = str(error), "task" if isinstance(error, AgentError) else self.refused
        except Exception as error:  # whatever breaks, there is an answer that says so
            self.error = f"{type(error).__name__}: {error}"

    def _run(self) -> Iterator[Step]:
        recalled = self._recalled()
        if recalled is not None:
            yield recalled
        choice = self._open(recalled)
        asked_again = False
        limit = self.options.max_steps
        for step in range(1, limit + 1):
            last_turn = step == limit
            if last_turn or not self._room_for_a_call():
                choice = "none"
            before = self.best, self.best_is_a_result, self.answer_adapter
            written = yield from self._write(step, choice)
            if written is None:
                return
            said = written.form.read(written.text)
            if said.thought:
                yield Thought(step_number=step, text=said.thought)
            # without a grammar a model calls also where it must not; without tools its text is text, whatever it says
            words_only = not self.tools or self._answer.at_stop or said.is_answer
            calls = [] if words_only else parse_calls(said.text, written.form.style)
            no_tool = said.text == NO_TOOL and self._show_tools and not last_turn
            if not calls and said.text and not no_tool:
                self._answered(step, said, written)
                return
            self.best, self.best_is_a_result, self.answer_adapter = before  # what was written is no answer
            if no_tool:
                # the model has decided; now it answers as one who has no tools
                self._done(step, said.thought or NO_TOOL, None, None, written.confidence)
                self._show_tools, choice = False, "none"
                continue
            call, problems = usable(self.tools, calls, choice != "none")
            original = mended = None
            kept = 1 if self.chain.others_left else 0  # a step for who has not failed
            if call is None and calls and choice != "none":
                mended = repair(said.text, self._definitions(), written.form.style)
            if mended is not None:
                yield Rejected(step_number=step, text=said.text, problems=problems, remedy="repair")
                call, original = mended, said.text
            if call is not None:
                choice = yield from self._act(step, call, original, said.thought, written.confidence)
            elif not asked_again and limit - step > kept:
                asked_again = True
                yield Rejected(step_number=step, text=said.text, problems=problems, remedy="re-ask")
                self._ask_again(said.text, problems, choice)
            else:
                yield from self._passed_on(step, said.text, problems)
                choice, asked_again = self._open(recalled), False
        self.error = f"no answer after {limit} steps"

    def _passed_on(self, step: int, said: str, problems: list[str]) -> Iterator[Step]:
        """Another model takes over. Raises ModelError where none is left, or no step for it."""
        possible = self.chain.others_left and step < self.options.max_steps
        yield Rejected(step_number=step, text=said, problems=problems, remedy="fallback" if possible else "give up")
        unusable = f"{self.chain.link.model} wrote nothing usable: {problems[0]}"
        if self.chain.others_left and not possible:
            raise ModelError(f"{unusable}; all {step} steps of the answer are taken")
        self.chain.fall(unusable, broken=False)
        yield from self._fallen(step)

    def _recalled(self) -> Recalled | None:
        """What the memory has to say; a memory that cannot be asked is no reason not to answer."""
        try:
            found = self.recall.look_up(self.task, self.budget)
            if self.recall.late:
                self.warnings.append("the memory did not answer in time: what it knows is not, or not all, shown")
            return found
        except Exception as error:
            self.warnings.append(f"the memory could not be asked: {error}")
            self.recall.memory = None
            return None

    # -- acting -------------------------------------------------------------------------------------------------------

    def _act(
        self, number: int, call: Call, original: str | None, thought: str, confidence: float | None
    ) -> Generator[Step, None, Choice]:
        """Execute a call; the choice for the next step: after the same call again, the model has to answer."""
        yield ToolCalled(step_number=number, name=call.name, arguments=call.arguments, original=original)
        seen, again = self._acting.act(number, call)
        if seen.ok and not again:
            self.best, self.best_is_a_result = seen.text, True
        yield seen
        action: dict[str, Any] = {"name": call.name, "arguments": call.arguments}
        if original is not None:
            action["original"] = original
        self._done(number, thought, action, seen.text, confidence)
        count = 1 + sum(message["role"] == "tool" for message in self._talk)
        self._talk.append(call_message(count, call.name, call.arguments, thought if self.options.thinking else ""))
        self._talk.append(result_message(count, call.name, seen.text))
        return "none" if again or (self.options.single_call and seen.ok) else "auto"

    def _ask_again(self, said: str, problems: Sequence[str], choice: Choice) -> None:
        self._talk.append({"role": "assistant", "content": as_untrusted(said) or "(nothing)"})
        may_call = self._show_tools and choice != "none"
        allowed = f"a call of one of: {', '.join(self.tools)}, or plain words" if may_call else "plain words"
        problem = as_untrusted(problems[0])
        self._talk.append({"role": "user", "content": f"That cannot be used: {problem}; allowed: {allowed}."})

    def _answered(self, step: int, said: Said, written: Written) -> None:
        self.best, self.best_is_a_result = stopped(said.text, self.options.stop).strip(), False
        self.cut_short = written.cut_short
        self.answer_adapter = written.adapter
        self.state = "answered"
        self._done(step, said.thought, None, None, written.confidence)

    def _done(
        self,
        number: int,
        thought: str,
        action: dict[str, Any] | None,
        observation: str | None,
        confidence: float | None,
    ) -> None:
        self.done.append(
            ReasoningStep(
                step_number=number, thought=thought, action=action, observation=observation, confidence=confidence
            )
        )

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write(self, number: int, choice: Choice) -> Generator[Step, None, "Written | None"]:
        """One output of the model whose turn it is, or None when there is none in time."""
        while True:
            try:
                self._asked_tokens = 0
                link, engine = self.chain.current()
                yield from self._fallen(number)
                return (yield from self._stream(number, choice, link, engine))
            except ChainExhausted as error:
                yield from self._fallen(number)
                self.error = str(error)
                return None
            except LimitTooSmallError:
                if self._short_of_time:
                    self._out_of_time()
                    return None
                if self._widened():
                    continue
                # where the context leaves less than what may be written, it is the task that leaves too little
                self.refused = "limit" if self._asked_limit == self.options.max_new_tokens else "task"
                raise
            except Exception as error:
                try:
                    self.chain.broken(error, self._asked_tokens)  # raises what is not the engine's fault
                except ChainExhausted as last:
                    yield from self._fallen(number)
                    self.error = str(last)
                    return None
                yield from self._fallen(number)

    def _widened(self) -> bool:
        """Whether a context that was shrunk for lack of memory left too little, and is wide enough now."""
        size = self._asked_tokens - self._asked_limit
        return self.chain.widen(size + min(self.options.max_new_tokens, self.chain.whole_context() - size))

    def _fallen(self, number: int) -> Iterator[Step]:
        for news in self.chain.take_news():
            if isinstance(news, Fall):
                self.fallbacks.append(f"{news.from_model} → {news.to_model}: {news.reason}")
                yield FellBack(
                    step_number=number, from_model=news.from_model, to_model=news.to_model, reason=news.reason
                )
            else:
                self.fallbacks.append(_in_words(news))
                yield Recovered(
                    step_number=number, model=news.model, action=news.action, source=news.source, target=news.target,
                    bytes_expected=news.bytes_expected, undone=news.undone, reason=news.reason,
                )  # fmt: skip

    def _stream(
        self, number: int, choice: Choice, link: Link, engine: Engine
    ) -> Generator[Step, None, "Written | None"]:
        form = choose(self.options.format, engine.call_style())
        self.model_info = self.model_info or self.describe(link, engine)
        request = self._request(choice, link, engine, form)
        yield from self._fallen(number)  # its context may have been widened
        if request is None:
            return None
        who = self.describe(dataclasses.replace(link, adapter=request.adapter), engine)
        if request.adapter is not None or (who.model, who.role) != (self.model_info.model, self.model_info.role):
            self.model_info = who  # the adapter that decides, also where the base model finds the words
        else:  # opened anew, it may be on another engine
            self.model_info = dataclasses.replace(self.model_info, engine=who.engine, device=who.device)
        opened = engine.opens_thought(request.messages)
        react = form.style.kind == "react"
        reader = Reader(form.style.trigger if self.tools else "", opened, FINAL_ANSWER if react else "")
        started = time.monotonic()
        first_s = 0.0
        completion: Completion | None = None
        before = self.best, self.best_is_a_result, self.answer_adapter
        decision = NO_TOOL if self._show_tools else ""
        self._answer = Answer(self.options.stop, decision)
        for chunk in engine.stream(request, lambda: self._answer.at_stop or self.budget.over()):
            if chunk.text and not first_s:
                first_s = time.monotonic() - started
            completion = chunk.completion
            for part, piece in reader.feed(chunk.text) + (reader.finish() if completion else []):
                if part == "retracted":
                    if self._answer.text.strip():
                        yield Retracted(step_number=number)
                    self._answer = Answer(self.options.stop, decision)
                    self.best, self.best_is_a_result, self.answer_adapter = before
                elif part != "answer":
                    yield Delta(step_number=number, text=piece, part=part)
                elif shown := self._spoken(piece, request.adapter):
                    yield Delta(step_number=number, text=shown, part="answer")
        assert completion is not None
        if rest := self._answer.rest():
            yield Delta(step_number=number, text=rest, part="answer")
        seconds = time.monotonic() - started
        # as it was planned: an engine that cannot say what it need not read seems to read faster
        read = completion.prompt_tokens - self._known_tokens
        self._speed(link).observe(read, first_s, completion.completion_tokens, seconds)
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += completion.completion_tokens
        confidence = token_probability(completion.logprobs)
        yield Generated(
            step_number=number,
            messages=request.messages,
            text=completion.text,
            finish_reason=completion.finish_reason,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            confidence=confidence,
            seconds=seconds,
            model_info=who,
        )
        at_stop = self._answer.at_stop
        cut = completion.finish_reason == "length" and not at_stop
        if (completion.finish_reason == "cancelled" and not at_stop) or (cut and self._short_of_time):
            self._out_of_time()
            return None
        text = completion.text
        unmarked = opened and not text.lstrip().startswith(THINK)
        complete = f"{THINK}{text}" if unmarked else text
        return Written(form, complete, confidence, cut, request.adapter)

    def _spoken(self, piece: str, adapter: str | None) -> str:
        """What may be shown of the answer with `piece`; so far it is the best there is, unless a tool's result is."""
        shown = self._answer.feed(piece)
        said = self._answer.text.strip()
        if said and not self._answer.undecided and not self.best_is_a_result:  # half an answer is less than a result
            self.best, self.answer_adapter = said, adapter
        return shown

    def _request(self, choice: Choice, link: Link, engine: Engine, form: Format) -> Request | None:
        """What is asked of the model, cut to its context and to the time that is left; None when that is nothing."""
        tools = self._definitions() if self._show_tools and (form.native or choice != "none") else []
        wanted, context = self.options.max_new_tokens, engine.context_length()
        # a champion that was taught single calls decides, the base model finds the words
        adapter = None if self.options.single_call and choice == "none" else link.adapter
        speed = self._speed(link)
        found = fitted(
            engine, form, adapter, tools, system=self._system, earlier=self._earlier, talk=self._talk, wanted=wanted,
            enough=_ANSWER_TOKENS, room_for=lambda unread: self.budget.tokens(speed, unread),
        )  # fmt: skip
        size, room = found.size, found.room
        least = min(_LEAST_TOKENS, wanted)
        # while memory is short the context is shrunk, but no answer is refused, cut or kept from its tools for it
        most = min(wanted, self.chain.whole_context() - size)  # no model writes more, whatever is allowed
        if size + wanted > context and self.chain.widen(size + max(least, min(most, _ANSWER_TOKENS), most // 4)):
            return self._request(choice, link, engine, form)
        if size + least > context and tools:  # a small window: better an answer without tools than none
            self.warnings.append(f"the tools were left out: with them the prompt has {size} of {context} tokens")
            self._show_tools = False
            return self._request("none", link, engine, form)
        if size + least > context:
            raise AgentError(f"the task takes {size} tokens of the {context} that {link.model} can read; shorten it")
        if room < least and not self.prompt_tokens and not self.budget.over() and speed.doubted():
            measure(engine, adapter, speed, self.budget.over)
            return self._request(choice, link, engine, form)
        if room < least or self.budget.over():
            self._out_of_time()
            return None
        self._short_of_time = room < min(wanted, context - size)
        self._known_tokens = found.known
        self._asked_limit = min(wanted, room, context - size)
        self._asked_tokens = size + self._asked_limit
        can = engine.capabilities()
        constrained = self.options.constrained and can.structure
        return Request(
            messages=found.shown,
            adapter=adapter,
            max_new_tokens=self._asked_limit,
            temperature=self.options.temperature,
            seed=self.options.seed,
            logprobs=can.logprobs,
            tools=tools if form.native and tools else None,
            structure=structure(tools, form.style, choice) if constrained and self.tools else None,
        )

    def _out_of_time(self) -> None:
        if not self.budget.cancelled():
            self.state = "deadline"

    # -- small things -------------------------------------------------------------------------------------------------

    def _open(self, recalled: Recalled | None) -> Choice:
        """Begin the talk, for the first model or for one that takes over; whether it may call a tool."""
        system = [self.options.system, THINK_FIRST if self.options.thinking else "", recalled.text if recalled else ""]
        text = "\n".join(filter(None, system))
        self._system = [{"role": "system", "content": text}] if text else []
        self._earlier = self.recall.turns()
        self._talk = [{"role": "user", "content": self.task}]
        self._acting.begin()
        self._show_tools = bool(self.tools)
        if not self.best_is_a_result:
            self.best, self.answer_adapter = "", None
        return self.options.tool_choice if self.tools else "none"

    def _definitions(self) -> list[dict[str, Any]]:
        return [tool.definition for tool in self.tools.values()]

    def _speed(self, link: Link) -> Speed:
        return self.speeds.setdefault(link.model, Speed())

    def _room_for_a_call(self) -> bool:
        speed = self._speed(self.chain.link)
        size = sum(len(str(message["content"])) for message in [*self._system, *self._earlier, *self._talk]) // 3
        return self.budget.steps(speed, size, _CALL_TOKENS, _ANSWER_TOKENS) > 0


def _in_words(step: RecoveryStep) -> str:
    """A step for lack of memory, for `ReasoningResult.fallbacks`."""
    what = step.action.replace("_", " ")
    return f"{step.model}: {'undone: ' if step.undone else ''}{what} {step.source} → {step.target}: {step.reason}"
