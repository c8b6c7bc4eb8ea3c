"""The self-echo guard: what the memory said cannot come back to it as news.

An agent that recalls "the report is due on Friday" answers "You told me that the report is due on Friday", and storing
that would make the memory believe itself. From an agent or a tool, a sentence is an echo when one older memory says all
of it (`saying.repeats`); from the person, only when it repeats a recalled sentence word for word. An echo is left out
where the sentences beside it can stand without it, and kept where they are about it.
"""

import dataclasses
import re

from agentlab.memory.core import Core
from agentlab.memory.records import MemoryItem
from agentlab.memory.saying import BEING, CLAUSES, REPORTING, is_question, repeats, unframed
from agentlab.memory.words import STOP_WORDS, sentences, signature, terms, tokens

_ASIDE = 3  # a statement of fewer content words is about the sentence before: "Cancelled!"
_LOOKED_AT = 8
# a piece of a sentence counts as one of its own only with a verb that shows it
_VERBS = BEING | {"will", "can"}
# what points to the sentence before
_POINTING = frozenset(
    "it its this that these those he she they him her them his their there then so".split()  # noqa: SIM905
)
_POINTING_JA = re.compile("これ|それ|あれ|この|その|彼|もう")
# what is said out of politeness
_POLITE = REPORTING | frozenset(
    terms("great good nice glad happy enjoy welcome pleasure perfect wonderful cool awesome sounds hope helps sorry")
)


def guard(core: Core, item: MemoryItem) -> tuple[str | None, MemoryItem] | None:
    """None where nothing in `item` is an echo; else the echoed memory's id when all of it is, or None and the rest."""
    parts = sentences(item.content)
    heard = [_echoed(core, part, item) or _echoed_in_pieces(core, part, item) for part in parts]
    known = next((memory_id for memory_id in heard if memory_id is not None), None)
    if known is None:
        return None
    beside = [part for part, echoed in zip(parts, heard, strict=True) if echoed is None]
    news = [part for part in beside if set(terms(part)) - _POLITE - STOP_WORDS]
    if not news:
        return known, item
    if any(_needs_the_echo(part, item) for part in news):
        return None
    return None, dataclasses.replace(item, content=" ".join(news))


def _echoed(core: Core, sentence: str, item: MemoryItem) -> str | None:
    """The id of the memory that `sentence` repeats."""
    mark = signature(sentence)
    with core.view() as index:
        if item.source == "person":
            row = core.recalled().get(mark)
            rows = [] if row is None else [row]
        else:
            rows = index.wordings(terms(sentence), _LOOKED_AT)
        memories = core.store.items_of(rows)
    for row in rows:
        memory = memories.get(row)
        if memory is None:
            continue
        if item.source == "person":
            # the person telling a whole memory again is a validation, and counted as one when it merges
            told_again = memory.memory_type == item.memory_type and signature(item.content) == signature(memory.content)
            return None if told_again else memory.memory_id
        if repeats(sentence, memory.content):
            return memory.memory_id
    return None


def _echoed_in_pieces(core: Core, sentence: str, item: MemoryItem) -> str | None:
    """The id of the first memory of several that an agent's or tool's sentence joins, where they say all of it."""
    if item.source == "person":
        return None
    pieces = CLAUSES.split(unframed(" ".join(sentence.split())))
    if len(pieces) < 2 or not all(_VERBS & set(tokens(piece)) for piece in pieces):
        return None
    heard = [_echoed(core, piece, item) for piece in pieces]
    return heard[0] if None not in heard else None


def _needs_the_echo(sentence: str, item: MemoryItem) -> bool:
    """Whether a sentence beside an echo says what is new of it.

    Of a person each statement may; of agents and tools one that points back, or is too short to stand alone.
    """
    if is_question(sentence):
        return False
    if item.source == "person":
        return True
    # of scripts without spaces three terms are about one word
    size = sum(1 if term.isascii() else 1 / 3 for term in set(terms(sentence)) - REPORTING)
    return size < _ASIDE or bool(_POINTING & set(tokens(sentence)) or _POINTING_JA.search(sentence))
