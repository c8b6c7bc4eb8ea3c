"""Generated tokens as text: cut at stop strings, and streamed in pieces that are never taken back."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    ends = [position for position in (text.find(string) for string in stop) if position >= 0]
    return text[: min(ends)] if ends else text


def cut_tokens(tokens: list[int], stop: Sequence[str], decode: Decode) -> tuple[list[int], str, bool]:
    """(tokens, text, whether a stop string ended it): the fewest tokens that spell the text before the stop string."""
    text = decode(tokens)
    cut = cut_at_stop(text, stop)
    if cut == text:
        return tokens, text, False
    while tokens and len(decode(tokens[:-1])) >= len(cut):
        tokens = tokens[:-1]
    return tokens, cut, True


class Pieces:
    """The text of a growing answer, piece by piece. What may become a stop string is held back until it has not."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._hold = max((len(text) for text in stop), default=1) - 1
        self._sent = ""

    def more(self, text: str) -> str:
        """What can be shown now of the answer so far; empty where nothing new is certain."""
        text = cut_at_stop(text, self._stop)
        ready = text[: len(text) - self._hold] if self._hold else text
        if len(ready) <= len(self._sent) or ready.endswith("�"):  # half of a character of several bytes
            return ""
        piece, self._sent = ready[len(self._sent) :], ready
        return piece

    def rest(self, text: str) -> str:
        """What is left of the finished answer."""
        return text[len(self._sent) :]
