"""The tools that come along: calculator, clock, machine, memory, Python."""

import dataclasses
import datetime
import time
import zoneinfo
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from agentlab.agent.tools import sandbox
from agentlab.agent.tools.arithmetic import calculate
from agentlab.agent.tools.definition import Tool, tool
from agentlab.errors import ToolError
from agentlab.hardware import monitor

if TYPE_CHECKING:
    from agentlab.memory import Memory

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MOST_HITS = 20
_HIT_CHARS = 300


def calculator() -> Tool:
    """A tool that evaluates arithmetic."""

    def calculator(expression: Annotated[str, "for example 17 % of 2340 or sqrt(2) * (3 + 4)"]) -> str:
        """Calculate an arithmetic expression."""
        return calculate(expression)

    return tool(calculator, timeout_s=5)


def now() -> Tool:
    """A tool that tells date, time, weekday and time zone."""

    def now(timezone: Annotated[str | None, "IANA name such as Asia/Tokyo; local time without it"] = None) -> str:
        """The current date, time, weekday and time zone."""
        try:
            moment = datetime.datetime.now().astimezone(zoneinfo.ZoneInfo(timezone) if timezone else None)
        except (KeyError, ValueError, OSError):
            raise ToolError(f"unknown time zone {timezone!r}; allowed: IANA names such as Europe/Berlin") from None
        day, offset = _WEEKDAYS[moment.weekday()], moment.strftime("%z")
        zone = timezone or moment.tzname() or "local time"
        return f"{moment:%Y-%m-%d %H:%M:%S}, {day}, {zone} (UTC{offset[:3]}:{offset[3:5]})"

    return tool(now, timeout_s=5)


def gpu_monitor() -> Tool:
    """A tool that tells what the GPUs and the memory of this machine are doing."""

    def gpu_monitor() -> str:
        """GPU load, temperature and memory, RAM and swap of this machine right now."""
        stats = monitor.memory_stats()
        lines = [_gpu_line(number, gpu) for number, gpu in enumerate(monitor.gpus())] or ["no GPU"]
        lines.append(f"RAM: {stats.cpu_used:.0f} of {stats.cpu_total:.0f} MB used, {stats.cpu_free:.0f} MB free")
        return "\n".join([*lines, f"swap: {stats.swap_used:.0f} MB used"])

    return tool(gpu_monitor, timeout_s=5)


def _gpu_line(number: int, gpu: monitor.Gpu) -> str:
    parts = []
    if gpu.memory_used_mb is not None and gpu.memory_total_mb is not None and gpu.memory_free_mb is not None:
        used, total, free = gpu.memory_used_mb, gpu.memory_total_mb, gpu.memory_free_mb
        parts.append(f"{used:.0f} of {total:.0f} MB used, {free:.0f} MB free")
    for value, unit in (
        (gpu.utilisation_percent, " % busy"),
        (gpu.temperature_c, " °C"),
        (gpu.power_w, " W"),
    ):
        if value is not None:
            parts.append(f"{value:.0f}{unit}")
    return f"GPU {number} ({gpu.name}): {', '.join(parts) or 'the driver reports nothing'}"


def memory_search(
    memory: "Memory", session_id: str | None = None, *, on_recalled: Callable[[list[str]], None] | None = None
) -> Tool:
    """A tool that recalls from `memory`, with `session_id` from that session only.

    on_recalled gets the ids of each search that found something, in the thread that runs the tool.
    """

    def memory_search(
        query: Annotated[str, "what to look for, in plain words"],
        k: Annotated[int, "how many results at most"] = 5,
    ) -> str:
        """Search what was remembered from earlier conversations."""
        hits = memory.recall(query, k=min(max(k, 1), _MOST_HITS), session_id=session_id)
        if not hits:
            return "nothing remembered matches"
        if on_recalled is not None:
            on_recalled([hit.memory_id for hit in hits])
        lines = []
        for hit in hits:
            told = datetime.datetime.fromtimestamp(hit.created_at).strftime("%Y-%m-%d")
            # of a long memory the part that matched
            part = " ".join(hit.content[hit.start : hit.end or None].split())
            lines.append(f"[{hit.memory_id}] {told}: {part[:_HIT_CHARS]}{'…' if len(part) > _HIT_CHARS else ''}")
        return "\n".join(lines)

    return tool(memory_search, timeout_s=30, max_output_chars=_MOST_HITS * (_HIT_CHARS + 60))


def remember(
    memory: "Memory", session_id: str | None = None, *, derived_from: Callable[[], Sequence[str]] = tuple,
    on_remembered: Callable[[str], None] = lambda memory_id: None,
) -> Tool:  # fmt: skip
    """A tool that stores in `memory`, marked as coming from the agent.

    derived_from: ids of what the agent was shown so far; those of them that share a word of substance with a note are
    its sources, and forgetting one takes the note along. on_remembered gets the id of each note that is new, in the
    thread that runs the tool.
    """

    from agentlab.memory.resembling import content_words

    def remember(text: Annotated[str, "one fact, in a sentence that makes sense on its own"]) -> str:
        """Remember something for later conversations."""
        moment = time.time()
        words = set(content_words(text))
        shown = [(one, memory.peek(one)) for one in derived_from()]
        sources = [one for one, item in shown if item is not None and words & set(content_words(item.content))]
        memory_id = memory.remember(
            text, memory_type="knowledge", session_id=session_id, source="agent", created_at=moment,
            derived_from=sources,
        )  # fmt: skip
        kept = memory.peek(memory_id)
        if kept is not None and kept.created_at == moment:  # else it repeats or merged with an older one
            on_remembered(memory_id)
        return f"remembered as [{memory_id}]"

    return tool(remember, timeout_s=30)


def python(limits: sandbox.Limits | None = None) -> Tool:
    """A tool that runs Python code in the sandbox; see `sandbox.run_python` for what the code can and cannot do."""
    allowed = limits or sandbox.Limits()

    def python(code: Annotated[str, "Python source; print results or end with an expression"]) -> str:
        """Run Python code (standard library only, no network, an empty folder) and see its output."""
        return sandbox.run_python(code, limits=allowed)[0]

    def run(
        arguments: Mapping[str, Any], *, timeout_s: float, should_stop: Callable[[], bool]
    ) -> tuple[str, str | None]:
        shorter = dataclasses.replace(allowed, timeout_s=min(allowed.timeout_s, timeout_s))
        return sandbox.run_python(arguments["code"], limits=shorter, should_stop=should_stop)

    plain = tool(python, timeout_s=allowed.timeout_s, max_output_chars=allowed.output_chars)
    return dataclasses.replace(plain, isolated=True, runner=run)
