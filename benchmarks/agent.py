"""The agent measured: calls that parse, tool use end to end, calibration, and what the loop costs beside smolagents.

  python benchmarks/agent.py --data ../data --experiment experiments/demo.yaml --smolagents /path/to/its/python

- BFCL: the simple cases where a call is demanded, and those where no tool applies; how many outputs parse and fit their
  tool's schema, how many are right, how often nothing is rightly called. The base model answers.
- toolcalls: gate items (nobody trains on them), tools that really run: solved means that the accepted call was executed
  and the answer has what the tool returned, or that nothing was called where no tool applies. Champion beside base.
- Calibration of confidence_score on those items: Brier score and expected calibration error.
- Overhead: wall time of a step less the time in which model and tool work, the same written calls in both loops. Both
  render and tokenize every prompt with the embedded model's own chat template and tokenizer, as often as they do with a
  real model, and that time counts. smolagents has its own interpreter, because it is not among this project's
  dependencies: make a virtual environment with `pip install smolagents transformers jinja2`, and give its python.

Parts whose data or interpreter is not given are left out, and said so. Ends in one JSON line.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STEPS = 4  # calls of one task in the overhead's measurement
TASKS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("AGENTLAB_DATA"), help="folder with bfcl/")
    parser.add_argument("--experiment", type=Path, default=Path("experiments/demo.yaml"), help="whose champion")
    parser.add_argument("--cases", type=int, default=0, help="BFCL cases of each kind (default: all)")
    parser.add_argument("--items", type=int, default=40, help="toolcalls items (default: %(default)s)")
    parser.add_argument("--smolagents", type=Path, help="python of an environment with smolagents")
    parser.add_argument("--parts", default="bfcl,toolcalls,overhead", help="default: %(default)s")
    parser.add_argument("--smolagents-job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smolagents_job:
        print(json.dumps(smolagents_overhead(options.smolagents_job)))
        return
    parts = options.parts.split(",")
    result: dict[str, Any] = {"benchmark": "agent"}
    if "bfcl" in parts:
        if options.data is None:
            print("BFCL: left out, give the shared data's folder with --data or in AGENTLAB_DATA")
        else:
            result["bfcl"] = bfcl(options.data / "bfcl", options.cases)
    if "toolcalls" in parts:
        result["toolcalls"] = toolcalls(options.experiment, options.items)
    if "overhead" in parts:
        result["overhead"] = overhead(options.smolagents)
    print(json.dumps(result))


# -- BFCL -------------------------------------------------------------------------------------------------------------


def bfcl(folder: Path, cases: int) -> dict[str, Any]:
    """Shares of valid, right and rightly left-out calls of the base model."""
    from agentlab.agent import Agent, Options, from_definition
    from agentlab.tasks import Item
    from agentlab.tasks.checkers import make_checker
    from agentlab.tasks.public import from_bfcl

    _, pools = from_bfcl(folder)
    rows = pools["train"]
    simple = [row for row in rows if row["answer"] is not None][: cases or None]
    irrelevant = [row for row in rows if row["answer"] is None][: cases or None]
    check = make_checker("tool_call", [], 0.0, None)
    counted = {"required": [0, 0, 0], "auto": [0, 0, 0], "irrelevant": [0, 0, 0]}
    with base_chain() as chain:
        for kind, choice, some in (
            ("required", "required", simple), ("irrelevant", "auto", irrelevant), ("auto", "auto", simple),
        ):  # fmt: skip
            for number, row in enumerate(some):
                tools = [from_definition(tool, lambda **_: "done") for tool in row["tools"]]
                options = Options(max_steps=2, max_new_tokens=128 if choice == "required" else 64, tool_choice=choice)
                agent = Agent(chain, tools, builtin_tools=False, options=options)
                outcome = first_outcome(agent, row["messages"][-1]["content"])
                valid, called, text = outcome
                item = Item(row["id"], row["messages"], row["answer"], tools=row["tools"])
                counted[kind][0] += valid
                counted[kind][1] += called
                counted[kind][2] += check(item.answer, text, item) if called else item.answer is None
                if number % 50 == 49 or number + 1 == len(some):
                    valid_so_far, called_so_far, right_so_far = counted[kind]
                    print(
                        f"  {kind}: {number + 1} of {len(some)}, {valid_so_far} valid, {called_so_far} called, "
                        f"{right_so_far:.0f} right",
                        flush=True,
                    )
    n, m = max(len(simple), 1), max(len(irrelevant), 1)
    shares = {
        "simple_cases": len(simple),
        "required_valid": counted["required"][0] / n,
        "required_right": counted["required"][2] / n,
        "auto_valid": counted["auto"][0] / n,
        "auto_called": counted["auto"][1] / n,
        "auto_right": counted["auto"][2] / n,
        "irrelevant_cases": len(irrelevant),
        "irrelevant_valid": counted["irrelevant"][0] / m,
        "rightly_nothing_called": counted["irrelevant"][2] / m,
    }
    print(
        f"BFCL simple, call demanded: {shares['required_valid']:.1%} valid, {shares['required_right']:.1%} right; "
        f"call optional: {shares['auto_valid']:.1%} valid, {shares['auto_called']:.1%} called, "
        f"{shares['auto_right']:.1%} right; irrelevance: nothing called in {shares['rightly_nothing_called']:.1%}"
    )
    return shares


def first_outcome(agent: Any, task: str) -> tuple[bool, bool, str]:
    """(valid, called, the call as text) of an agent's first step; an answer in words is valid and no call."""
    with contextlib.closing(agent.run(task)) as steps:
        found = _outcome(agent, steps)
    with agent.chain.lock:  # what was left in the middle ends before the next case begins
        return found


