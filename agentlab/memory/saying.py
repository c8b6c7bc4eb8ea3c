"""What a sentence says, as far as its words show it: whether another repeats it, confirms it, or resembles it.

Refusing news as an echo, or confirming a fact with its opposite, does harm; an echo or a confirmation that is missed
leaves one memory more. So two sentences say the same only where nothing shows that they do not.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from agentlab.memory.words import STOP_WORDS, forms, overlap, sentences, terms, tokens

SAME = 0.8  # share of a sentence's content words that another must have to resemble it

# words that only report or confirm that something is known; they say nothing of what
REPORTING = frozenset(
    terms(
        "told said says mentioned remember recall noted according memory earlier previously user understood okay ok "
        "sure certainly indeed right course see thanks correct hi hello hey actually apparently anyway absolutely "
        "exactly oh ah yeah yep"
    )
)
# what only says where the rest of a sentence is from; nothing else may stand in it
_TALK = r"(?:conversations?|chats?|talks?|discussions?|messages?|notes|memory|memories)"
_FRAME = re.compile(
    r"^(?:as you (?:already )?(?:know|said|mentioned|told me)(?: (?:before|earlier))? ?, ?(?:that )?|"
    rf"(?:based on|according to|from|as per) (?:our|your|the|my) (?:(?:previous|earlier|last|past) )?{_TALK} ?, ?"
    r"(?:that )?|you (?:have )?(?:asked|told|wanted) me to (?:keep in mind|bear in mind|remember|note|remind you) "
    r"(?:that )?|from what you (?:have )?(?:said|told me)(?: (?:before|earlier))? ?, ?|so |"
    r"it (?:looks|seems) (?:like|that) |(?:please )?(?:don['’]t forget|remember|note|keep in mind) (?:that )?|"
    r"i(?:['’]ll| will|['’]ve| have) (?:remember|note|keep in mind|saved|stored|noted|remembered)(?: that)? |"
    r"(?:yes|yeah|yep|sure|okay|ok|right|alright|understood|noted|got it|great|of course|certainly|absolutely|"
    r"as far as i know|(?:(?:as|just) )?a reminder|fact|well) ?(?:[,:;.!]| [-–—]) ?)",
    re.IGNORECASE,
)
_FRAMES = 4  # one within another
_FRAME_BEFORE_JA = re.compile(r"^(?:あなた|ユーザー)(?:は|が)[、,]?|^(?:以前|前に|先ほど|さっき)[、,]?")
_FRAME_AFTER_JA = re.compile(
    r"(?:だ|である|です|ます)?と(?:(?:私に)?(?:言|おっしゃ|仰|話し|教え|伝え)[ぁ-ん]*|のこと(?:です|でした))[。！]?$"
)
# ways of saying what something is called, and whose it is; the name is what counts
_NAMING = (
    (re.compile(r"(?:['’]s|\b(?:is|are|was|were)) (?:called|named|the names? of)\b", re.IGNORECASE), " is"),
    (re.compile(r"(?:['’]s)? names? (?:is|are|was|were)\b", re.IGNORECASE), " is"),
    (re.compile(r"\bthe names? of\b", re.IGNORECASE), ""),
    (re.compile("(?:私|僕|俺|わたし|ぼく|あなた|ユーザー)(?:さん)?の"), ""),
)
# where one sentence may be two
CLAUSES = re.compile(r" ?; ?| ?,? (?:and|but) ", re.IGNORECASE)

# function words, by what another one would change
_FILLING = frozenset(
    "a an the that this these those there it its also so just too very what which as well yes".split()  # noqa: SIM905
)
BEING = frozenset("is are am be being been was were has have had do does did having doing".split())  # noqa: SIM905
_SPEAKING = frozenset("i me my mine myself you your yours yourself we us our ours ourselves".split())  # noqa: SIM905
_OTHERS = {"he": "he", "him": "he", "his": "he", "she": "she", "her": "she", "hers": "she",
           "they": "they", "them": "they", "their": "they", "theirs": "they"}  # fmt: skip
_PLACING = frozenset(
    """
    about above after against at before behind below between by down during for from in into of off on onto out over
    through to under until up upon with without
    """.split()  # noqa: SIM905 - a list of thirty strings is unreadable
)
_SMALL = frozenset("at for in of on to".split())  # noqa: SIM905 - of these, one more says nothing new
_POSSIBLE = frozenset(
    """
    please would should could can may might must will shall if unless whether when whenever until while let
    """.split()  # noqa: SIM905 - a list of twenty strings is unreadable
)
_FUTURE = frozenset(("will", "shall"))
_TENSE = frozenset("was were had did to".split())  # noqa: SIM905 - "I have to sell the car"
_NEGATIONS = frozenset(("not", "no", "never", "none", "cannot", "without", "nothing", "nobody"))

# of Japanese: endings, particles and phrases of politeness carry no content; other words in hiragana may be names
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
_POSSIBLE_JA = re.compile("ください|下さい|ほしい|欲しい|たい|なら|たら|れば|かもしれ|でしょう|だろう|つもり|予定")
_PAST_JA = re.compile(r"(?:た|(?<=ん)だ)(?:よ|ね|の|ん|か)?[。！!]?$")
_ROLE_JA = re.compile(r"([\u30a0-\u30ff\u3400-\u4dbf\u4e00-\u9fff])(?:さん|くん|ちゃん|様)?([はがをにへ])")
# beside these it matters what stands first
_RELATING = (
    {"than"}, {"from", "to"}, {"before"}, {"after"}, {"over"}, {"under"}, {"above"}, {"below"}, {"by"}
)  # fmt: skip
_RELATING_JA = re.compile("より|から|まで|ではなく|じゃなく")


class Saying(NamedTuple):
    """A sentence, or a clause of one, taken apart.

    content: its content words in order; core: those that another has to have, all but pairs of Japanese that may span
    two words. small: its function words. people: others that pronouns stand for. possible: words by which it is a wish,
    a plan or a condition, of the whole sentence. roles: of Japanese, the particles by a word's last character.
    """

    words: tuple[str, ...]
    content: tuple[str, ...]
    core: frozenset[str]
    small: Counter[str]
    people: frozenset[str]
    possible: frozenset[str]
    denials: int
    forms: dict[str, set[str]]
    asks: bool
    past: bool  # in Japanese, where the last word shows it
    relates: bool  # whether it matters which word stands first
    roles: dict[str, set[str]]


def is_question(text: str) -> bool:
    """Whether a text asks, and tells nothing."""
    return text.rstrip().endswith(("?", "？", "؟"))


def repeats(sentence: str, known: str) -> bool:
    """Whether one sentence or clause of `known` says all that `sentence` does.

    That is: they begin with the same words, or their content words are the same, or the first of the other's, of which
    at most one part has moved. Numbers are written alike; both deny, wish or suppose, or neither does; nobody else is
    spoken of.
    """
    said = _saying(_plain(sentence))
    if not said.content:
        return False
    by_core, by_word = _sayings(known)
    having = min((by_word.get(word, []) for word in said.content), key=len)  # those with the rarest of its words
    return any(_says_all(said, there) for there in itertools.chain(by_core.get(said.core, ()), having))


def same_fact(one: str, other: str) -> bool:
    """Whether two texts that a person told say the same, so that one confirms the other.

    As `repeats`, both ways, and in the same tense: "every morning I drink tea" confirms "I drink tea every morning".
    """
    said, there = _saying(_plain(one)), _saying(_plain(other))
    if said.asks or there.asks or not said.content or said.core != there.core:
        return False
    if min(overlap(said.content, there.content), overlap(there.content, said.content)) < SAME:
        return False
    more, less = said.small - there.small, there.small - said.small
    if (more.keys() | less.keys()) & _TENSE or said.past != there.past:
        return False
    if not (_agree(said, there) and _agree(there, said) and _same_persons(said, there)):
        return False
    first, second = _orders(said, there)
    return first == second or (not (said.relates or there.relates) and _one_part_moved(first, second))


def _same_persons(said: Saying, there: Saying) -> bool:
    """Whether pronouns speak of the same: some may be missing ("the office" for "my office"), none be another's."""
    persons = [[word for word in saying.words if word in _SPEAKING or word in _OTHERS] for saying in (said, there)]
    if set(persons[0]) - set(persons[1]) and set(persons[1]) - set(persons[0]):
        return False
    return len(set(persons[0])) < 2 or persons[0] == persons[1]  # "my mother is her doctor", not "her mother is mine"


