"""Isolated tools: one call in a fresh process that can be killed. Run there as `main`, used here as `run_isolated`."""

import contextlib
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from agentlab.agent.tools import process
from agentlab.agent.tools.definition import Tool, call, converted
from agentlab.agent.tools.rendering import BoundedText, bounded, describe_error, render
from agentlab.errors import AgentlabError, ToolError

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from agentlab.agent.tools.worker import main; main()"
_PR_SET_PDEATHSIG = 1


def check_sendable(tool: Tool) -> None:
    """Raise ToolError if the function cannot be sent to another process."""
    try:
        _packed(tool, {})
    except Exception as error:
        raise ToolError(
            f"tool {tool.name}: the function cannot be sent to a worker process ({describe_error(error)}); "
            "allowed with isolated=True: functions that hold no open files, locks or connections"
        ) from None


def _packed(tool: Tool, arguments: Mapping[str, Any]) -> bytes:
    import cloudpickle  # type: ignore[import-untyped]  # sends a notebook's functions by value, those of modules by name

    return bytes(cloudpickle.dumps((tool.function, dict(tool.hints), dict(arguments), tool.max_output_chars)))


def run_isolated(
    tool: Tool, arguments: Mapping[str, Any], *, timeout_s: float, should_stop: Callable[[], bool], printed_chars: int
) -> tuple[str, str | None, BoundedText]:
    """(text, problem, what was printed) of one call; the process and its group are gone when this returns.

    A program that it started in a session of its own is not of its group.
    The worker sends back text only, never a pickle: what a tool returns cannot run code here.
    """
    command = [sys.executable, "-c", _START, json.dumps(sys.path)]
    ended = process.run(
        command, _packed(tool, arguments), timeout_s=timeout_s, should_stop=should_stop, output_chars=printed_chars,
        result_pipe=True,
    )  # fmt: skip
    if ended.problem == "timeout":
        return f"timed out after {timeout_s:g} s; the process was killed", "timeout", ended.output
    if ended.problem is not None:
        return "cancelled; the process was killed", "cancelled", ended.output
    try:
        answer = json.loads(ended.result)
        return str(answer["text"]), None if answer["ok"] else "error", ended.output
    except (ValueError, KeyError, TypeError):
        return f"no result: {process.describe_end(ended.exit_code or 0)}", "error", ended.output


def main() -> None:
    """The worker's side: unpickle the call from stdin, run it, write its text to the result pipe."""
    _die_with_parent()
    result_pipe = int(sys.argv[2])
    os.set_inheritable(result_pipe, False)
    limit = 2000
    try:
        function, hints, arguments, limit = pickle.loads(sys.stdin.buffer.read())
        sys.stdin = open(os.devnull)  # noqa: SIM115 - stays open as long as the process
        value = call(function, converted(arguments, hints))
        text, ok = "" if value is None else render(value), True
    except BaseException as error:
        text, ok = str(error) if isinstance(error, AgentlabError) else describe_error(error), False
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    # head and tail are chosen here: ten megabytes need not travel; twice the limit lets the reader count again
    text, _ = bounded(text, 2 * limit)
    with os.fdopen(result_pipe, "wb") as pipe:
        pipe.write(json.dumps({"text": text, "ok": ok}).encode())
    os._exit(0)  # threads that the tool left behind do not hold the answer back


def _die_with_parent() -> None:
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
