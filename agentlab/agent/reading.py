"""Reading what a model writes: thoughts apart from what is said, whole and piece by piece."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

THINK, THINK_END = "<think>", "</think>"
_LABELS = ("Thought:", THINK)  # what a thought begins with in a format of lines
Part = Literal["thought", "call", "answer"]
Piece = tuple[Part | Literal["retracted"], str]
"""A part and its text; ("retracted", "") says that what came as answer so far was a thought."""


@dataclasses.dataclass(frozen=True)
class Said:
    """A model's output, taken apart. is_answer: it is marked as the answer, so nothing in it is a call."""

    thought: str
    text: str  # what is not thought
    is_answer: bool = False


def split_thought(output: str) -> Said:
    """Thoughts are what stands between <think> and </think>, and before a lone </think> (R1's prompt opens it itself).

    A thought that is never closed is all thought: nothing was said.
    """
    thoughts, said = [], []
    rest = output
    first_close, first_open = rest.find(THINK_END), rest.find(THINK)
    if first_close >= 0 and not 0 <= first_open < first_close:
        thoughts.append(rest[:first_close])
        rest = rest[first_close + len(THINK_END) :]
    while (begin := rest.find(THINK)) >= 0:
        said.append(rest[:begin])
        rest = rest[begin + len(THINK) :]
        end = _end_of_thought(rest)
        if end < 0:
            thoughts.append(rest)
            rest = ""
            break
        thoughts.append(rest[:end])
        rest = rest[end + len(THINK_END) :]
    said.append(rest)
    return Said("\n".join(t.strip() for t in map(_untagged, thoughts) if t.strip()), _untagged("".join(said)).strip())


def _end_of_thought(text: str, begin: int = 0) -> int:
    """Where the </think> of the thought that begins here stands; -1 where there is none.

    A thought inside it has its own; one that is only spoken of has none, and is no reason to take the answer for one.
    """
    end = text.find(THINK_END, begin)
    inside = text.count(THINK, begin, max(end, begin))
    while inside and (further := text.find(THINK_END, end + len(THINK_END))) >= 0:
        inside += text.count(THINK, end, further) - 1
        end = further
    return end


def _untagged(text: str) -> str:
    return text.replace(THINK, "").replace(THINK_END, "")


def split_at(output: str, opening: re.Pattern[str]) -> tuple[str, str]:
    """What stands before the first `opening` that is not inside a thought, and the rest from it on."""
    position = 0
    while found := opening.search(output, position):
        thought = output.find(THINK, position)
        if not 0 <= thought < found.start():
            return output[: found.start()], output[found.start() :]
        end = _end_of_thought(output, thought + len(THINK))
        if end < 0:
            break
        position = end + len(THINK_END)
    return output, ""


