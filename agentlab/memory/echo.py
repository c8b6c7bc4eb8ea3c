"""The self-echo guard: what the memory said cannot come back to it as news.

An agent that recalls "the report is due on Friday" answers "You told me that the report is due on Friday", and storing
that would make the memory believe itself. From an agent or a tool, a sentence is an echo when its content words are in
one older memory; from the person, only when it repeats a recalled sentence word for word.
"""

import dataclasses
import re

from agentlab.memory.core import Core
from agentlab.memory.records import MemoryItem
from agentlab.memory.words import overlap, sentences, signature, terms, tokens

SAME = 0.8  # share of a sentence's content words that an older memory must have; a new name or number is news
_LOOKED_AT = 8
# words that only report or confirm that something is known; they do not make it news
_REPORTING = frozenset(
    terms(
        "told said says mentioned remember recall noted according memory earlier previously user understood okay ok "
        "sure certainly indeed right course see thanks correct hi hello hey"
    )
)
# what only says where the rest of a sentence is from; nothing else may stand in it
_TALK = r"(?:conversations?|chats?|talks?|discussions?|messages?|notes|memory|memories)"
_FRAME = re.compile(
    r"^(?:as you\s+(?:already\s+)?(?:know|said|mentioned|told me)(?:\s+(?:before|earlier))?\s*,\s*(?:that\s+)?|"
    rf"(?:based on|according to|from|as per)\s+(?:our|your|the|my)\s+(?:(?:previous|earlier|last|past)\s+)?{_TALK}"
    r"\s*,\s*(?:that\s+)?|you\s+(?:have\s+)?(?:asked|told|wanted)\s+me\s+to\s+"
    r"(?:keep in mind|bear in mind|remember|note|remind you)\s+(?:that\s+)?)",
    re.IGNORECASE,
)
# ways of saying what something is called; the name is what counts
_NAMING = (
    (re.compile(r"\b(?:is|are|was|were)\s+(?:called|named|the\s+names?\s+of)\b", re.IGNORECASE), "is"),
    (re.compile(r"(?:['’]s)?\s+names?\s+(?:is|are|was|were)\b", re.IGNORECASE), " is"),
)
# where one sentence may be two; a piece counts as one of its own only with a verb that shows it
_CLAUSES = re.compile(r"\s*;\s*|\s*,?\s+(?:and|but)\s+", re.IGNORECASE)
_VERBS = frozenset("is are was were am has have had will can does do did".split())  # noqa: SIM905
_FRAME_BEFORE_JA = re.compile(r"^(?:あなた|ユーザー)(?:は|が)[、,]?|^(?:以前|前に|先ほど|さっき)[、,]?")
_FRAME_AFTER_JA = re.compile(
    r"(?:だ|である|です|ます)?と(?:(?:私に)?(?:言|おっしゃ|仰|話し|教え|伝え)[ぁ-ん]*|のこと(?:です|でした))[。！]?$"
)
# endings, particles and phrases of politeness carry no content; other words in hiragana may be names
_GRAMMAR_JA = frozenset(
    part
    for phrase in """
        でしたか ましたか ませんでした でしょうか という といいます こと もの から まで には では とは ので のは のが
        のを します しています されました られて ください あります います なかった ない ように そう これ それ この
        その はい いいえ わかりました ありがとうございます です ますね ですよ ですね
    """.split()  # noqa: SIM905 - a list of forty strings is unreadable
    for part in (phrase, *(phrase[i : i + 2] for i in range(len(phrase) - 1)))
)
_DENIAL_JA = re.compile(r"ません|な(?:い|かった|く)|(?<=[ぁ-ん])ず(?:に|、|。|$)")
# function words that no term tells of, one of which turns what a sentence says; "was" for "is" is how one reports
_OPPOSITES = (
    ("on", "off"), ("up", "down"), ("before", "after"), ("above", "below"), ("over", "under"), ("in", "out"),
    ("inside", "outside"), ("he", "she"), ("his", "her"), ("was", "will"), ("more", "less"),
)  # fmt: skip
_NEGATIONS = frozenset(("not", "no", "never", "none", "cannot", "without", "nothing", "nobody"))


def guard(core: Core, item: MemoryItem) -> tuple[str | None, MemoryItem] | None:
    """None where nothing in `item` is an echo; else the echoed memory's id when all of it is, or None and the rest."""
    parts = sentences(item.content)
    heard = [_echoed(core, part, item) or _echoed_in_pieces(core, part, item) for part in parts]
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


def _echoed_in_pieces(core: Core, sentence: str, item: MemoryItem) -> str | None:
    """The id of the first memory of several that an agent's or tool's sentence joins, where they say all of it."""
    pieces = _CLAUSES.split(unframed(sentence))
    if item.source == "person" or len(pieces) < 2 or not all(_VERBS & set(tokens(piece)) for piece in pieces):
        return None
    heard = [_echoed(core, piece, item) for piece in pieces]
    return heard[0] if None not in heard else None


def repeats(sentence: str, known: str) -> bool:
    """Whether `sentence` says nothing that `known` does not.

    Nearly all its content words are there, the missing ones are neither names nor numbers, and negation agrees.
    """
    sentence = unframed(sentence)
    for naming, short in _NAMING:
        sentence, known = naming.sub(short, sentence), naming.sub(short, known)
    said = content_words(sentence)
    there = set(terms(known))
    if not said or overlap(said, there) < SAME:
        return False
    if set(names(sentence)) & (set(said) - there):
        return False
    if _turned(sentence, known):
        return False
    if len(_DENIAL_JA.findall(sentence)) != len(_DENIAL_JA.findall(known)):
        return False
    return bool(_NEGATIONS & set(tokens(sentence))) == bool(_NEGATIONS & set(tokens(known)))


def names(text: str) -> list[str]:
    """The terms of `text` that name something: capitalised within a sentence, or with a digit."""
    capitals = {term for word in text.split()[1:] if word[:1].isupper() for term in terms(word)} - _REPORTING
    return [term for term in terms(text) if term in capitals or any(char.isnumeric() for char in term)]


def _turned(sentence: str, known: str) -> bool:
    """Whether two texts of like words say the opposite: on for off, or what they name in another order."""
    said, there = set(tokens(sentence)), set(tokens(known))
    for one, other in _OPPOSITES:
        for here, yonder in ((one, other), (other, one)):
            if here in said - there and yonder in there - said:
                return True
    both = set(names(sentence)) | set(names(known))
    orders = []
    for text in (sentence, known):
        found = dict.fromkeys(term for term in terms(text) if term in both)
        orders.append(list(found))
    shared = set(orders[0]) & set(orders[1])
    return [term for term in orders[0] if term in shared] != [term for term in orders[1] if term in shared]


def content_words(text: str) -> list[str]:
    """The terms of `text` that say what it is about."""
    return [term for term in terms(text) if term not in _REPORTING and term not in _GRAMMAR_JA]


def unframed(sentence: str) -> str:
    """`sentence` without what only says where the rest is from."""
    for frame in (_FRAME, _FRAME_BEFORE_JA, _FRAME_AFTER_JA):
        sentence = frame.sub("", sentence)
    return sentence


def _says_something(sentence: str) -> bool:
    return len(set(terms(sentence)) - _REPORTING) > 1
