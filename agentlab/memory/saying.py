"""Whether two sentences say the same: word for word, but for the ways in which an agent repeats what it was told.

Refusing news as an echo, or confirming a fact with its opposite, does harm; an echo or a confirmation that is missed
leaves one memory more. One other word, number, sign or order can make another statement, so words are compared as they
are written and in their order (`words.written`: but for case and punctuation that says nothing). What else may differ
is a list, and all of it is here: a frame ("You told me that"), who speaks to whom ("your" for "my"), articles, the
verb's person, ways of naming, and where a part stands that begins with a preposition ("Every morning I drink tea").
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from agentlab.memory.words import cased, plain, sentences, written

Words = tuple[str, ...]

_TALK = r"(?:conversations?|chats?|talks?|discussions?|messages?|notes|memory|memories|records)"
_WHEN = r"(?:(?:also|already|just|previously|earlier|before|once) )?"
_BEFORE = r"(?: (?:before|earlier|to me))?"
_KEEP = r"(?:remember|note|keep in mind|bear in mind)"
# what only says where the rest of a sentence is from
_FRAMES = (
    rf"as you {_WHEN}(?:know|said|mentioned|told me){_BEFORE} ?, ?(?:that )?",
    r"as (?:we|i) (?:discussed|mentioned) ?, ?",
    rf"(?:based on|according to|from|as per) (?:our|your|the|my) (?:(?:previous|earlier|last|past) )?{_TALK} ?[,:] ?",
    r"(?:based on|according to|from) (?:(?:what|the information) you (?:have )?(?:said|provided|shared|gave me|told me)"
    rf"{_BEFORE}|the information provided) ?, ?",
    rf"(?:i (?:think|believe) )?you(?: have|['’]ve| had)? {_WHEN}(?:said|mentioned|told me){_BEFORE}(?: that|:)? ",
    rf"you (?:have |had )?{_WHEN}(?:asked|told|wanted) me to (?:{_KEEP}|remind you)(?: that|:)? ",
    rf"(?:i )?found in (?:my|our|the) {_TALK}(?: that)? ",
    r"if i (?:recall|remember) (?:correctly|rightly) ?, ",
    r"i (?:recall|remember)(?: correctly)?(?: ?,| that| you telling me(?: that)?) ",
    r"(?:(?:i|we) (?:know|understand|see)|did you know) that ",
    r"as an ai(?: (?:assistant|model|language model))? ?, ?",
    r"the answer(?: to your question)? is(?: that| ?:) ",
    rf"(?:please )?(?:don['’]t forget|{_KEEP})(?: that|:)? ",
    r"(?:this is |here['’]s )?(?:(?:as|just) )?(?:a )?(?:quick |friendly )?reminder ?[:,] ?",
    rf"i(?:['’]ll| will|['’]ve| have) (?:saved|stored|noted|remembered|{_KEEP})(?: that)? ",
    r"so ",
    r"(?:yes|yeah|yep|sure|okay|ok|right|alright|understood|noted|got it|great|of course|certainly|absolutely|well|"
    r"as far as i (?:know|remember|recall)|just to confirm|fact|memory|observation|(?:final )?answer|"
    r"quick recap|memory_search(?: returned)?) ?(?:[,:;.!]| [-–—]) ?",
    r"[-*•>] +|・|\d+[.)] |<answer>|[\"“”'‘’「『`]+",
    r"\[(?:[mk]-\w+|\d?\.\d+)\] (?:\d{4}-\d\d-\d\d: )?",  # as memory_search says it
)
_FRAME = re.compile("|".join(f"^(?:{frame})" for frame in _FRAMES), re.IGNORECASE)
# and what a person says around a fact
_ASKING = re.compile(
    rf"^(?:(?:please )?(?:don['’]t forget|{_KEEP})(?: that|:)? |(?:by the way|btw|as i said|actually|well|so) ?, )",
    re.IGNORECASE,
)
_MOST_FRAMES = 6  # one within another
_ASKED_BACK = re.compile(r"(?: ?, ?(?:right|correct|isn['’]t it))?[?？]$", re.IGNORECASE)
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(?=\w)([^*]{1,200}(?<=[\w.!?:]))\1(?![\w*])")
_AFTER = "\"”’'」』*` 🙂😊😀😃😄😁👍🎉✨"  # what may stand behind a sentence and says nothing
_REPORTED = re.compile(r"\b(?:told|said|mentioned|asked|telling)\b", re.IGNORECASE)
_FRAME_BEFORE_JA = re.compile(
    r"^(?:(?:はい|ええ|もちろん(?:です)?|わかりました|承知しました)[、。！,]+)?(?:記憶によると[、,]?)?"
    r"(?:(?:あなた|ユーザー)(?:は|が)[、,]?(?=.*(?:言|おっしゃ|仰|話し|教え|伝え)))?(?:(?:以前|前に|先ほど|さっき)[、,]?)?"
)
_FRAME_AFTER_JA = re.compile(
    r"(?:だ|である|です|ます)?と(?:(?:私に)?(?:言|おっしゃ|仰|話し|教え|伝え)"
    r"(?:て|って|い|れて|てくれ|てい|ってい)?(?:まし)?(?:た|った)|のこと(?:です|でした))[。！]?$"
)
_LONGEST_FRAME = 60  # characters at the end; a pattern that ends there is tried from each of them
# ways of saying what something is called: before a name, which is what counts
_A_NAME = r"(?= (?-i:[\"“'‘«「]?[A-Z]|[^\x00-\x7f]))"
_NAMING = (
    (re.compile(rf"(?:['’]s|\b(?:is|are)) (?:(?:called|named){_A_NAME}|the names? of\b)", re.IGNORECASE), " is"),
    (re.compile(rf"(?:['’]s)? names? (?:is|are){_A_NAME}", re.IGNORECASE), " is"),
    (re.compile(rf"\bthe names? of\b(?=[^.?!]{{1,80}} (?:is|are){_A_NAME})", re.IGNORECASE), ""),
    (re.compile(rf"\bi have an? ([\w -]{{1,40}}?) (?:called|named){_A_NAME}", re.IGNORECASE), r"my \1 is"),
    (re.compile(rf"\byou have an? ([\w -]{{1,40}}?) (?:called|named){_A_NAME}", re.IGNORECASE), r"your \1 is"),
)
_SPEAKER_JA = "(?:私|僕|俺|わたし|ぼく)"
_OWNER_JA = re.compile(f"{_SPEAKER_JA}の")
_TOPIC_JA = re.compile(f"^{_SPEAKER_JA}[はが]")  # who speaks goes without saying
_TOLD_JA = re.compile("(?:あなた|ユーザー)(?:さん)?(?=[のはがもにを])")  # who told it, in an agent's words
# the same sentence, politely or not, with commas or without
_POLITE_JA = (
    (re.compile(r"(?<!\d)[、・]|[、・](?!\d)"), ""), (re.compile("(?<=[てで])います"), "いる"),
    (re.compile("(?:です|だ|である)?(?:よね|[よね])?[。！!]?$"), ""),
)  # fmt: skip
_WRITTEN_OUT = (
    (re.compile(r"\b(it|that|he|she|there|here|what|who|where|how)['’]s\b|(?<=\w)['’]s(?= an? )"), r"\1 is"),
    (re.compile(r"\b(?:have|['’]ve) got\b"), " have"),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\b([ap])\.m\b\.?"), r"\1m"),
    (re.compile(r"\bon (?=(?:mon|tues|wednes|thurs|fri|satur|sun)day\b)"), ""),
)
_USERS = re.compile(r"\bthe user['’]s\b", re.IGNORECASE)
_USER = re.compile(r"\bthe user (?P<adverb>\w+ly |always |never |often |also )?(?P<verb>\w+)", re.IGNORECASE)
_VERB_S = re.compile(r"(?:(?<=[a-z]{2}ch)|(?<=[a-z]{2}sh)|(?<=ss)|(?<=[oxz]))es$|(?<=[^siu])s$")
_UNSAID = frozenset(("the", "my"))
_AGREEING = {"an": "a", "am": "is", "were": "was", "has": "have", "does": "do",
             "me": "i", "us": "we", "our": "my"}  # fmt: skip
_SWAPPED = {"i": "you", "my": "your", "mine": "yours", "myself": "yourself", "we": "you",
            "you": "i", "your": "my", "yours": "mine", "yourself": "myself"}  # fmt: skip
_SAME_PERSON: Mapping[str, str] = MappingProxyType({})
_SHIFTED = {"was": "is", "had": "have", "would": "will", "could": "can"}  # as reported speech does: "said that it was"
# a part that begins with one of these says the same before and behind the rest
_MOVABLE = frozenset(
    """
    about after at because before by during every each for from if in near next last on since to today tomorrow tonight
    until when while with without yesterday monday tuesday wednesday thursday friday saturday sunday
    """.split()  # noqa: SIM905 - a list of thirty strings is unreadable
)
_DAYS = frozenset(
    "monday tuesday wednesday thursday friday saturday sunday today tomorrow yesterday".split()  # noqa: SIM905
)
_MOST_MOVED = 40  # words of a sentence whose parts are tried elsewhere
_MOST_PIECES = 8
_AND = re.compile(r" ?; ?| ?,? and ", re.IGNORECASE)
# what such a part has to have to be a sentence of its own, and what may not be in it nor in the one that it is part of
_SAYING = frozenset(("is", "are", "was", "have", "had", "will", "can", "do", "did"))
_HEDGES = frozenset(
    """
    ? all although assume assumes because believe believed believes both but claim claims could denied denies deny doubt
    doubts dreamed dreamt each either every except false fear guess heard hope hoped hopes if imagine imagined instead
    may maybe might neither never no nobody none nor not only or please pretend pretended rather said say says should
    suppose suspect suspects than that think thinks though thought told unless until when whether while wish without
    would
    """.split()  # noqa: SIM905 - a list of fifty strings is unreadable
)
_ASKS_JA = re.compile("(?:です|ます|ました|ません|でした|でしょう)か。?$")


def is_question(text: str) -> bool:
    """Whether a text asks, and tells nothing."""
    text = text.rstrip()
    return text.endswith(("?", "？", "؟")) or _ASKS_JA.search(text[-8:]) is not None


def repeats(sentence: str, known: str) -> bool:
    """Whether `sentence`, as an agent or a tool may put it, is one of the sentences of `known`, or a part that is one.

    Both as the same speaker would say it ("my rent"), and as one speaks to the other ("your rent").
    """
    return any(not _told(known).isdisjoint(_moved(reading)) for reading in _readings(sentence))


def same_fact(one: str, other: str) -> bool:
    """Whether two texts that one person told say the same, so that one confirms the other."""
    told = _words(_unasked(other))
    return bool(told) and not is_question(other) and told in _moved(_words(_unasked(one)))


def pieces(sentence: str) -> list[str]:
    """The sentences that `sentence` joins by "and" or a semicolon; itself alone where one of them could not stand."""
    found = _AND.split(" ".join(sentence.split()))
    if len(found) > _MOST_PIECES:
        return [sentence]
    words = [_words(piece) for piece in found]
    if any(_SAYING.isdisjoint(some) or not _HEDGES.isdisjoint(some) for some in words) or words[0][0] in _MOVABLE:
        return [sentence]
    return found


def unframed(sentence: str) -> str:
    """`sentence` without what only says where the rest is from, and with one space between words."""
    return _unframed(" ".join(sentence.split()))[1]


def named(sentence: str) -> str:
    """`sentence` with one way of saying what something is called."""
    for naming, short in _NAMING:
        sentence = naming.sub(short, sentence)
    return sentence


def _unframed(sentence: str) -> tuple[str, str]:
    """(frame, rest); of a sentence with one space between words."""
    rest, frame = _EMPHASIS.sub(r"\2", sentence), ""
    for _ in range(_MOST_FRAMES):
        if (found := _FRAME.match(rest)) is None:
            break
        frame, rest = frame + found.group(), rest[found.end() :]
    rest = _FRAME_BEFORE_JA.sub("", rest)
    rest = (rest[:-_LONGEST_FRAME] + _FRAME_AFTER_JA.sub("", rest[-_LONGEST_FRAME:])).removesuffix("</answer>")
    bare = rest.rstrip(_AFTER)
    if bare[-1:].isdigit() and rest[len(bare) :].startswith(("'", '"')):  # feet and inches
        bare = rest[: len(bare) + 1]
    return frame, bare or sentence


def _unasked(sentence: str) -> str:
    return _ASKING.sub("", " ".join(sentence.split()))


def _readings(sentence: str) -> Iterator[Words]:
    """What an agent's sentence says, word for word, or to the one who told it, or in reported speech."""
    frame, told = _unframed(" ".join(sentence.split()))
    told = _ASKED_BACK.sub("", told)  # what an agent asks is no news either
    for person in (_SAME_PERSON, _SWAPPED):
        yield (words := _words(_of_the_user(told), person))
        if _REPORTED.search(frame):
            yield tuple(_SHIFTED.get(word, word) for word in words)


