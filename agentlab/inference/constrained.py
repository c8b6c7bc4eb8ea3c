"""Decoding under a grammar, row by row, so that an answer is complete before its tokens run out.

xgrammar is imported where it is used: free answers and training do without it.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from agentlab.inference.grammars import Grammar, Grammars, completion

_TRIES = 8  # the model's own choices that are tried before the shortest completion is followed


class Row:
    """One answer under a grammar. Invariant: `path` completes it, and there is room for all of `path`."""

    def __init__(self, grammars: Grammars, grammar: Grammar, limit: int) -> None:
        import xgrammar

        self.grammars = grammars
        self.grammar = grammar
        self.matcher = xgrammar.GrammarMatcher(grammar.compiled)
        self.room = limit  # tokens that may still be generated
        self.count = 0
        self.finished = False
        self.path: list[int] = grammars.encode(grammar.call) if grammar.required else []
        self._tail = b""  # the end of free text, in which a call may have begun

    @property
    def complete(self) -> bool:
        """Whether what was generated is a whole answer that nothing can follow."""
        return self.finished and self.must_end()

    def must_end(self) -> bool:
        """Whether the answer is whole and only an end token may follow."""
        import xgrammar

        if not self.matcher.is_completed():
            return False
        mask = xgrammar.allocate_token_bitmask(1, self.grammars.info.vocab_size)
        self.matcher.fill_next_token_bitmask(mask, 0)
        return not (mask[0] & ~self.grammars.ends).any()

    def choose(self, scores: torch.Tensor, best: int) -> int:  # (V,)
        """The next token: the model's choice, unless what it begins cannot be finished in the room that is left."""
        for _ in range(_TRIES):
            if self.take(best):
                return best
            scores[best] = -torch.inf
            best = int(scores.argmax())
            if scores[best] == -torch.inf:
                break
        forced = self.path[0] if self.path else min(self.grammars.stop_ids)
        if not self.take(forced):
            raise RuntimeError(f"token {forced} of the shortest completion is refused by its grammar")
        return forced

    def take(self, token: int) -> bool:
        """Read a token; False, and nothing read, where the grammar or the room that is left refuses it."""
        if token in self.grammars.stop_ids:
            if not self.matcher.is_completed():
                return False
            self.finished = True
            return True
        if not self.matcher.accept_token(token):
            return False
        path = self._path_after(token)
        if path is None or len(path) > self.room - 1:
            self.matcher.rollback(1)
            return False
        self._tail = (self._tail + self.grammars.pieces[token])[-len(self.grammar.call) - 1 :]
        self.path = path
        self.room -= 1
        self.count += 1
        self.finished = self.room == 0
        return True

    def close(self) -> list[int]:
        """The tokens of `path`, taken: they complete the answer. Empty where it needs nothing more."""
        closing = []
        while self.path and not self.finished:
            token = self.path[0]
            if not self.take(token):
                raise RuntimeError(f"token {token} of the shortest completion is refused by its grammar")
            closing.append(token)
        self.finished = True
        return closing

    def _path_after(self, token: int) -> list[int] | None:
        """Tokens that complete the answer now that `token` was read; None if it began what there is no room for."""
        if self.path and self.path[0] == token:
            return self.path[1:]
        call = self.grammar.call
        begun = _overlap(self._tail + self.grammars.pieces[token], call)
        if self.matcher.is_completed():
            if begun and len(self.grammars.encode(call[begun:])) > self.room - 1:
                return None  # a call's first words: they would stay words
            return []
        if self.path and self._completes(b"".join(self.grammars.pieces[token] for token in self.path)):
            return self.path  # the token made something longer without opening anything
        if begun and self._completes(call[begun:]):
            return self.grammars.encode(call[begun:])
        found = completion(self.matcher)
        return None if found is None else self.grammars.encode(found)

    def _completes(self, text: bytes) -> bool:
        if not self.matcher.accept_string(text):
            return False
        complete = bool(self.matcher.is_completed())
        self.matcher.rollback(1)
        return complete


def _overlap(text: bytes, call: bytes) -> int:
    """How many bytes at the end of `text` are the beginning of `call`; one alone does not count."""
    lengths = range(min(len(text), len(call)), 1, -1)
    return next((length for length in lengths if text.endswith(call[:length])), 0)


class Constrained(LogitsProcessor):  # type: ignore[misc]
    """Keeps some rows of a batch to their grammars; must be the last processor, because it chooses their tokens.

    Rows that are None are free. Scores of a constrained row come out as minus infinity but for the chosen token.
    """

    def __init__(self, grammars: Grammars, rows: Sequence[Row | None]) -> None:
        import xgrammar

        self.grammars = grammars
        self.rows = list(rows)
        width = grammars.info.vocab_size
        self._masks = xgrammar.allocate_token_bitmask(len(rows), width)
        for index, row in enumerate(rows):
            if row is not None:
                self._fill(index, row)

    def finished(self, row: int) -> bool:
        """Whether nothing can follow in this row."""
        found = self.rows[row]
        return found is not None and found.finished

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        self.rows = [self.rows[row] for row in rows]
        self._masks = self._masks[list(rows)]

    def _fill(self, index: int, row: Row) -> None:
        if not row.matcher.fill_next_token_bitmask(self._masks, index):
            self._masks[index] = -1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # (B, T), (B, V) → (B, V)
        import xgrammar

        active = [index for index, row in enumerate(self.rows) if row is not None and not row.finished]
        if not active:
            return scores
        scores = scores.clone()
        width = self.grammars.info.vocab_size
        xgrammar.apply_token_bitmask_inplace(
            scores, self._masks.to(scores.device), vocab_size=min(width, scores.shape[-1]), indices=active
        )
        scores[active, width:] = -torch.inf
        best = scores.argmax(dim=-1).tolist()
        for index in active:
            row = self.rows[index]
            assert row is not None
            chosen = row.choose(scores[index], best[index])
            scores[index] = -torch.inf
            scores[index, chosen] = 0.0
            if not row.finished:
                self._fill(index, row)
                # a complete answer that only an end token may follow needs no end token
                row.finished = row.matcher.is_completed() and not (self._masks[index] & ~self.grammars.ends).any()
        return scores