def _outcome(agent: Any, steps: Any) -> tuple[bool, bool, str]:
    from agentlab.toolformat import render_call

    valid = True
    for step in steps:
        if step.kind == "rejected":
            valid = False
        if step.kind == "tool_called":
            return valid, True, render_call(step.name, step.arguments)
        if step.kind == "generated" and agent.options.tool_choice == "auto" and "<tool_call>" not in step.text:
            return valid, False, step.text
    return False, False, ""


def base_chain() -> Any:
    """The embedded base model alone."""
    from agentlab import models
    from agentlab.config import Settings
    from agentlab.inference import open_engine
    from agentlab.inference.chain import Chain, Link

    settings = Settings(name="benchmark")
    return Chain([Link("primary", models.EMBEDDED, lambda: open_engine(settings, models.resolve(models.EMBEDDED)))])


# -- toolcalls, end to end --------------------------------------------------------------------------------------------


def weather(city: str, days: int) -> str:
    return f"{city}, {days} days: {(len(city) * 7 + days) % 31} degrees"


def convert(amount: float, to: str) -> str:
    return f"{amount * 1.37:.2f} {to}"


def music(artist: str, order: str) -> str:
    return f"playing {artist}, order {order}, volume {30 + len(artist)}"


def light(room: str, on: bool) -> str:
    return f"the light in the {room} is {'on' if on else 'off'}"


FUNCTIONS: dict[str, Callable[..., str]] = {f.__name__: f for f in (weather, convert, music, light)}


def toolcalls(experiment: Path, count: int) -> dict[str, Any]:
    """End-to-end shares with intervals and calibration, champion and base."""
    from agentlab import Lab
    from agentlab.agent import from_definition
    from agentlab.agent.confidence import brier_score, expected_calibration_error
    from agentlab.evolution.stats import mean_interval

    lab = Lab.open_existing(experiment)
    tools = [from_definition(tool, FUNCTIONS[tool["name"]]) for tool in lab.suite.tools]
    items = lab.suite.split("gate")[:count]
    found: dict[str, Any] = {"items": len(items), "run": lab.run.id, "champion": lab.run.champion()}
    for who in dict.fromkeys(("champion", "base")):
        solved, confidences, seconds = [], [], []
        with lab.agent(who, tools=tools, remember=False, builtin_tools=False, options=None) as agent:
            for item in items:
                result = agent.ask(item.messages[-1]["content"])
                solved.append(float(is_solved(lab.suite, item, result, FUNCTIONS)))
                assert result.confidence_score is not None  # the engine here tells its log-probabilities
                confidences.append(result.confidence_score)
                seconds.append(result.processing_time)
        _, low, high = mean_interval(solved)
        found[who] = {
            "solved": statistics.fmean(solved),
            "solved_ci": [low, high],
            "brier": brier_score(confidences, solved),
            "ece": expected_calibration_error(confidences, solved),
            "confidence_mean": statistics.fmean(confidences),
            "latency_p50_s": statistics.median(seconds),
        }
        print(
            f"toolcalls end to end, {who}: {found[who]['solved']:.1%} ({low:.1%} to {high:.1%}) of {len(items)} gate "
            f"items solved; confidence Brier {found[who]['brier']:.3f}, ECE {found[who]['ece']:.3f}; "
            f"p50 {found[who]['latency_p50_s']:.2f} s",
            flush=True,
        )
    return found


