"""The self-echo guard: what the memory said cannot come back to it as news.

An agent that recalls "the report is due on Friday" answers "You told me that the report is due on Friday", and storing
that would make the memory believe itself. From an agent or a tool, a sentence is an echo when its content words are in
one older memory; from the person, only when it repeats a recalled sentence word for word.
"""

import dataclasses

from agentlab.memory.core import Core
from agentlab.memory.records import MemoryItem
from agentlab.memory.words import overlap, sentences, signature, terms, tokens

_SAME = 0.8  # share of a sentence's content words that an older memory must have; a new name or number is news
_LOOKED_AT = 8
# words that only report or confirm that something is known; they do not make it news
_REPORTING = frozenset(
    terms(
        "told said says mentioned remember recall noted according memory earlier previously user understood okay ok "
        "sure certainly indeed right course see thanks correct"
    )
)
_NEGATIONS = frozenset(("not", "no", "never", "none", "cannot", "without", "nothing", "nobody"))


def guard(core: Core, item: MemoryItem) -> tuple[str | None, MemoryItem] | None:
    """None where nothing in `item` is an echo; else the echoed memory's id when all of it is, or None and the rest."""
    parts = sentences(item.content)
    heard = [_echoed(core, part, item) for part in parts]
    known = next((memory_id for memory_id in heard if memory_id is not None), None)
    if known is None:
        return None
    rest = [part for part, echoed in zip(parts, heard, strict=True) if echoed is None and _says_something(part)]
    if not rest:
        return known, item
    return None, dataclasses.replace(item, content=" ".join(rest))


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


def repeats(sentence: str, known: str) -> bool:
    """Whether `sentence` says nothing that `known` does not.

    Nearly all its content words are there, the missing ones are neither names nor numbers, and negation agrees.
    """
    said = [term for term in terms(sentence) if term not in _REPORTING]
    there = set(terms(known))
    if not said or overlap(said, there) < _SAME:
        return False
    names = {term for word in sentence.split()[1:] if word[:1].isupper() for term in terms(word)} - _REPORTING
    if any(term in names or any(char.isdigit() for char in term) for term in set(said) - there):
        return False
    return bool(_NEGATIONS & set(tokens(sentence))) == bool(_NEGATIONS & set(tokens(known)))


def _says_something(sentence: str) -> bool:
    return len({term for term in terms(sentence) if term not in _REPORTING}) > 1