def resembles(sentence: str, known: str) -> bool:
    """Whether `sentence` may say what `known` does, in other words: most are the same, names and numbers among them."""
    sentence, known = _named(unframed(" ".join(sentence.split()))), _named(" ".join(known.split()))
    said = content_words(sentence)
    there = set(terms(known))
    if not said or overlap(said, there) < SAME:
        return False
    if set(names(sentence)) & (set(said) - there):
        return False
    named = set(names(sentence)) | set(names(known))
    one, other = _saying(sentence), _saying(known)
    if (one.small - other.small).keys() & _PLACING and (other.small - one.small).keys() & _PLACING:
        return False
    first, second = _orders(one, other)
    if [term for term in first if term in named] != [term for term in second if term in named]:
        return False
    if len(_DENIAL_JA.findall(sentence)) != len(_DENIAL_JA.findall(known)):
        return False
    return bool(_NEGATIONS & set(tokens(sentence))) == bool(_NEGATIONS & set(tokens(known)))


def names(text: str) -> list[str]:
    """The terms of `text` that name something: capitalised within a sentence, or with a digit."""
    capitals = {term for word in text.split()[1:] if word[:1].isupper() for term in terms(word)} - REPORTING
    return [term for term in terms(text) if term in capitals or any(char.isnumeric() for char in term)]


