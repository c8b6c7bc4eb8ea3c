"""The self-echo guard: what the memory said cannot come back to it as news.

An agent that recalls "the report is due on Friday" answers "You told me that the report is due on Friday", and storing
that would make the memory believe itself. From an agent or a tool, a sentence is an echo when an older memory says just
that (`saying.repeats`); from the person, only when it repeats a recalled sentence word for word. An echo is left out
where the sentences beside it can stand without it, and kept where they are about it.
"""

import dataclasses
import re
from collections.abc import Sequence

from agentlab.memory.core import Core
from agentlab.memory.records import MemoryItem
from agentlab.memory.resembling import REPORTING
from agentlab.memory.saying import is_question, pieces, repeats, unframed
from agentlab.memory.words import STOP_WORDS, sentences, signature, terms, tokens

_ASIDE = 3  # a statement of fewer content words is about the sentence before: "Cancelled!"
_LOOKED_AT = 8
_MOST_SENTENCES = 200  # what goes on longer is a document, and looked at as far as this
_LONGEST = 1_000  # characters of a sentence that is looked at
_LABEL = re.compile(r"\W{0,20}(?:\d{1,3}|[A-Za-z])?\W{0,20}|[^:]{0,100}:\W{0,20}")  # "1.", "Here is what I know:"
_LIMITING = re.compile(r"(?:but|except|unless|however|instead|otherwise|only|not|no)\b", re.IGNORECASE)
# what points to the sentence before
_POINTING = frozenset(
    "it its this that these those he she they him her them his their there then so".split()  # noqa: SIM905
)
_POINTING_JA = re.compile("これ|それ|あれ|この|その|彼|もう")
# what is said out of politeness
_POLITE = REPORTING | frozenset(
    terms(
        "great good nice glad happy enjoy welcome pleasure perfect wonderful cool awesome sounds hope helps sorry day "
        "know need anything else question ask morning evening"
    )
)
_COURTESIES_JA = re.compile(
    "(?:覚えています|もちろん(?:です)?|はい|わかりました|承知しました|ありがとうございます)[。！]?"
)


def guard(core: Core, item: MemoryItem) -> tuple[str | None, MemoryItem] | None:
    """None where nothing in `item` is an echo; else the echoed memory's id when all of it is, or None and the rest."""
    parts = sentences(item.content)
    distinct = [part for part in dict.fromkeys(parts) if len(part) <= _LONGEST]
    heard = _heard(core, distinct[:_MOST_SENTENCES], item)
    known = next((memory_id for memory_id in heard.values() if memory_id is not None), None)
    if known is None:
        return None
    if any(heard.get(part) is not None and part[0].islower() for part in parts[1:]):
        return None  # cut at an abbreviation: "8 a.m. on Friday"
    news = [part for part in parts if heard.get(part) is None and _is_news(part, item)]
    if not news:
        return known, item
    if any(_needs_the_echo(part, item) for part in news):
        return None
    return None, dataclasses.replace(item, content=" ".join(news))


def _heard(core: Core, parts: Sequence[str], item: MemoryItem) -> dict[str, str | None]:
    """The id of the memory that each sentence repeats, None where it repeats none."""
    if item.source == "person":
        return _repeated(core, parts, item)
    found = {}
    for part in parts:
        known = _echoed(core, part)
        if known is None and len(joined := pieces(unframed(part))) > 1:
            several = [_echoed(core, piece) for piece in joined]
            known = several[0] if None not in several else None
        found[part] = known
    return found


def _repeated(core: Core, parts: Sequence[str], item: MemoryItem) -> dict[str, str | None]:
    """Of sentences that the person tells: the recalled memory of which each is a sentence, word for word.

    The person telling a whole memory again is a validation, and counted as one when it merges.
    """
    told = signature(item.content)
    with core.view():
        rows = {part: row for part in parts if (row := core.recalled().get(signature(part))) is not None}
        memories = core.store.items_of(rows.values())
    found: dict[str, str | None] = {}
    for part, row in rows.items():
        memory = memories.get(row)
        again = memory is None or signature(memory.content) == told
        found[part] = None if again or memory is None else memory.memory_id
    return found


def _echoed(core: Core, sentence: str) -> str | None:
    """The id of the memory that an agent's or a tool's sentence repeats."""
    with core.view() as index:
        memories = core.store.items_of(index.wordings(terms(sentence), _LOOKED_AT))
    return next((memory.memory_id for memory in memories.values() if repeats(sentence, memory.content)), None)


def _is_news(sentence: str, item: MemoryItem) -> bool:
    """Whether a sentence beside an echo says anything: an agent's questions, courtesies and labels do not."""
    if item.source != "person" and (is_question(sentence) or _LABEL.fullmatch(sentence)):
        return False
    return bool(set(terms(sentence)) - _POLITE - STOP_WORDS) and not _COURTESIES_JA.fullmatch(sentence)


def _needs_the_echo(sentence: str, item: MemoryItem) -> bool:
    """Whether a sentence beside an echo says what is new of it.

    Of a person each statement may; of agents and tools one that points back, or is too short to stand alone.
    """
    if item.source == "person":
        return not is_question(sentence)
    if sentence[0].islower() or sentence[0].isdigit() or _LIMITING.match(sentence):
        return True  # cut at an abbreviation, or an exception
    # of scripts without spaces three terms are about one word
    size = sum(1 if term.isascii() else 1 / 3 for term in set(terms(sentence)) - REPORTING)
    return size < _ASIDE or bool(_POINTING & set(tokens(sentence)) or _POINTING_JA.search(sentence))
