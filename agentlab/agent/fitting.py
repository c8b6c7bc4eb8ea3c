"""A talk cut to what a model can read, and can read and answer in the time that is left."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from agentlab.agent.formats import Format, Message
from agentlab.inference import Engine, Request

_SHORTEST_RESULT = 50  # characters of a tool's result that are always left


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The messages as the model is shown them. In tokens: their size, what of it need not be read again, and how many
    new ones there is time for.
    """

    shown: list[Message]
    size: int
    known: int
    room: int


def fitted(
    engine: Engine, form: Format, adapter: str | None, tools: list[dict[str, Any]], *, system: Sequence[Message],
    earlier: Sequence[Message], talk: Sequence[Message], wanted: int, enough: int, room_for: Callable[[int], int],
) -> Fitted:  # fmt: skip
    """The oldest turns are left out, then long results are halved, until `wanted` new tokens fit into the context.

    earlier: turns before the task; talk: the task and what came of it. enough: new tokens that no turn is left out for;
    room_for(tokens that have to be read): how many there is time to write. What cannot be cut any more comes back as
    it is.
    """
    earlier, talk = list(earlier), list(talk)
    context = engine.context_length()
    while True:
        shown = form.convert([*system, *earlier, *talk], tools)
        size = engine.count_tokens(shown, tools if form.native else None)
        known = engine.cached_tokens(Request(shown, adapter, tools=tools if form.native and tools else None))
        room = room_for(size - known)
        fits = size + min(wanted, context // 2) <= context
        if fits and (room >= min(wanted, enough) or not earlier):
            break
        if earlier:
            del earlier[: _first_turn(earlier)]
        elif not _shorten_result(talk):
            break
    return Fitted(shown, size, known, room)


def _first_turn(messages: Sequence[Message]) -> int:
    """How many messages the oldest turn has: what was asked and what was answered, or one of them alone."""
    later = (at for at, message in enumerate(messages) if at and message["role"] == "user")
    return next(later, len(messages))


def _shorten_result(talk: list[Message]) -> bool:
    """Halve the oldest of the long results in place; False where none is long."""
    for at, message in enumerate(talk):
        if message["role"] == "tool" and len(message["content"]) > 2 * _SHORTEST_RESULT:
            half = message["content"][: len(message["content"]) // 2].rstrip(" …")
            talk[at] = {**message, "content": f"{half} …"}
            return True
    return False
