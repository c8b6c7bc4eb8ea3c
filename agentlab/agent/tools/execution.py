"""One tool call → one observation, on time, whatever the tool does."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from agentlab.agent.tools.capture import captured
from agentlab.agent.tools.definition import Tool, call
from agentlab.agent.tools.process import POLL_S
from agentlab.agent.tools.rendering import BoundedText, bounded, describe_error, render, visible
from agentlab.errors import AgentlabError

Problem = Literal["timeout", "error", "cancelled"]


@dataclass(frozen=True)
class Observation:
    """What came of a call. `text` may contain anything; see `as_untrusted` before it goes into a prompt."""

    text: str
    ok: bool
    problem: Problem | None
    seconds: float
    truncated: bool = False


def execute(
    tool: Tool, arguments: Mapping[str, Any], *, timeout_s: float, should_stop: Callable[[], bool] = lambda: False
) -> Observation:
    """The observation of `tool` called with validated `arguments`. Never raises for what the tool does.

    It takes at most the smaller of `timeout_s` and the tool's own; should_stop is asked every 50 ms. A tool that is not
    isolated runs in a thread: at its timeout it is left behind, which the text says.
    """
    began = time.perf_counter()
    limit_s = min(tool.timeout_s, timeout_s)
    half = tool.max_output_chars // 2
    printed = BoundedText(half)
    problem: str | None
    if should_stop():
        text, problem = "cancelled before it began", "cancelled"
    elif not limit_s > 0:
        text, problem = "not run: no time was left", "timeout"
    else:
        try:
            if tool.runner is not None:
                text, problem = tool.runner(tool.convert(arguments), timeout_s=limit_s, should_stop=should_stop)
            elif tool.isolated:
                from agentlab.agent.tools.worker import run_isolated

                text, problem, printed = run_isolated(
                    tool, arguments, timeout_s=limit_s, should_stop=should_stop, printed_chars=half
                )
            else:
                text, problem = _in_thread(tool, arguments, limit_s, should_stop, printed)
        except Exception as error:
            text, problem = _error(error), "error"
    text, truncated = _composed(text, printed, tool.max_output_chars)
    return Observation(
        text=text,
        ok=problem is None,
        problem=cast(Problem | None, problem),
        seconds=time.perf_counter() - began,
        truncated=truncated,
    )


def _in_thread(
    tool: Tool, arguments: Mapping[str, Any], limit_s: float, should_stop: Callable[[], bool], printed: BoundedText
) -> tuple[str, str | None]:
    outcome: list[tuple[str, str | None]] = []
    done = threading.Event()

    def work() -> None:
        try:
            with captured(printed):
                # converted and rendered here, under the timeout: an argument's class and a repr can hang as well
                outcome.append((_result(call(tool.function, tool.convert(arguments))), None))
        except BaseException as error:
            with contextlib.suppress(BaseException):
                outcome.append((_error(error), "error"))
        finally:
            done.set()

    deadline = time.monotonic() + limit_s
    threading.Thread(target=work, name=f"tool {tool.name}", daemon=True).start()
    while not done.wait(max(0.0, min(POLL_S, deadline - time.monotonic()))):
        if should_stop():
            return "cancelled; the function may still be running in its thread", "cancelled"
        if time.monotonic() >= deadline:
            return f"timed out after {limit_s:g} s; the function may still be running in its thread", "timeout"
    return outcome[0] if outcome else ("the function ended without a result", "error")


def _result(value: Any) -> str:
    return "" if value is None else render(value)


def _error(error: BaseException) -> str:
    return str(error) if isinstance(error, AgentlabError) else describe_error(error)


def _composed(text: str, printed: BoundedText, limit: int) -> tuple[str, bool]:
    said = printed.text().rstrip("\n")
    if said and text:
        said = f"\nprinted: {said}"
    elif not said and not text:
        text = "done; nothing was returned or printed"
    shown, truncated = bounded(text, limit - len(said))
    return visible(shown + said), truncated or printed.truncated
