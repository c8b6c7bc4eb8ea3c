"""Whether two sentences say the same: word for word, but for the ways in which an agent repeats what it was told.

Refusing news as an echo, or confirming a fact with its opposite, does harm; an echo or a confirmation that is missed
leaves one memory more. One other word, number, sign or order can make another statement, so words are compared as they
are written and in their order. What may differ is a list, and all of it is in this file: a frame ("You told me that"),
who speaks to whom ("your" for "my"), articles, the verb's person, ways of naming, and where a part stands that begins
with a preposition ("Every morning I drink tea").
"""

import functools
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
    rf"(?:i (?:think|believe) )?you (?:have |had )?{_WHEN}(?:said|mentioned|told me){_BEFORE}(?: that|:)? ",
    rf"you (?:have |had )?{_WHEN}(?:asked|told|wanted) me to (?:{_KEEP}|remind you)(?: that|:)? ",
    rf"(?:i )?found in (?:my|our|the) {_TALK}(?: that)? ",
    r"(?:if )?i (?:recall|remember)(?: correctly)?(?: ?,| that| you telling me(?: that)?) ",
    r"(?:(?:i|we) (?:know|understand|see)|did you know) that ",
    r"as an ai(?: (?:assistant|model|language model))? ?, ?",
    r"the answer(?: to your question)? is(?: that| ?:) ",
    r"it (?:looks|seems) (?:like|that) ",
    rf"(?:please )?(?:don['’]t forget|{_KEEP})(?: that|:)? ",
    rf"i(?:['’]ll| will|['’]ve| have) (?:saved|stored|noted|remembered|{_KEEP})(?: that)? ",
    r"so ",
    r"(?:yes|yeah|yep|sure|okay|ok|right|alright|understood|noted|got it|great|of course|certainly|absolutely|well|"
    r"as far as i know|just to confirm|(?:(?:as|just) )?a reminder|fact|memory|observation|(?:final )?answer|"
    r"quick recap|memory_search(?: returned)?) ?(?:[,:;.!]| [-–—]) ?",
    r"[-*•>] +|[・]|\d+[.)] |\[[^\]]{1,60}\] |\d{4}-\d\d-\d\d: |<answer>|[\"“”'‘’「『_`]+",
)
_FRAME = re.compile("|".join(f"^(?:{frame})" for frame in _FRAMES), re.IGNORECASE)
_MOST_FRAMES = 6  # one within another
_ASKED_BACK = re.compile(r"(?: ?, ?(?:right|correct|isn['’]t it))?[?？]$", re.IGNORECASE)
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(?=\w)|(?<=[\w.!?])\*{1,2}(?![\w*])")
_AFTER = "\"”’'」』*_` 🙂😊😀😃😄😁👍🎉✨"  # what may stand behind a sentence and says nothing
_REPORTED = re.compile(r"\b(?:told|said|mentioned|asked|telling)\b", re.IGNORECASE)
_FRAME_BEFORE_JA = re.compile(
    r"^(?:(?:はい|ええ|もちろん(?:です)?|わかりました|承知しました)[、。！,]+)?(?:記憶によると[、,]?)?"
    r"(?:(?:あなた|ユーザー)(?:は|が)[、,]?(?=.*(?:言|おっしゃ|仰|話し|教え|伝え)))?(?:(?:以前|前に|先ほど|さっき)[、,]?)?"
)
_FRAME_AFTER_JA = re.compile(
    r"(?:だ|である|です|ます)?と(?:(?:私に)?(?:言|おっしゃ|仰|話し|教え|伝え)[ぁ-ん]*|のこと(?:です|でした))[。！]?$"
)
# ways of saying what something is called; the name is what counts
_NAMING = (
    (re.compile(r"(?:['’]s|\b(?:is|are)) (?:called|named|the names? of)\b", re.IGNORECASE), " is"),
    (re.compile(r"(?:['’]s)? names? (?:is|are)\b", re.IGNORECASE), " is"),
    (re.compile(r"\bthe names? of\b", re.IGNORECASE), ""),
    (re.compile(r"\bi have an? ([\w -]{1,40}?) (?:called|named)\b", re.IGNORECASE), r"my \1 is"),
    (re.compile(r"\byou have an? ([\w -]{1,40}?) (?:called|named)\b", re.IGNORECASE), r"your \1 is"),
)
_OWNER_JA = re.compile("(?:私|僕|俺|わたし|ぼく|あなた|ユーザー)(?:さん)?の")
_SPEAKER_JA = re.compile("(?:私|僕|俺|わたし|ぼく|あなた|ユーザー)(?:さん)?(?=[はがもにを])")
# the same sentence, politely or not, with commas or without; who speaks goes without saying
_POLITE_JA = (
    (re.compile("[、・]"), ""), (re.compile("^私[はが]"), ""), (re.compile("(?<=[てで])います"), "いる"),
    (re.compile("(?:です|だ|である)?(?:よね|[よね])?[。！!]?$"), ""),
)  # fmt: skip
_WRITTEN_OUT = (
    (re.compile(r"\b(it|that|he|she|there|here|what|who|where|how)['’]s\b|(?<=\w)['’]s(?= an? )"), r"\1 is"),
    (re.compile(r"\b(?:have|['’]ve) got\b"), " have"),
    (re.compile(r"\bon (?=(?:mon|tues|wednes|thurs|fri|satur|sun)day\b)"), ""),
    (re.compile(r"\bthe user['’]s\b"), "my"),
    (re.compile(r"\bthe user (?P<adverb>\w+ly |always |never |often |also )?(?P<verb>\w+)"), r"i \g<adverb>\g<verb>"),
)
_VERB_S = re.compile(r"(?:(?<=[a-z]{2}ch)|(?<=[a-z]{2}sh)|(?<=ss)|(?<=[oxz]))es$|(?<=[^siu])s$")
_UNSAID = frozenset(("the", "my"))
_AGREEING = {"an": "a", "am": "is", "are": "is", "were": "was", "has": "have", "does": "do",
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
_MOST_MOVED = 40  # words of a sentence whose parts are tried elsewhere
_MOST_PIECES = 8
_AND = re.compile(r" ?; ?| ?,? and ", re.IGNORECASE)
# what such a part has to have to be a sentence of its own, and what may not be in it nor in the one that it is part of
_SAYING = frozenset(("is", "was", "have", "had", "will", "can", "do", "did"))
_HEDGES = frozenset(
    """
    ? although because believe both but could either except hope if instead may maybe might neither never no nor not
    only or please rather said say says should than that think thinks though unless until when whether while wish
    without would
    """.split()  # noqa: SIM905 - a list of forty strings is unreadable
)


def is_question(text: str) -> bool:
    """Whether a text asks, and tells nothing."""
    return text.rstrip().endswith(("?", "？", "؟"))


def repeats(sentence: str, known: str) -> bool:
    """Whether `sentence`, as an agent or a tool may put it, is one of the sentences of `known`, or a part that is one.

    Both as the same speaker would say it ("my rent"), and as one speaks to the other ("your rent").
    """
    return any(not _told(known).isdisjoint(_moved(reading)) for reading in _readings(sentence))


def same_fact(one: str, other: str) -> bool:
    """Whether two texts that one person told say the same, so that one confirms the other."""
    told = _words(unframed(other))
    return bool(told) and "?" not in told and told in _moved(_words(unframed(one)))


def pieces(sentence: str) -> list[str]:
    """The sentences that `sentence` joins by "and" or a semicolon; itself alone where one of them could not stand."""
    found = _AND.split(" ".join(sentence.split()))
    if len(found) > _MOST_PIECES:
        return [sentence]
    words = [set(_words(piece)) for piece in found]
    whole = all(some & _SAYING for some in words) and not any(some & _HEDGES for some in words)
    return found if whole else [sentence]


def unframed(sentence: str) -> str:
    """`sentence` without what only says where the rest is from, and with one space between words."""
    return _unframed(" ".join(sentence.split()))


def named(sentence: str) -> str:
    """`sentence` with one way of saying what something is called."""
    for naming, short in _NAMING:
        sentence = naming.sub(short, sentence)
    return sentence


def _unframed(sentence: str) -> str:
    sentence = _EMPHASIS.sub("", sentence)
    for _ in range(_MOST_FRAMES):
        if (shorter := _FRAME.sub("", sentence)) == sentence:
            break
        sentence = shorter
    return (
        _FRAME_AFTER_JA.sub("", _FRAME_BEFORE_JA.sub("", sentence)).removesuffix("</answer>").rstrip(_AFTER) or sentence
    )


def _readings(sentence: str) -> Iterator[Words]:
    """What a sentence says, word for word, or to the one who told it, or in reported speech."""
    sentence = " ".join(sentence.split())
    told = _ASKED_BACK.sub("", _unframed(sentence))  # what an agent asks is no news either
    frame = sentence[: max(0, len(sentence) - len(told))]
    for person in (_SAME_PERSON, _SWAPPED):
        yield (words := _words(told, person))
        if _REPORTED.search(frame):
            yield tuple(_SHIFTED.get(word, word) for word in words)


@functools.lru_cache(maxsize=256)
def _told(known: str) -> frozenset[Words]:
    """The words of each sentence of a text, and of each part of one that could be a sentence."""
    found = []
    for sentence in map(unframed, sentences(known)):
        found += [_words(part) for part in {sentence, *pieces(sentence)}]
    return frozenset(words for words in found if words)


def _words(sentence: str, person: Mapping[str, str] = _SAME_PERSON) -> Words:
    """Words and signs of a sentence as they are compared; person: who is who to another speaker."""
    text = _SPEAKER_JA.sub("私", _OWNER_JA.sub("", plain(named(sentence))))
    for polite, usual in _POLITE_JA:
        text = polite.sub(usual, text)
    by_user = _WRITTEN_OUT[-1][0].search(text)
    for short_form, whole in _WRITTEN_OUT:
        text = short_form.sub(whole, text)
    capitals = {word.lower(): word for word in cased(sentence)}
    words = [_AGREEING.get(word, capitals.get(word, word)) for word in written(text)]
    if by_user is not None and (verb := by_user["verb"]) not in _SAYING:
        words = [_VERB_S.sub("", word) if word == verb else word for word in words]
    words = [person.get(word, word) for word in words]
    return tuple(word for word in words if word not in _UNSAID)


def _moved(words: Words) -> set[Words]:
    """The orders of a sentence that say the same: a movable part at either end, "Momo is my cat" turned round."""
    found = {words}
    if len(words) > _MOST_MOVED:
        return found
    for at in range(1, len(words)):
        if words[at] in _MOVABLE or words[0] in _MOVABLE:
            found.add(words[at:] + words[:at])
    if words.count("is") == 1 and not {"a", "not"} & set(words):
        at = words.index("is")
        found.add((*words[at + 1 :], "is", *words[:at]))
    return found