def content_words(text: str) -> list[str]:
    """The terms of `text` that say what it is about."""
    return [term for term in terms(text) if term not in REPORTING and term not in _GRAMMAR_JA]


def unframed(sentence: str) -> str:
    """`sentence` without what only says where the rest is from; of words with one space between."""
    for _ in range(_FRAMES):
        sentence = _FRAME.sub("", sentence)
    for frame in (_FRAME_BEFORE_JA, _FRAME_AFTER_JA):
        sentence = frame.sub("", sentence)
    return sentence


def _plain(sentence: str) -> str:
    """`sentence` with one space between words, unframed, with one way of saying what something is called."""
    return _named(unframed(" ".join(sentence.split())))


def _named(sentence: str) -> str:
    for naming, short in _NAMING:
        sentence = naming.sub(short, sentence)
    return sentence


@functools.lru_cache(maxsize=4096)
def _saying(sentence: str) -> Saying:
    words = tokens(sentence)
    content = tuple(term for term in content_words(sentence) if term not in _NEGATIONS and term not in STOP_WORDS)
    small = Counter(word for word in words if word in STOP_WORDS or word in _POSSIBLE)
    denials = sum(word in _NEGATIONS for word in words) + len(_DENIAL_JA.findall(sentence))
    roles: dict[str, set[str]] = {}
    for word, particle in _ROLE_JA.findall(sentence):
        roles.setdefault(word, set()).add(particle)
    return Saying(
        words=tuple(words),
        content=content,
        core=frozenset(term for term in content if not _PAIR_JA.fullmatch(term)),
        small=small,
        people=frozenset(_OTHERS[word] for word in small if word in _OTHERS),
        possible=frozenset(small.keys() & _POSSIBLE) | frozenset(_POSSIBLE_JA.findall(sentence)),
        denials=denials,
        forms=forms(sentence),
        asks=is_question(sentence),
        past=bool(_PAST_JA.search(sentence)),
        relates=denials > 0 or any(some <= small.keys() for some in _RELATING) or bool(_RELATING_JA.search(sentence)),
        roles=roles,
    )


