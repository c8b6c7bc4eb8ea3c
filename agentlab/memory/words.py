"""Text → what an index can find: stems, bigrams and characters of scripts without spaces; sameness of wording.

The same terms feed SQLite's FTS5 and the text index in RAM, so both find the same memories.
"""

import datetime
import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable

from agentlab.memory.stemmer import stem

# Scripts written without spaces: kana with the long-vowel mark, Han with 々 and 〆, Thai, Lao, Khmer, Burmese.
_UNSPACED = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED += "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
# Marks of scripts with spaces whose vowels are signs on the letters, which \w leaves out: from Devanagari to Sinhala,
# Tibetan, and the Indonesian and Indian scripts beyond.
_MARKS = "\u0900-\u0903\u093a-\u093c\u093e-\u094f\u0951-\u0957\u0962\u0963" + "".join(
    rf"{chr(block)}-{chr(block + 0x03)}{chr(block + 0x3C)}{chr(block + 0x3E)}-{chr(block + 0x4D)}{chr(block + 0x55)}-"
    rf"{chr(block + 0x57)}{chr(block + 0x62)}{chr(block + 0x63)}"
    for block in range(0x0980, 0x0D80, 0x80)
)
_MARKS += "\u0d81-\u0d83\u0dca-\u0ddf\u0df2\u0df3\u0f71-\u0f84\u1b00-\u1b04\u1b34-\u1b44\ua823-\ua827\uabe3-\uabed"
_LETTER, _LATER = rf"[^\W_{_UNSPACED}]", rf"(?:[^\W_{_UNSPACED}]|[{_MARKS}])"
_ASCII_PIECE = re.compile(r"[^\W_]+(?:'[^\W\d_]+)?")
_PIECE = re.compile(rf"[{_UNSPACED}]+|{_LETTER}{_LATER}*(?:['’][^\W\d_{_UNSPACED}]+)?")
# Vowel points of Hebrew and Arabic, which are mostly left out.
_POINTS = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u064b-\u065f\u0670]")
# What makes another statement of the same words, beside the words: signs of arithmetic and currencies, C++ and C#, a
# minus, the point of 3.4, .5 and 10:30, a question mark, what code is written with (max_size, --all, x[1]), and every
# symbol beyond ASCII, emoji among them.
_CURRENCY = "$€£¥₹₩"
_MINUS = rf"(?<![\w)])-(?=\s*[.{_CURRENCY}]?\d)"
_SIGN = (
    rf"[$%&+/<=>@\\^|~?]|(?<=\w)#|!(?=\s?=)|(?<=\d)[\x22']|{_MINUS}|\.(?=\d)|(?<=\d)[,:](?=\d)|"
    r"(?:(?<=\w)|(?<=\w\s))\*(?=\s?\w)|(?<![\w-])--?(?=[a-z])|(?<!\w)\*(?=\.\w)|_+(?=[^\W_])|__+|(?<=\w)[\[{(]"
)
# without one of these, an ASCII text is its words
_PLAIN = re.compile(r"[$%&+/<=>@\\^|~?#*'_-]|!\s?=|\d\x22|\.\d|\d[,:]\d|\w[\[{(]")
_CASED = re.compile(
    r"\b(?:[A-Za-z0-9]*[a-z0-9][A-Z]|[A-Z][A-Za-z]*\d)[A-Za-z0-9]*|[A-Z]+(?:_[A-Z]+)+|(?<![A-Za-z])[A-Z]{2}(?![A-Za-z])|(?<=-)[A-Z]\w*"
)
_ARTICLES = ("a", "an", "the")
# "plan A", "HDMI A port", "Dr An Lee": no article is a capital within a sentence that is not all capitals
_LABEL = re.compile(r"(?<=[^\W_] )An?\b")
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−﹣－", "-") | dict.fromkeys("‘’ʼ＇", "'") | {"؟": "?"})
_HAN = re.compile("[\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")  # words of one character
_ASCII_WRITTEN = re.compile(rf"[^\W_]+(?:'[^\W\d_]+)?|{_SIGN}")
_WRITTEN = re.compile(rf"[{_UNSPACED}]+|{_LETTER}{_LATER}*(?:'[^\W\d_{_UNSPACED}]+)?|{_SIGN}|[^\w\s\x00-\x7f]")
_FORM = re.compile(
    rf"(?P<number>(?:{_MINUS}\s?|\+)?[{_CURRENCY}]?(?:(?<!\w)\.)?\d+(?:[.,:]\d+)*(?:\s?[%°{_CURRENCY}])?)|[^\W\d_]+[+#]*"
)
_IS_UNSPACED = re.compile(rf"[{_UNSPACED}]")
# not behind "Dr." and initials
_ABBREVIATED = "".join(
    rf"(?<!\b{short}\.)" for short in ("Dr", "Mr", "Mrs", "Ms", "Prof", "St", "vs", "e\\.g", "i\\.e", "[A-Z]")
)
_SENTENCE = re.compile(rf"(?:(?<=[.!?]){_ABBREVIATED}|(?<=[.!?][\"')\]]))\s+|(?<=[。！？])|\n+")
_CONTRACTION = {"n't": " not", "'re": "", "'ve": "", "'ll": "", "'s": "", "'m": "", "'d": ""}
_DAY_S = 86_400
_CONTRACTIONS = re.compile(r"(n't|'re|'ve|'ll|'s|'m|'d)\b")
# What a contraction is short for, where it is one thing: 's and 'd stay
_OPENED = {
    "can't": "cannot",
    "won't": "will not",
    "n't": " not",
    "'re": " are",
    "'ve": " have",
    "'ll": " will",
    "'m": " am",
}
_OPENING = re.compile(r"(can't|won't|n't|'re|'ve|'ll|'m)\b")

