"""What a model's calls come to: each is checked, executed once, and known when it comes again."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from agentlab.agent.budget import Budget
from agentlab.agent.steps import Observed
from agentlab.agent.tools import Tool, as_untrusted, execute
from agentlab.toolformat import Call, validate


def usable(tools: Mapping[str, Tool], calls: Sequence[Call], allowed: bool) -> tuple[Call | None, list[str]]:
    """The first call if it can be executed as it is, else what is wrong with it. allowed: whether it may be one."""
    if not calls:
        return None, ["the answer is empty"]
    if not allowed:
        return None, ["a call, where only words can be used"]
    call = calls[0]
    if call.malformed:
        return None, [call.malformed]
    if call.name not in tools:
        return None, [f"unknown tool {call.name}; allowed: {', '.join(tools)}"]
    problems = validate(call, tools[call.name].definition)
    return (None, problems) if problems else (call, [])


@dataclasses.dataclass
class Acting:
    """The calls of one task."""

    tools: Mapping[str, Tool]
    budget: Budget

    def __post_init__(self) -> None:
        self._made: dict[str, Observed] = {}  # what came of each call, whichever model made it
        self._above: set[str] = set()  # the calls that the talk shows

    def begin(self) -> None:
        """A model takes over: its talk shows no calls, and what was done stays done."""
        self._above.clear()

    def act(self, number: int, call: Call) -> tuple[Observed, bool]:
        """What comes of a call, and whether the talk shows it already. Things are done once; what failed may be tried
        again.
        """
        mark = json.dumps([call.name, call.arguments], sort_keys=True, ensure_ascii=False)
        made = self._made.get(mark)
        known = made if made is not None and made.ok else None
        again = known is not None and mark in self._above
        self._above.add(mark)
        if again:
            text = "the result is above already"
            return Observed(
                step_number=number, name=call.name, text=text, ok=True, problem=None, truncated=False, seconds=0.0
            ), True
        if known is not None:  # another model of the chain asked for it before
            return dataclasses.replace(known, step_number=number, seconds=0.0), False
        self._made[mark] = seen = self._execute(number, call)
        return seen, False

    def _execute(self, number: int, call: Call) -> Observed:
        tool = self.tools[call.name]
        room_s = max(0.0, min(tool.timeout_s, self.budget.work_left_s))
        found = execute(tool, call.arguments, timeout_s=room_s, should_stop=self.budget.cancelled)
        return Observed(
            step_number=number,
            name=call.name,
            text=as_untrusted(found.text),
            ok=found.ok,
            problem=found.problem,
            truncated=found.truncated,
            seconds=found.seconds,
        )