@functools.lru_cache(maxsize=64)
def _sayings(known: str) -> tuple[dict[frozenset[str], list[Saying]], dict[str, list[Saying]]]:
    """What a text says, sentence by sentence and clause by clause: by the core of each, and by its content words."""
    by_core: dict[frozenset[str], list[Saying]] = {}
    by_word: dict[str, list[Saying]] = {}
    for sentence in map(_plain, sentences(known)):
        whole = _saying(sentence)
        clauses = CLAUSES.split(sentence)
        parts = [_saying(clause)._replace(possible=whole.possible, asks=whole.asks) for clause in clauses]
        for said in [whole, *(parts if len(parts) > 1 else [])]:
            by_core.setdefault(said.core, []).append(said)
            for word in dict.fromkeys(said.content):
                by_word.setdefault(word, []).append(said)
    return by_core, by_word


def _says_all(said: Saying, there: Saying) -> bool:
    """Whether `there` says all that `said` does."""
    if (there.asks and not said.asks) or not _agree(said, there):
        return False
    if len(said.core) > 1 and there.words[: len(said.words)] == said.words:
        return True
    if len(said.core) > 1 and _is_part(said, there):
        there = there._replace(core=said.core)
    if said.core != there.core or overlap(said.content, there.content) < SAME or said.past != there.past:
        return False
    first, second = _orders(said, there)
    if first == second:
        return True
    if said.relates or there.relates or _asks_for(said, there) or _asks_for(there, said):
        return False
    return _one_part_moved(first, second)


def _is_part(said: Saying, there: Saying) -> bool:
    """Whether `said` is what `there` begins with, or without a subject a part of it: "it is on the 5th of May"."""
    size = len(set(said.content))
    pointing = said.words[0] in ("it", "this", "that") and not said.small.keys() - _FILLING - BEING - _SMALL
    starts = range(len(there.content) - size + 1) if pointing else range(1)
    return any(set(there.content[at : at + size]) == set(said.content) for at in starts)


def _asks_for(one: Saying, other: Saying) -> bool:
    """Whether one tells to do what the other tells of: "cancel my flight", and "your flight is cancelled"."""
    begins = bool(one.content) and terms(one.words[0]) == [one.content[0]]
    return begins and not one.small.keys() & BEING and bool(other.small.keys() & BEING)


def _agree(said: Saying, there: Saying) -> bool:
    """Whether nothing but content shows that two sentences say something else."""
    # what is known to be so will be so, but what will be need not have been
    if (
        there.possible not in (said.possible, said.possible - _FUTURE)
        or said.denials != there.denials
        or said.people != there.people
    ):
        return False
    if not all(found <= there.forms.get(word, set() if not word else found) for word, found in said.forms.items()):
        return False
    if any(not (_role(there.roles[word]) & _role(found)) for word, found in said.roles.items() if word in there.roles):
        return False
    more, less = said.small - there.small, there.small - said.small
    if more.keys() - _FILLING - BEING - _SPEAKING - _OTHERS.keys() - _SMALL - _FUTURE:
        return False
    return not (more.keys() & _PLACING and less.keys() & _PLACING)


def _role(particles: set[str]) -> set[str]:
    return {"が" if particle == "は" else particle for particle in particles}


def _orders(one: Saying, other: Saying) -> tuple[list[str], list[str]]:
    """The content words that both have, in the order of each."""
    found = [
        dict.fromkeys(term for term in saying.content if len(term) > 1 or term.isascii()) for saying in (one, other)
    ]
    shared = found[0].keys() & found[1].keys()
    return [term for term in found[0] if term in shared], [term for term in found[1] if term in shared]


def _one_part_moved(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two orders of the same terms are one, or differ by two neighbouring parts that changed places."""
    differ = [at for at, (here, there) in enumerate(zip(one, other, strict=True)) if here != there]
    if not differ:
        return True
    first, second = list(one[differ[0] : differ[-1] + 1]), list(other[differ[0] : differ[-1] + 1])
    at = second.index(first[0])
    return second[at:] + second[:at] == first