def _of_the_user(sentence: str) -> str:
    """`sentence` with "I" for "the user", whose verbs then end as those do."""
    sentence = _TOLD_JA.sub("私", _USERS.sub("my", sentence))

    def spoken(found: re.Match[str]) -> str:
        verb = found["verb"] if found["verb"] in ("is", "was", "has", "does") else _VERB_S.sub("", found["verb"])
        return f"i {found['adverb'] or ''}{verb}"

    return _USER.sub(spoken, sentence)


@functools.lru_cache(maxsize=64)
def _told(known: str) -> frozenset[Words]:
    """The words of each sentence of a text, and of each part of one that could be a sentence."""
    found = []
    for sentence in sentences(known):
        for part in {sentence, _unasked(sentence), unframed(sentence), *pieces(_unasked(sentence))}:
            found += [_words(part), _words(_of_the_user(part))]
    return frozenset(words for words in found if words)


def _words(sentence: str, person: Mapping[str, str] = _SAME_PERSON) -> Words:
    """Words and signs of a sentence as they are compared; person: who is who to another speaker."""
    text = _TOPIC_JA.sub("", _OWNER_JA.sub("", plain(named(sentence))))
    for usual, short in (*_POLITE_JA, *_WRITTEN_OUT):
        text = usual.sub(short, text)
    spelt = {part.lower(): part for word in cased(sentence) for part in word.split("_")}
    words = [spelt.get(word, _AGREEING.get(word, word)) for word in written(text)]
    words = [person.get(word, word) for word in words]
    for at, (before, word) in enumerate(itertools.pairwise(words), 1):
        if word == "are" and before in ("i", "you", "we"):
            words[at] = "is"
    return tuple(word for word in words if word not in _UNSAID)


def _moved(words: Words) -> set[Words]:
    """The orders of a sentence that say the same: a movable part at either end, "Momo is my cat" turned round."""
    found = {words}
    parts = [word for word in words if word in _MOVABLE]
    # "Anna on Monday, Ben on Tuesday"
    listing = len(_DAYS.intersection(parts)) > 1 or len(set(parts)) < len(parts)
    if len(words) <= _MOST_MOVED and not listing and "only" not in words:
        found |= {
            words[at:] + words[:at] for at in range(1, len(words)) if words[at] in _MOVABLE or words[0] in _MOVABLE
        }
    if words.count("is") == 1 and "a" not in words and _HEDGES.isdisjoint(words):
        at = words.index("is")
        found.add((*words[at + 1 :], "is", *words[:at]))
    return found
