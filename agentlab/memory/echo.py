"""The self-echo guard: what the memory said cannot come back to it as news.

An agent that recalls "the report is due on Friday" answers "You told me that the report is due on Friday", and storing
that would make the memory believe itself. From an agent or a tool, a sentence is an echo when one older memory has all
that it says; from the person, only when it repeats a recalled sentence word for word.
"""

import dataclasses
import re
from collections.abc import Iterable

from agentlab.memory.core import Core
from agentlab.memory.records import MemoryItem
from agentlab.memory.words import forms, overlap, sentences, signature, terms, tokens

SAME = 0.8  # share of a sentence's content words that an older memory must have at least
_ASIDE = 3  # statements of fewer content words say nothing by themselves: "Cancelled!" is about the sentence before
_LOOKED_AT = 8
# words that only report or confirm that something is known; they do not make it news
_REPORTING = frozenset(
    terms(
        "told said says mentioned remember recall noted according memory earlier previously user understood okay ok "
        "sure certainly indeed right course see thanks correct hi hello hey actually apparently anyway absolutely "
        "exactly oh ah yeah yep"
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
# ways of saying what something is called, and whose it is; the name is what counts
_NAMING = (
    (re.compile(r"\b(?:is|are|was|were)\s+(?:called|named|the\s+names?\s+of)\b", re.IGNORECASE), "is"),
    (re.compile(r"(?:['’]s)?\s+names?\s+(?:is|are|was|were)\b", re.IGNORECASE), " is"),
    (re.compile(r"\bthe\s+names?\s+of\b", re.IGNORECASE), ""),
    (re.compile("(?:私|僕|俺|わたし|ぼく|あなた|ユーザー)(?:さん)?の"), ""),
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
# pairs that may span two words; each Han character is a term of its own, and a name in katakana is pairs of them
_PAIR_JA = re.compile("[\u3040-\u309fー]|.?[\u3005\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff].?(?<=..)")
_DENIAL_JA = re.compile(r"ません|な(?:い|かった|く)|(?<=[ぁ-ん])ず(?:に|、|。|$)")
# function words that no term tells of, one of which turns what a sentence says; "was" for "is" is how one reports
_OPPOSITES = (
    ("on", "off"), ("up", "down"), ("before", "after"), ("above", "below"), ("over", "under"), ("in", "out"),
    ("inside", "outside"), ("he", "she"), ("his", "her"), ("was", "will"), ("more", "less"), ("for", "against"),
    ("to", "from"), ("few", "most"), ("all", "some"), ("can", "could"),
)  # fmt: skip
# function words that both tellings of one fact have or neither
_TURNING = frozenset(
    "against from without by if will would could should might all some few most more less only".split()  # noqa: SIM905
)
# whom or what a telling is about: it may be left out ("the office" for "my office"), and is not another's
_WHOSE = frozenset(
    """
    i me my mine you your yours he him his she her hers we us our ours they them their theirs it its for with
    """.split()  # noqa: SIM905 - a list of thirty strings is unreadable
)
# words beside which it matters what stands before what
_RELATING = (
    {"than"}, {"from", "to"}, {"before"}, {"after"}, {"over"}, {"under"}, {"above"}, {"below"}, {"by"}, {"instead"},
    {"rather"},
)  # fmt: skip
_RELATING_JA = re.compile("より|から|まで|ではなく|じゃなく")
_NEGATIONS = frozenset(("not", "no", "never", "none", "cannot", "without", "nothing", "nobody"))


def guard(core: Core, item: MemoryItem) -> tuple[str | None, MemoryItem] | None:
    """None where nothing in `item` is an echo; else the echoed memory's id when all of it is, or None and the rest."""
    parts = sentences(item.content)
    heard = [_echoed(core, part, item) or _echoed_in_pieces(core, part, item) for part in parts]
    known = next((memory_id for memory_id in heard if memory_id is not None), None)
    if known is None:
        return None
    news = [part for part, echoed in zip(parts, heard, strict=True) if echoed is None]
    if item.source == "person" and 0 < _words_in(part for part in news if not is_question(part)) < _ASIDE:
        return None
    rest = [part for part in news if _says_something(part)]
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

    All its content words are there (of Japanese those in Han and katakana, most of hiragana), in an order that says the
    same, with numbers written alike, and negation agrees.
    """
    if not resembles(sentence, known):
        return False
    sentence, known = _comparable(sentence, known)
    there = set(terms(known))
    if any(term not in there and not _PAIR_JA.fullmatch(term) for term in content_words(sentence)):
        return False
    said, known_forms = forms(sentence), forms(known)
    if not all(found <= known_forms.get(word, set() if not word else found) for word, found in said.items()):
        return False
    relating = any(words <= set(tokens(text)) for words in _RELATING for text in (sentence, known))
    if relating or any(_RELATING_JA.search(text) for text in (sentence, known)):
        return len({tuple(order) for order in _orders(sentence, known)}) == 1
    return True


def resembles(sentence: str, known: str) -> bool:
    """Whether `sentence` may say what `known` does, in other words: most are the same, names and numbers among them."""
    sentence, known = _comparable(sentence, known)
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


def same_fact(one: str, other: str) -> bool:
    """Whether two texts that a person told say the same, so that one confirms the other.

    Both have the same content words, as many denials and nobody else's pronoun, and at most one part of them moved:
    "every morning I drink tea" confirms "I drink tea every morning"; "my sister called my brother" does not turn round.
    """
    if not (repeats(one, other) and repeats(other, one)):
        return False
    said, there = tokens(one), tokens(other)
    if _TURNING & (set(said) ^ set(there)):
        return False
    if _WHOSE & (set(said) - set(there)) and _WHOSE & (set(there) - set(said)):
        return False
    if sum(word in _NEGATIONS for word in said) != sum(word in _NEGATIONS for word in there):
        return False
    return _one_part_moved(*_orders(one, other))


def is_question(text: str) -> bool:
    """Whether a text asks, and tells nothing."""
    return text.rstrip().endswith(("?", "？", "؟"))


def names(text: str) -> list[str]:
    """The terms of `text` that name something: capitalised within a sentence, or with a digit."""
    capitals = {term for word in text.split()[1:] if word[:1].isupper() for term in terms(word)} - _REPORTING
    return [term for term in terms(text) if term in capitals or any(char.isnumeric() for char in term)]


def _comparable(sentence: str, known: str) -> tuple[str, str]:
    """Both without what only says where `sentence` is from, and with one way of saying what something is called."""
    sentence = unframed(sentence)
    for naming, short in _NAMING:
        sentence, known = naming.sub(short, sentence), naming.sub(short, known)
    return sentence, known


def _turned(sentence: str, known: str) -> bool:
    """Whether two texts of like words say the opposite: on for off, or what they name in another order."""
    said, there = set(tokens(sentence)), set(tokens(known))
    for one, other in _OPPOSITES:
        for here, yonder in ((one, other), (other, one)):
            if here in said - there and yonder in there - said:
                return True
    named = set(names(sentence)) | set(names(known))
    first, second = _orders(sentence, known)
    return [term for term in first if term in named] != [term for term in second if term in named]


def _orders(one: str, other: str) -> tuple[list[str], list[str]]:
    """The terms that both texts have, in the order of each."""
    found = [dict.fromkeys(term for term in terms(text) if len(term) > 1 or term.isascii()) for text in (one, other)]
    shared = found[0].keys() & found[1].keys()
    return [term for term in found[0] if term in shared], [term for term in found[1] if term in shared]


def _one_part_moved(one: list[str], other: list[str]) -> bool:
    """Whether two orders of the same terms are one, or differ by two neighbouring parts that changed places."""
    differ = [at for at, (here, there) in enumerate(zip(one, other, strict=True)) if here != there]
    if not differ:
        return True
    first, second = one[differ[0] : differ[-1] + 1], other[differ[0] : differ[-1] + 1]
    at = second.index(first[0])
    return second[at:] + second[:at] == first


def content_words(text: str) -> list[str]:
    """The terms of `text` that say what it is about."""
    return [term for term in terms(text) if term not in _REPORTING and term not in _GRAMMAR_JA]


def unframed(sentence: str) -> str:
    """`sentence` without what only says where the rest is from."""
    for frame in (_FRAME, _FRAME_BEFORE_JA, _FRAME_AFTER_JA):
        sentence = frame.sub("", sentence)
    return sentence


def _words_in(parts: Iterable[str]) -> float:
    """How many content words; of scripts without spaces three terms are about one."""
    found = {term for part in parts for term in terms(part)} - _REPORTING
    return sum(1 if term.isascii() else 1 / 3 for term in found)


def _says_something(sentence: str) -> bool:
    return len(set(terms(sentence)) - _REPORTING) > 1