def is_solved(suite: Any, item: Any, result: Any, functions: dict[str, Callable[..., str]]) -> bool:
    """Whether the accepted call was executed and the answer tells its result; or nothing was called, rightly."""
    from agentlab.toolformat import render_call

    calls = [step.action for step in result.reasoning_steps if step.action]
    if item.answer is None:
        return not calls and bool(result.final_answer)
    if len(calls) != 1 or suite.check(item, render_call(calls[0]["name"], calls[0]["arguments"])) < 1:
        return False
    returned = functions[calls[0]["name"]](**calls[0]["arguments"])
    # what the person cannot have known: the last number or the last word of the tool's result
    telling = re.findall(r"\d+\.?\d*", returned)[-1:] or returned.split()[-1:]
    return result.state == "answered" and all(
        re.search(rf"(?<![\w.]){re.escape(part)}(?!\w)", result.final_answer) for part in telling
    )


# -- overhead ---------------------------------------------------------------------------------------------------------


def written(step: int) -> str:
    """What the model is made to have written: STEPS calls, then the answer."""
    if step % (STEPS + 1) < STEPS:
        return json.dumps({"name": "add", "arguments": {"a": step, "b": 1}})
    return ""


def overhead(smolagents: Path | None) -> dict[str, Any]:
    """Median milliseconds a step costs beyond model and tool, here and in smolagents, and their ratio."""
    from agentlab import models

    tokenizer = models.resolve(models.EMBEDDED).folder
    ours, prompt_tokens = agentlab_overhead(tokenizer)
    found: dict[str, Any] = {"agentlab_ms": ours, "prompt_tokens": prompt_tokens, "python_tool_ms": python_tool()}
    print(f"the sandboxed python tool: {found['python_tool_ms']:.0f} ms for a whole call (at most 150)")
    print(f"overhead of the loop: {ours:.2f} ms a step, prompts of {prompt_tokens:.0f} tokens")
    if smolagents is None:
        print("smolagents: left out, give the python of an environment that has it with --smolagents")
        return found
    done = subprocess.run(
        [smolagents, __file__, "--smolagents-job", tokenizer],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    found |= {f"smolagents_{key}": value for key, value in theirs.items()} | {"ratio": ours / theirs["ms"]}
    print(
        f"smolagents {theirs['version']}: {theirs['ms']:.2f} ms a step, prompts of {theirs['prompt_tokens']:.0f} "
        f"tokens; ratio {found['ratio']:.2f} (at most 1)"
    )
    return found


def python_tool() -> float:
    """Median milliseconds of one call in a sandbox of its own."""
    from agentlab.agent.tools.sandbox import run_python

    times = []
    for _ in range(TASKS):
        began = time.perf_counter()
        assert run_python("1 + 1") == ("2", None)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


class Clock:
    """Counts the time inside model and tool."""

    def __init__(self) -> None:
        self.inside_s = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.inside_s += time.perf_counter() - self._began


def agentlab_overhead(tokenizer: Path) -> tuple[float, float]:
    """Median milliseconds a step, and the tokens of its prompt on average."""
    from transformers import AutoTokenizer

    from agentlab.agent import Agent, Options
    from agentlab.inference import Chunk, Completion
    from agentlab.inference.templates import TemplatedEngine
    from agentlab.models import ModelFiles

    clock = Clock()

    class Written(TemplatedEngine):
        """The embedded model's template and tokenizer; what the model writes costs nothing but the time it counts."""

        name, device, step = "written", "cpu", 0

        def __init__(self) -> None:
            self.model_files = ModelFiles("written", tokenizer, "")
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
            self.sizes: list[int] = []

        def stream(self, request: Any, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Chunk]:
            self.sizes.append(len(self._checked_prompt(request)))
            with clock:
                body = written(self.step)
                self.step += 1
                text = f"<tool_call>{body}</tool_call>" if body else "The sums are done."
                completion = Completion(text, list(range(20)), "stop", 100, 0.0, [-0.1] * 20)
            yield Chunk(text)
            yield Chunk("", completion)

        def cached_tokens(self, request: Any) -> int:
            self.encode(self.render(request.messages, request.tools))  # as the transformers engine does to find it
            return 0

        def _end_token_ids(self) -> set[int]:
            return {self.tokenizer.eos_token_id}

        def _vocabulary_size(self) -> int:
            return len(self.tokenizer)

        def context_length(self) -> int:
            return 8192

        def close(self) -> None: ...
        def load_adapter(self, adapter: str, folder: Path) -> None: ...
        def unload_adapter(self, adapter: str) -> None: ...
        def adapters(self) -> list[str]:
            return []

        def answers(self, requests: Any, *_: Any, **__: Any) -> Any:
            for index, request in enumerate(requests):
                yield index, [chunk.completion for chunk in self.stream(request)][-1]

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        with clock:
            return a + b

    from agentlab.inference.chain import Chain, Link

    engine = Written()
    agent = Agent(
        Chain([Link("primary", "written", lambda: engine)]), [add], builtin_tools=False, options=Options(max_steps=6)
    )
    agent.ask("Warm up.")
    times = []
    for _ in range(TASKS):
        clock.inside_s, began = 0.0, time.perf_counter()
        result = agent.ask("Add some numbers.")
        assert result.state == "answered"
        assert len(result.reasoning_steps) == STEPS + 1
        times.append((time.perf_counter() - began - clock.inside_s) / (STEPS + 1))
    return 1000 * statistics.median(times), statistics.fmean(engine.sizes)


def smolagents_overhead(folder: Path) -> dict[str, Any]:
    """The same calls through smolagents' ToolCallingAgent. Runs in its own interpreter."""
    import smolagents
    from smolagents import ChatMessage, MessageRole, Model, ToolCallingAgent, tool
    from smolagents.models import ChatMessageToolCall, ChatMessageToolCallFunction
    from smolagents.monitoring import LogLevel
    from transformers import AutoTokenizer

    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes: list[int] = []

    class Written(Model):  # type: ignore[misc]
        step = 0

        def generate(
            self, messages: Any, stop_sequences: Any = None, tools_to_call_from: Any = None, **more: Any
        ) -> Any:
            # what its own TransformersModel does before the model works
            asked = self._prepare_completion_kwargs(
                messages=messages, stop_sequences=stop_sequences, tools_to_call_from=tools_to_call_from,
                tool_choice=None, **more,
            )  # fmt: skip
            prompt = tokenizer.apply_chat_template(
                asked["messages"], tools=asked.get("tools"), add_generation_prompt=True, tokenize=True, return_dict=True
            )
            sizes.append(len(prompt["input_ids"]))
            with clock:
                body = written(self.step)
                self.step += 1
                call = (
                    json.loads(body)
                    if body
                    else {"name": "final_answer", "arguments": {"answer": "The sums are done."}}
                )
                function = ChatMessageToolCallFunction(name=call["name"], arguments=call["arguments"])
                calls = [ChatMessageToolCall(function=function, id=str(self.step), type="function")]
                return ChatMessage(role=MessageRole.ASSISTANT, content="", tool_calls=calls)

    @tool  # type: ignore[untyped-decorator]
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: One number.
            b: The other one.
        """
        with clock:
            return a + b

    agent = ToolCallingAgent(
        tools=[add], model=Written(flatten_messages_as_text=True), verbosity_level=LogLevel.OFF, max_steps=8
    )
    agent.run("Warm up.")
    times = []
    for _ in range(TASKS):
        clock.inside_s, began = 0.0, time.perf_counter()
        agent.run("Add some numbers.")
        times.append((time.perf_counter() - began - clock.inside_s) / (STEPS + 1))
    return {
        "ms": 1000 * statistics.median(times),
        "prompt_tokens": statistics.fmean(sizes),
        "version": smolagents.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
