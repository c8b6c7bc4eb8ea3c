"""Reading what a model writes: thoughts apart from what is said, whole and piece by piece."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

THINK, THINK_END = "<think>", "</think>"
Part = Literal["thought", "call", "answer"]
Piece = tuple[Part | Literal["retracted"], str]
"""A part and its text; ("retracted", "") says that what came as answer so far was a thought."""


@dataclasses.dataclass(frozen=True)
class Said:
    """A model's output, taken apart."""

    thought: str
    text: str  # what is not thought


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
        end = rest.find(THINK_END)
        if end < 0:
            thoughts.append(rest)
            rest = ""
            break
        thoughts.append(rest[:end])
        rest = rest[end + len(THINK_END) :]
    said.append(rest.replace(THINK_END, ""))
    return Said("\n".join(t.strip() for t in thoughts if t.strip()), "".join(said).strip())


def split_at_call(output: str, open_call: str) -> tuple[str, str]:
    """What stands before the first call that is not inside a thought, and the rest from it on."""
    position = 0
    while open_call and (call := output.find(open_call, position)) >= 0:
        thought = output.find(THINK, position)
        if not 0 <= thought < call:
            return output[:call], output[call:]
        end = output.find(THINK_END, thought)
        if end < 0:
            break
        position = end + len(THINK_END)
    return output, ""


class Reader:
    """Sorts a streamed output into parts as it comes; half-written tags are held back until they are whole or not.

    open_call: what a call begins with; "" where it is not known. thinking: whether the prompt has opened a thought.
    open_answer: what the answer begins with, in a format where everything before it is thought.
    """

    def __init__(self, open_call: str, thinking: bool = False, open_answer: str = "") -> None:
        self._open_call = open_call
        self._open_answer = open_answer
        self._part: Part = "thought" if thinking or open_answer else "answer"
        self._held = ""
        self._unmarked = not open_answer  # no tag of a thought has come: what was read may turn out to be one
        self._opening = thinking  # nothing but blanks has come of the thought that the prompt has opened

    def feed(self, text: str) -> list[Piece]:
        """(part, text) of what is now certain; a lone </think> takes back what came before, as in `split_thought`."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            tags = self._tags()
            found = min(
                ((at, tag) for tag in tags if (at := self._held.find(tag)) >= 0), default=None, key=lambda pair: pair[0]
            )
            if found is None:
                break
            at, tag = found
            self._emit(pieces, self._held[:at])
            self._held = self._held[at + len(tag) :]
            if tag == self._open_call:
                self._part = "call"
                self._held = tag + self._held
                break
            if tag == THINK_END and self._part == "answer" and self._unmarked:
                pieces.append(("retracted", ""))
            self._unmarked = False
            self._part = "thought" if tag == THINK else "answer"
        hold = max((_overlap(self._held, tag) for tag in self._tags()), default=0)
        self._emit(pieces, self._held[: len(self._held) - hold])
        self._held = self._held[len(self._held) - hold :]
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back at the end."""
        pieces: list[Piece] = []
        self._emit(pieces, self._held)
        self._held = ""
        return pieces

    def _tags(self) -> list[str]:
        if self._part == "call":
            return []
        if self._open_answer:
            return [self._open_answer, *filter(None, [self._open_call])] if self._part == "thought" else []
        if self._part == "thought":
            return [THINK_END, THINK] if self._opening else [THINK_END]
        return [THINK, THINK_END, *filter(None, [self._open_call])]

    def _emit(self, pieces: list[Piece], text: str) -> None:
        self._opening = self._opening and not text.strip()
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
