"""What a text is about, and whether one may say what another does: for finding all that has to be forgotten with it.

Wide on purpose, where `saying` is narrow: a word that stays of a forgotten text does the harm here.
"""

import re

from agentlab.memory.saying import named, unframed
from agentlab.memory.words import overlap, terms, tokens

SAME = 0.8  # share of a sentence's content words that another must have to resemble it

# words that only report or confirm that something is known; they say nothing of what
REPORTING = frozenset(
    terms(
        "told said says mentioned remember recall noted according memory earlier previously user understood okay ok "
        "sure certainly indeed right course see thanks correct hi hello hey actually apparently anyway absolutely "
        "exactly oh ah yeah yep"
    )
)
_PLACING = frozenset(
    """
    about above after against at before behind below between by down during for from in into of off on onto out over
    through to under until up upon with without
    """.split()  # noqa: SIM905 - a list of thirty strings is unreadable
)
_NEGATIONS = frozenset(("not", "no", "never", "none", "cannot", "without", "nothing", "nobody"))
_DENIAL_JA = re.compile(r"ません|な(?:い|かった|く)|(?<=[ぁ-ん])ず(?:に|、|。|$)")
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


def resembles(sentence: str, known: str) -> bool:
    """Whether `sentence` may say what `known` does, in other words: most are the same, names and numbers among them."""
    sentence, known = named(unframed(sentence)), named(" ".join(known.split()))
    said, there = content_words(sentence), set(terms(known))
    if not said or overlap(said, there) < SAME:
        return False
    if set(names(sentence)) & (set(said) - there):
        return False
    words = [set(tokens(text)) for text in (sentence, known)]
    if (words[0] - words[1]) & _PLACING and (words[1] - words[0]) & _PLACING:
        return False
    shared = {*names(sentence), *names(known)} & set(said) & set(content_words(known))
    if _in_order(sentence, shared) != _in_order(known, shared):
        return False
    if len(_DENIAL_JA.findall(sentence)) != len(_DENIAL_JA.findall(known)):
        return False
    return bool(_NEGATIONS & words[0]) == bool(_NEGATIONS & words[1])


def _in_order(text: str, shared: set[str]) -> list[str]:
    return list(dict.fromkeys(term for term in content_words(text) if term in shared))


def names(text: str) -> list[str]:
    """The terms of `text` that name something: capitalised within a sentence, or with a digit."""
    capitals = {term for word in text.split()[1:] if word[:1].isupper() for term in terms(word)} - REPORTING
    return [term for term in terms(text) if term in capitals or any(char.isnumeric() for char in term)]


def content_words(text: str) -> list[str]:
    """The terms of `text` that say what it is about."""
    return [term for term in terms(text) if term not in REPORTING and term not in _GRAMMAR_JA]
