"""Fitting what is known into few tokens by leaving out, never by rewriting: pure functions over texts."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from agentlab.memory.records import ConversationItem, Hit
from agentlab.memory.words import overlap, sentences, terms

_WIDE = re.compile(r"[\u3000-\u9fff\uac00-\ud7af\uf900-\uffef]")


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a summary and the ids of the turns that it is made of."""

    text: str
    sources: list[str]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a model is shown: `text` of `tokens` tokens, the memories `used` in it, how many pieces were left out."""

    text: str
    tokens: int
    used: list[str]
    left_out: int


def count_tokens(text: str) -> int:
    """About how many tokens a model sees: a token for 4 characters, one for each character of Japanese or Chinese.

    It errs on the high side for English. Where it matters, give the model's own tokenizer instead.
    """
    wide = len(_WIDE.findall(text))
    return wide + math.ceil((len(text) - wide) / 4)


def extract(parts: Sequence[Part], limit: int, tokens: Callable[[str], int]) -> list[Part]:
    """The most telling sentences of `parts`, in their order, in at most `limit` tokens; each keeps its sources.

    A sentence tells much when its terms come back in other sentences of the talk and few words carry them (SumBasic,
    Nenkova & Vanderwende 2005, with square roots so that one frequent word does not decide); repeats are left out.
    """
    pieces = [(Part(sentence, part.sources), terms(sentence)) for part in parts for sentence in sentences(part.text)]
    seen_in = Counter(term for _, words in pieces for term in set(words))
    ranked = sorted(
        range(len(pieces)),
        key=lambda i: (-sum(math.sqrt(seen_in[t]) for t in set(pieces[i][1])) / math.sqrt(len(pieces[i][1]) + 3), i),
    )
    chosen: list[int] = []
    room = limit
    for i in ranked:
        part, words = pieces[i]
        size = tokens(part.text)
        if size > room or any(overlap(words, pieces[other][1]) > 0.8 for other in chosen):
            continue
        chosen.append(i)
        room -= size
    return [pieces[i][0] for i in sorted(chosen)]


def fit(
    query: str, budget: int, turns: Sequence[ConversationItem], hits: Sequence[Hit], summary: Sequence[Part],
    tokens: Callable[[str], int],
) -> Context:  # fmt: skip
    """The best context in at most `budget` tokens.

    Order of what is taken: the newest turn, the memories by score, the turns before from new to old, the summary from
    its newest part. Order of what is shown: summary, memories, turns as they were.
    """
    room, left_out = budget, 0
    shown_turns: list[str] = []
    shown_hits: list[str] = []
    shown_summary: list[str] = []
    used: list[str] = []

    def take(line: str, into: list[str]) -> bool:
        nonlocal room, left_out
        size = tokens(line + "\n")
        if size > room:
            left_out += 1
            return False
        into.append(line)
        room -= size
        return True

    texts = [f"User: {turn.user_input}\nAgent: {turn.agent_response}" for turn in turns]
    if texts:
        take(texts[-1], shown_turns)
    for hit in hits:
        line = f"- {_shorten(hit.content, query, max(room - 4, 0), tokens)}"
        if len(line) > 2 and take(line, shown_hits):
            used.append(hit.memory_id)
        elif len(line) <= 2:
            left_out += 1
    older = list(reversed(texts[:-1]))
    for number, line in enumerate(older):
        # turns are shown without gaps: after one that does not fit, the older ones go too
        if not take(line, shown_turns):
            left_out += len(older) - number - 1
            break
    for part in reversed(summary):
        take(part.text, shown_summary)
    text = "\n".join([*reversed(shown_summary), *shown_hits, *reversed(shown_turns)])
    return Context(text, tokens(text) if text else 0, used, left_out)


def _shorten(text: str, query: str, room: int, tokens: Callable[[str], int]) -> str:
    """`text` if it fits `room`, else its sentences that share most with the query, in order; "" where none fits."""
    if tokens(text) <= room:
        return text
    wanted = terms(query)
    parts = sentences(text)
    kept: list[int] = []
    for i in sorted(range(len(parts)), key=lambda i: (-overlap(wanted, terms(parts[i])), i)):
        if tokens(" ".join(parts[j] for j in sorted([*kept, i]))) <= room:
            kept.append(i)
    return " ".join(parts[i] for i in sorted(kept))
