"""The Porter stemmer (Porter 1980, "An algorithm for suffix stripping"): `stem("connections") == "connect"`.

The steps and their rules are the paper's, in its order, with the two changes of its author's later versions that
SQLite's `porter` tokenizer makes too (`bli` → `ble`, `logi` → `log`); a test compares the two word by word.
"""

import functools
import itertools

# Longest first: the longest suffix that fits decides.
_STEP2 = (
    ("ational", "ate"), ("ization", "ize"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"),
    ("tional", "tion"), ("biliti", "ble"), ("entli", "ent"), ("ousli", "ous"), ("ation", "ate"), ("alism", "al"),
    ("aliti", "al"), ("iviti", "ive"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("alli", "al"),
    ("ator", "ate"), ("logi", "log"), ("bli", "ble"), ("eli", "e"),
)  # fmt: skip
_STEP3 = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ness", ""), ("ful", ""),
)  # fmt: skip
_STEP4 = (
    "ement", "ance", "ence", "able", "ible", "ment", "ant", "ent", "ion", "ism", "ate", "iti", "ous", "ive", "ize",
    "al", "er", "ic", "ou",
)  # fmt: skip


@functools.lru_cache(maxsize=200_000)
def stem(word: str) -> str:
    """The stem of a lower-case ASCII word; anything else and words of one or two letters come back unchanged."""
    if len(word) < 3 or not (word.isascii() and word.isalpha()):
        return word
    return _step5(_step4(_step3(_step2(_step1c(_step1b(_step1a(word)))))))


def _consonant(word: str, i: int) -> bool:
    if word[i] in "aeiou":
        return False
    return word[i] != "y" or i == 0 or not _consonant(word, i - 1)


def _measure(word: str) -> int:
    """m of the paper: how often a vowel run is followed by a consonant run."""
    shape = [_consonant(word, i) for i in range(len(word))]
    return sum(1 for before, after in itertools.pairwise(shape) if after and not before)


def _has_vowel(word: str) -> bool:
    return any(not _consonant(word, i) for i in range(len(word)))


def _double(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _consonant(word, len(word) - 1)


def _cvc(word: str) -> bool:
    n = len(word)
    return (
        n > 2
        and _consonant(word, n - 3)
        and not _consonant(word, n - 2)
        and _consonant(word, n - 1)
        and word[-1] not in "wxy"
    )


def _step1a(word: str) -> str:
    if word.endswith("sses") or word.endswith("ies"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _step1b(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        if word.endswith(suffix) and _has_vowel(word[: -len(suffix)]):
            word = word[: -len(suffix)]
            if word.endswith(("at", "bl", "iz")):
                return word + "e"
            if _double(word) and word[-1] not in "lsz":
                return word[:-1]
            return word + "e" if _measure(word) == 1 and _cvc(word) else word
    return word


def _step1c(word: str) -> str:
    return word[:-1] + "i" if word.endswith("y") and _has_vowel(word[:-1]) else word


def _replace(word: str, rules: tuple[tuple[str, str], ...]) -> str:
    for suffix, new in rules:
        if word.endswith(suffix):
            kept = word[: -len(suffix)]
            return kept + new if _measure(kept) > 0 else word
    return word


def _step2(word: str) -> str:
    return _replace(word, _STEP2)


def _step3(word: str) -> str:
    return _replace(word, _STEP3)


def _step4(word: str) -> str:
    for suffix in _STEP4:
        if word.endswith(suffix):
            kept = word[: -len(suffix)]
            if suffix == "ion" and not kept.endswith(("s", "t")):
                return word
            return kept if _measure(kept) > 1 else word
    return word


def _step5(word: str) -> str:
    if word.endswith("e"):
        kept = word[:-1]
        if _measure(kept) > 1 or (_measure(kept) == 1 and not _cvc(kept)):
            word = kept
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word