class Reader:
    """Sorts a streamed output into parts as it comes; half-written tags are held back until they are whole or not.

    open_call: what a call begins with; "" where it is not known. thinking: whether the prompt has opened a thought.
    open_answer: what the answer begins with, in a format whose lines have labels: a call begins a line there, and words
    without a label are an answer until this comes.
    """

    def __init__(self, open_call: str, thinking: bool = False, open_answer: str = "") -> None:
        self._open_call = open_call
        self._open_answer = open_answer
        self._part: Part = "thought" if thinking else "answer"
        self._held = ""
        self._line = ""  # what was handed on of the current line
        self._unmarked = not open_answer  # no tag of a thought has come: what was read may turn out to be one
        self._nested = 0  # thoughts that were opened inside another one, each of which may have an end of its own
        self._opening = thinking  # nothing but blanks has come of the thought that the prompt has opened
        self._labelled = not open_answer or thinking  # whether it is known if the output begins with a label
        self._answering = False  # the answer's mark has come: all the rest is answer

    def feed(self, text: str) -> list[Piece]:
        """(part, text) of what is now certain; a lone </think> takes back what came before, as in `split_thought`."""
        self._held += text
        pieces: list[Piece] = []
        if not self._labelled and not self._know_label():
            return pieces
        while self._part != "call":
            found = min(
                ((at, tag) for tag in self._tags() if (at := self._find(tag)) >= 0),
                default=None, key=lambda pair: pair[0],
            )  # fmt: skip
            if found is None:
                break
            at, tag = found
            self._emit(pieces, self._held[:at])
            self._held = self._held[at:]
            if tag == self._open_call:
                self._part = "call"
            else:
                self._held = self._held[len(tag) :]
                self._pass(tag, pieces)
        hold = max((_overlap(self._held, tag) for tag in self._tags()), default=0)
        self._emit(pieces, self._held[: len(self._held) - hold])
        self._held = self._held[len(self._held) - hold :]
        return pieces

    def _pass(self, tag: str, pieces: list[Piece]) -> None:
        """Go on behind a tag: to another part, or deeper into a thought."""
        if tag == THINK:
            self._nested += self._part == "thought" and not self._opening
            self._part = "thought"
        else:
            if self._part == "answer" and (self._unmarked or self._nested or tag == self._open_answer):
                pieces.append(("retracted", ""))
                self._nested -= bool(self._nested)
            self._part = "answer"
        self._answering = tag == self._open_answer
        self._unmarked = self._opening = False

    def _know_label(self) -> bool:
        """Find out whether the output begins with a label, if so much of it has come."""
        begin = self._held.lstrip()
        self._labelled = bool(begin) and not any(label.startswith(begin) for label in _LABELS)
        if begin.startswith(_LABELS):
            self._part, self._labelled = "thought", True
        return self._labelled

    def _find(self, tag: str) -> int:
        """Where the tag stands in what is held; in a format of lines a call does at the beginning of one."""
        at = self._held.find(tag)
        while self._open_answer and tag == self._open_call and at >= 0:
            if not (self._line + self._held[:at]).rpartition("\n")[2].strip():
                break
            at = self._held.find(tag, at + 1)
        return at

    def finish(self) -> list[Piece]:
        """What was held back at the end."""
        pieces: list[Piece] = []
        self._emit(pieces, self._held)
        self._held = ""
        return pieces

    def _tags(self) -> list[str]:
        if self._part == "call" or self._answering:
            return []
        open_call = [self._open_call] if self._open_call else []
        if self._open_answer:
            return [self._open_answer, *open_call]
        return [THINK_END, THINK] if self._part == "thought" else [THINK, THINK_END, *open_call]

    def _emit(self, pieces: list[Piece], text: str) -> None:
        self._opening = self._opening and not text.strip()
        self._line = (self._line + text).rpartition("\n")[2]
        if text:
            pieces.append((self._part, text))


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` could be the beginning of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class Answer:
    """An answer as it comes, up to the first of `stops`; what may yet turn out to be `decision` is held back whole."""

    def __init__(self, stops: Sequence[str], decision: str = "") -> None:
        self.text = ""
        self.at_stop = False  # a stop string has come: the answer is over
        self._stops, self._decision = stops, decision
        self._held = ""

    def feed(self, piece: str) -> str:
        """What may be shown now that `piece` was written."""
        if self.at_stop:
            return ""
        sent = len(self.text) - len(self._held)
        self.text = stopped(whole := self.text + piece, self._stops)
        self.at_stop, self._held = self.text != whole, self.text[sent:]
        if self.undecided:
            return ""
        ready = len(self._held) - (0 if self.at_stop else half_a_stop(self.text, self._stops))
        shown, self._held = self._held[: max(0, ready)], self._held[max(0, ready) :]
        return shown

    @property
    def undecided(self) -> bool:
        """Whether all of it may still be a decision instead of an answer."""
        return bool(self._decision) and self._decision.startswith(self.text.strip())

    def rest(self) -> str:
        """What was held back at the end."""
        held, self._held = self._held, ""
        return "" if self._decision and held.strip() == self._decision else held


def stopped(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first stop string in it; blanks before it are no part of it."""
    if not stops:
        return text
    from agentlab.inference.text import cut_at_stop

    begin = len(text) - len(text.lstrip())
    return text[:begin] + cut_at_stop(text[begin:], stops)


def half_a_stop(answer: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    sizes = [size for stop in stops for size in range(1, len(stop)) if answer.endswith(stop[:size])]
    return max(sizes, default=0)
