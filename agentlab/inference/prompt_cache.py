"""Keys and values of prompts that were read before: a talk that goes on is not read again from its beginning."""

import dataclasses
from collections.abc import Sequence

from transformers import DynamicCache

from agentlab.inference.cache import beginning_of, can_be_cut, cut, room_of
from agentlab.inference.decoding import common_prefix

MOST_TALKS = 4
LEAST_TOKENS = 16  # of a common beginning; for fewer it is not worth it


@dataclasses.dataclass
class _Talk:
    adapter: str | None
    tokens: list[int]  # whose keys and values lie in `cache`, for one row
    cache: DynamicCache


class PromptCache:
    """What the last single requests left: the tokens of prompt and answer, and their keys and values.

    They hold for one model with one adapter: whoever changes either has to `forget` or `clear`.
    """

    def __init__(self) -> None:
        self._talks: list[_Talk] = []  # the one used last comes last

    def __len__(self) -> int:
        return len(self._talks)

    @property
    def tokens(self) -> int:
        """Number of tokens that memory is held for."""
        return sum(room_of(talk.cache) for talk in self._talks)

    def known(self, adapter: str | None, prompt: Sequence[int]) -> int:
        """How many of the prompt's first tokens need not be read again; never all of them."""
        return self._best(adapter, prompt)[0]

    def take(self, adapter: str | None, prompt: Sequence[int]) -> DynamicCache | None:
        """A cache of the prompt's known beginning, the caller's own from now on; None where nothing is known.

        A talk that shares at least half of its tokens is taken out, because it goes on; of another, as of one that
        begins with the same tools, the beginning is copied.
        """
        shared, talk = self._best(adapter, prompt)
        if talk is None:
            return None
        if 2 * shared < len(talk.tokens):
            return beginning_of(talk.cache, shared)
        self._talks.remove(talk)
        cut(talk.cache, shared)
        return talk.cache

    def keep(self, adapter: str | None, tokens: Sequence[int], cache: DynamicCache) -> None:
        """Remember a cache of one row, which is not the caller's any more; tokens: those that were read into it."""
        if not can_be_cut(cache):
            return
        self._talks.append(_Talk(adapter, list(tokens[: cache.get_seq_length()]), cache))
        del self._talks[:-MOST_TALKS]

    def make_room(self, tokens: int) -> None:
        """Drop the oldest talks until the others hold memory for at most so many tokens."""
        while self._talks and self.tokens > tokens:
            del self._talks[0]

    def forget(self, adapter: str | None) -> None:
        """Drop what was read with this adapter."""
        self._talks = [talk for talk in self._talks if talk.adapter != adapter]

    def clear(self) -> None:
        """Drop everything."""
        self._talks.clear()

    def _best(self, adapter: str | None, prompt: Sequence[int]) -> tuple[int, _Talk | None]:
        found: tuple[int, _Talk | None] = (0, None)
        for talk in self._talks:
            if talk.adapter == adapter:
                shared = common_prefix([talk.tokens, list(prompt)])
                if shared >= LEAST_TOKENS and shared > found[0]:
                    found = shared, talk
        return found
