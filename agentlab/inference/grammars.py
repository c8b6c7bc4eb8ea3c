"""Structural tags compiled for one tokenizer, and the shortest text that completes an answer under them."""

import itertools
import json
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from agentlab.inference.contract import EngineError

_KEPT = 512  # compiled grammars; one of a few tools takes some hundred KiB
_LONGEST_PIECE = 32  # bytes of a token that are tried when text is cut into tokens
_LONGEST_COMPLETION = 4096  # bytes after which no completion is looked for
_BYTES = [
    bytes([byte])
    for byte in sorted(range(256), key=lambda b: (b != ord('"'), not 48 <= b < 58, not chr(b).isalpha(), b <= 32, b))
]


@dataclass(frozen=True)
class Grammar:
    """A compiled structural tag. `call` is the shortest call under it, begin to end; empty where none can be made.

    required: whether an answer without a call is no answer. tokens_needed: of the shortest call.
    """

    compiled: Any
    call: bytes
    tokens_needed: int
    required: bool


class Grammars:
    """The grammars of one engine, compiled once each."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary_size: int,
        stop_ids: Collection[int],
        control_ids: Collection[int],
    ) -> None:
        """`control_ids`: tokens that no structured answer may hold, although their names could be read as text."""
        import xgrammar

        stops = sorted(stop_ids)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary_size, stop_token_ids=stops)
        names = [""] * vocabulary_size
        for name, token in tokenizer.get_vocab().items():
            if token < vocabulary_size and (token not in control_ids or token in stop_ids):
                names[token] = name  # a token without a name is special to xgrammar: never allowed
        self.info = xgrammar.TokenizerInfo(
            names,
            info.vocab_type,
            vocab_size=vocabulary_size,
            stop_token_ids=stops,
            add_prefix_space=info.add_prefix_space,
        )
        self.stop_ids = frozenset(stops)
        self.pieces: list[bytes] = self.info.decoded_vocab
        self.ends = xgrammar.allocate_token_bitmask(1, vocabulary_size)[0].zero_()  # the mask of the stop tokens
        for token in stops:
            self.ends[token // 32] |= -(2**31) if token % 32 == 31 else 1 << token % 32
        barred = {*self.info.special_token_ids, *stops}
        self._by_bytes: dict[bytes, int] = {}
        for token, piece in enumerate(self.pieces):
            if piece and token not in barred:
                self._by_bytes.setdefault(piece, token)
        self._compiler = xgrammar.GrammarCompiler(self.info, max_threads=2, cache_enabled=False)
        self._known: OrderedDict[str, Grammar] = OrderedDict()

    def grammar(self, structure: Mapping[str, Any]) -> Grammar:
        """The compiled structural tag. Raises EngineError for one that xgrammar does not take."""
        key = json.dumps(structure, ensure_ascii=False)
        if key not in self._known:
            self._known[key] = self._compile(key, structure)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _compile(self, text: str, structure: Mapping[str, Any]) -> Grammar:
        import xgrammar

        try:
            compiled = self._compiler.compile_structural_tag(text)
        except (RuntimeError, ValueError, TypeError) as error:
            raise EngineError(f"not a structural tag: {str(error).splitlines()[0]}") from None
        matcher = xgrammar.GrammarMatcher(compiled)
        required = not matcher.is_completed()
        calls = []
        for begin in {begin.encode(): None for begin in _begins(structure)}:
            if matcher.accept_string(begin):
                rest = completion(matcher)
                calls += [] if rest is None else [begin + rest]
                matcher.rollback(1)
        if not calls and required:
            whole = completion(matcher)
            if whole is None:
                raise EngineError("a structure that no text fits")
            calls = [whole]
        call = min(calls, key=lambda text: len(self.encode(text)), default=b"")
        return Grammar(compiled, call, len(self.encode(call)), required)

    def encode(self, text: bytes) -> list[int]:
        """Tokens that spell `text`, the longest first; any way of cutting it will do for a grammar."""
        tokens = []
        position = 0
        while position < len(text):
            for length in range(min(_LONGEST_PIECE, len(text) - position), 0, -1):
                token = self._by_bytes.get(text[position : position + length])
                if token is not None:
                    tokens.append(token)
                    position += length
                    break
            else:
                raise EngineError(f"the tokenizer has no token for byte {text[position]}")
        return tokens


def _begins(node: Any) -> Iterator[str]:
    """What the tags of a structural tag begin with."""
    if isinstance(node, Mapping):
        if node.get("type") == "tag" and isinstance(node.get("begin"), str):
            yield node["begin"]
        yield from itertools.chain.from_iterable(_begins(inner) for inner in node.values())
    elif isinstance(node, list | tuple):
        yield from itertools.chain.from_iterable(_begins(inner) for inner in node)


def completion(matcher: Any) -> bytes | None:
    """Text that completes what `matcher` has read, close to the shortest there is; None if none was found.

    What the grammar forces is taken, what closes is preferred; the matcher is left as it was.
    """
    text = b""
    steps = choices = 0
    while not matcher.is_completed():
        forced = _forced(matcher)
        piece = forced if forced and matcher.accept_string(forced) else _closing(matcher, text[-1:])
        if piece is None:  # nothing closes here: in turn, so that no repetition is followed for ever
            piece = _any_byte(matcher, choices // 3)
            choices += 1
        if piece is None or len(text) > _LONGEST_COMPLETION:
            matcher.rollback(steps + (piece is not None))
            return None
        text += piece
        steps += 1
    if steps:
        matcher.rollback(steps)
    return text


def _forced(matcher: Any) -> bytes:
    """What can be the only continuation; empty inside a character of several bytes, which xgrammar cannot tell."""
    try:
        return str(matcher.find_jump_forward_string()).encode()
    except UnicodeDecodeError:
        return b""


def _accepts(matcher: Any, text: bytes) -> bool:
    accepted = bool(matcher.accept_string(text))
    if accepted:
        matcher.rollback(1)
    return accepted


def _closing(matcher: Any, before: bytes) -> bytes | None:
    """The byte that closes what is open, read by the matcher; None if nothing can be closed here.

    A comma ends a number where something has to follow; after another one it would be text.
    """
    brace, bracket = _accepts(matcher, b"}"), _accepts(matcher, b"]")
    order: tuple[bytes, ...] = (b"}",) if brace else (b"]",) if bracket else (b",",) if before != b"," else ()
    if brace and bracket:  # inside free text: a line of thought, or a string
        order = (b"\n", b'"')
    return next((byte for byte in order if matcher.accept_string(byte)), None)


def _any_byte(matcher: Any, turn: int) -> bytes | None:
    """The turn-th byte that the grammar allows, read by the matcher."""
    allowed = list(itertools.islice((byte for byte in _BYTES if _accepts(matcher, byte)), turn + 1))
    if not allowed:
        return None
    chosen = allowed[turn % len(allowed)]
    matcher.accept_string(chosen)
    return chosen