_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip

# Function words of English that say nothing about what a text is about; negations are not among them.
STOP_WORDS = frozenset(
    """
    a about above after again against all also am an and any are as at be because been before being below between
    both but by can could did do does doing down during each few for from further get got had has have having he her
    here hers herself him himself his how i if in into is it its itself just let like me might more most much must
    my myself of off on once only or other our ours ourselves out over own please really shall she should so some such
    than that the their theirs them themselves then there these they this those through to too under until up upon us
    very was we were what when where which while who whom whose why will with would yes you your yours yourself
    yourselves
    """.split()  # noqa: SIM905 - a list of 150 strings is unreadable
)


def fold(text: str) -> str:
    """`text` in one form for comparing: NFKC, case folded, typographic apostrophes plain, accents off Latin letters."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    if text.isascii():
        return text
    text = _POINTS.sub("", text)
    # decomposing everything would tear が into か and a mark, so only letters below U+0250 lose theirs
    return "".join(unicodedata.normalize("NFD", char)[0] if "\u00c0" <= char < "\u0250" else char for char in text)


def tokens(text: str) -> list[str]:
    """Words in order, folded, contractions opened; a run of an unspaced script is one token."""
    folded = fold(text)
    if "'" in folded:
        folded = _CONTRACTIONS.sub(lambda match: _CONTRACTION[match.group()], folded)
    return (_ASCII_PIECE if folded.isascii() else _PIECE).findall(folded)


def terms(text: str) -> list[str]:
    """What the text index holds of `text`, in order: stems without stop words; for unspaced scripts bigrams and
    each Han character, which is often a word (犬, 妹).

    A text of stop words only keeps them, so that it can be found at all.
    """
    return _terms(text, tokens(text))


def _terms(text: str, found: list[str]) -> list[str]:
    if text.isascii():
        kept = [stem(token) for token in found if token not in STOP_WORDS]
    else:
        kept = []
        for token in found:
            if _IS_UNSPACED.match(token):
                kept += [token] if len(token) == 1 else [token[i : i + 2] for i in range(len(token) - 1)]
                kept += _HAN.findall(token) if len(token) > 1 else []
            elif token not in STOP_WORDS:
                kept.append(stem(token))
    return kept or found


def date_terms(time_s: float) -> list[str]:
    """Day, month and year of a moment (UTC) as terms, so that "in May 2023" finds what was told then."""
    return list(_date_terms(int(time_s // _DAY_S)))


@functools.lru_cache(maxsize=1024)
def _date_terms(days: int) -> tuple[str, str, str]:
    day = datetime.date(1970, 1, 1) + datetime.timedelta(days=days)
    return str(day.day), stem(_MONTHS[day.month - 1]), str(day.year)


def signature(text: str) -> bytes:
    """16 bytes that are equal for texts of the same words in the same order, up to case, articles and most punctuation.

    Case counts within words and beside digits: Hunter2 is not hunter2.

    Merging two statements loses one, keeping one twice loses nothing: so all else counts. Prepositions and negations
    do ("from Rome to Paris" is not "from Paris to Rome"), accents, and signs that say something, emoji among them: C is
    not C++, 5 degrees are not -5, 3.4 is not 3-4, a question is no statement.
    """
    return _signature(text, tokens(text))


def _signature(text: str, found: list[str]) -> bytes:
    if not text.isascii() or _PLAIN.search(text):
        found = written(text)
    words = [token for token in found[:-1] if token not in _ARTICLES] + found[-1:]
    told = " ".join(words or [text])
    if (labels := len(_LABEL.findall(text))) and not text.isupper():
        told += f"\x1f{labels}"
    if capitals := cased(text):
        told += "\x1f" + " ".join(capitals)
    return hashlib.blake2b(told.encode(), digest_size=16).digest()


def cased(text: str) -> list[str]:
    """The words of `text` whose capitals are part of how they are written: Hunter2, iPhone, MAX_SIZE, IT, blue-Otter.

    Longer words in capitals are loud, and no others.
    """
    return [] if text.isupper() else _CASED.findall(text)


def written(text: str) -> list[str]:
    """Words and signs in order: as `tokens`, but with accents and superscripts, and contractions opened in full."""
    text = plain(text)
    if "'" in text:
        text = _OPENING.sub(lambda match: _OPENED[match.group()], text)
    if text.isascii():
        return _ASCII_WRITTEN.findall(text)
    return [piece for piece in _WRITTEN.findall(text) if _is_said(piece)]


def _is_said(piece: str) -> bool:
    """Whether a piece is a word, a sign of ASCII, a symbol or a mark of one: no bracket, quotation mark or the like."""
    if piece.isascii() or len(piece) > 1 or piece.isalnum() or piece == "\u200d":  # joins emoji
        return True
    return unicodedata.category(piece)[0] in "SM" and piece not in "\ufe0e\ufe0f"  # black and white, or coloured


def plain(text: str) -> str:
    """`text` in lower case, with plain dashes and apostrophes, and each letter in its usual width."""
    if text.isascii():
        return text.lower()
    text = "".join(
        unicodedata.normalize("NFKC", char) if unicodedata.east_asian_width(char) in "FH" else char for char in text
    )
    text = _POINTS.sub("", unicodedata.normalize("NFC", text).translate(_DASHES))
    return unicodedata.normalize("NFC", text.casefold())


def forms(text: str) -> dict[str, set[str]]:
    """How each word is written, as signs make others of it: "c" → {"c", "c++"}; under "" all numbers: {"-5", "$3"}."""
    found: dict[str, set[str]] = {}
    for match in _FORM.finditer(plain(text)):
        written = "".join(match.group().split())
        found.setdefault("" if match["number"] else written.rstrip("+#"), set()).add(written)
    return found


def signature_and_terms(text: str) -> tuple[bytes, list[str]]:
    """Both, for what is stored: finding the words is half of the work."""
    found = tokens(text)
    return _signature(text, found), _terms(text, found)


def sentences(text: str) -> list[str]:
    """The sentences of `text` in order, stripped, empty ones left out."""
    return [piece for piece in (part.strip() for part in _SENTENCE.split(text)) if piece]


def overlap(part: Iterable[str], whole: Iterable[str]) -> float:
    """Share of the distinct terms of `part` that `whole` has too; 0 for an empty part."""
    wanted = set(part)
    return len(wanted & set(whole)) / len(wanted) if wanted else 0.0
