"""Engines whose model runs in another process and sends its tokens as they come."""

import abc
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from agentlab.errors import AdapterError
from agentlab.inference.constrained import Row
from agentlab.inference.contract import Chunk, Completion, EngineError, Request
from agentlab.inference.templates import TemplatedEngine
from agentlab.inference.text import Decode, Pieces, cut_tokens


@dataclasses.dataclass(frozen=True)
class News:
    """What became of one request: its new tokens, each with its log-probability if they were asked for.

    finish: "stop" (end token or stop string), "length", or None while it goes on; at_s: monotonic seconds.
    cached_tokens: of the prompt, how many were not read again. error: why there will be no answer.
    """

    key: int
    tokens: list[int]
    logprobs: list[float] | None
    finish: str | None
    at_s: float
    cached_tokens: int = 0
    error: EngineError | None = None


class Answer:
    """One answer as it grows. Under a structure it is kept completable within its limit, and closed where it has to be.

    `done` turns true when nothing may follow, which can be before the model's process knows it.
    """

    def __init__(self, request: Request, prompt: list[int], row: Row | None, stop_ids: frozenset[int]) -> None:
        self.request = request
        self.prompt = prompt
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.cached_tokens = 0
        self.done = False
        self.finish = "length"
        self._row = row
        self._stop_ids = stop_ids
        self.started_s = self.last_s = time.monotonic()

    def add(self, news: News) -> None:
        """Take in what has come; nothing is taken once the answer is done. Raises what the news say went wrong."""
        if self.done:
            return
        if news.error is not None:
            raise news.error
        self.last_s = news.at_s
        self.cached_tokens = news.cached_tokens
        if news.finish not in (None, "stop", "length"):
            raise EngineError(f"the model's process ended the request with {news.finish}")
        ended_by_stop = news.finish == "stop"
        for number, token in enumerate(news.tokens):
            if token in self._stop_ids:
                self.done, self.finish = True, "stop"
                return
            if self._row is not None and not self._row.take(token):
                self._close()
                return
            self.tokens.append(token)
            if news.logprobs is not None:
                self.logprobs.append(news.logprobs[number])
            if self._row is not None and not ended_by_stop and (self._row.finished or self._row.must_end()):
                self._close()
                return
            if len(self.tokens) >= self.request.max_new_tokens:
                break
        if news.finish is not None:
            self.done, self.finish = True, news.finish
            if self._row is not None and not ended_by_stop:
                self._close()

    def _close(self) -> None:
        assert self._row is not None
        closing = self._row.close()
        self.tokens += closing
        self.done = True
        whole = bool(closing) or self._row.must_end()
        self.finish = "stop" if whole else "length"

    def completion(self, decode: Decode, cancelled: bool = False) -> Completion:
        """What the request has come to."""
        tokens, text, cut = cut_tokens(self.tokens, self.request.stop, decode)
        finish = "stop" if cut else "cancelled" if cancelled and not self.done else self.finish
        return Completion(
            text=text,
            token_ids=tokens,
            finish_reason=finish,  # type: ignore[arg-type]
            prompt_tokens=len(self.prompt),
            latency_s=max(self.last_s - self.started_s, 1e-6),
            logprobs=self.logprobs[: len(tokens)] if self.request.logprobs else None,
            cached_tokens=self.cached_tokens,
        )


class TokenStreamEngine(TemplatedEngine):
    """Prompts go out as tokens, answers come back as tokens: everything between is done here, the same for each.

    At most `batch_size` requests are out at once; the next one follows as soon as one is done.
    """

    @abc.abstractmethod
    def _begin(self, request: Request, prompt: list[int]) -> int:
        """Send a request; the key under which its news will come."""

    @abc.abstractmethod
    def _news(self) -> list[News]:
        """Wait a moment for news of any request; empty when there was none. Raises what broke."""

    @abc.abstractmethod
    def _abort(self, keys: Sequence[int]) -> None:
        """Let go of requests that are not done yet; their news are not wanted any more."""

    @abc.abstractmethod
    def _score(self, tokens: list[int], start: int, adapter: str | None) -> list[float]:
        """The model's log-probabilities of the tokens from `start` on."""

    def _has_room(self, adapter: str | None, out: Sequence[str | None]) -> bool:
        """Whether a request with this adapter may join those that are out with theirs; always, where none are."""
        return True

    def _check_request(self, request: Request) -> None:
        """Refuse what this engine cannot do. Raises EngineError or AdapterError."""
        if request.adapter is not None and request.adapter not in self.adapters():
            loaded = ", ".join(self.adapters()) or "none"
            raise AdapterError(f"adapter {request.adapter} is not loaded; loaded: {loaded}")

    def _answer(self, request: Request, prompt: list[int]) -> Answer:
        row = None
        if request.structure is not None:
            row = Row(self._grammars, self._grammars.grammar(request.structure), request.max_new_tokens)
        return Answer(request, prompt, row, self._stop_ids)

    def _completed(self, answer: Answer) -> Completion:
        if answer.request.logprobs and answer.request.structure is not None and answer.tokens:
            # vLLM's own are those of the masked logits; and what closed an answer was not the model's at all
            whole = answer.prompt + answer.tokens
            answer.logprobs = self._score(whole, len(answer.prompt), answer.request.adapter)
        return answer.completion(self._decode)

    def answers(
        self, requests: Sequence[Request], batch_size: int = 32, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Completion]]:
        for request in requests:
            self._check_request(request)
        waiting = deque(enumerate([self._checked_prompt(request) for request in requests]))
        running: dict[int, tuple[int, Answer]] = {}
        try:
            while waiting or running:
                if should_stop():
                    self._abort(list(running))
                    cancelled, running = list(running.values()), {}
                    yield from ((index, answer.completion(self._decode, True)) for index, answer in cancelled)
                    return
                while waiting and len(running) < batch_size:
                    out = [answer.request.adapter for _, answer in running.values()]
                    if not self._has_room(requests[waiting[0][0]].adapter, out):
                        break
                    index, prompt = waiting.popleft()
                    answer = self._answer(requests[index], prompt)
                    running[self._begin(requests[index], prompt)] = index, answer
                for news in self._news():
                    if news.key not in running:
                        continue
                    index, answer = running[news.key]
                    answer.add(news)
                    if answer.done:
                        del running[news.key]
                        if news.finish is None:
                            self._abort([news.key])
                        yield index, self._completed(answer)
        finally:
            if running:
                self._abort(list(running))

    def stream(self, request: Request, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Chunk]:
        self._check_request(request)
        prompt = self._checked_prompt(request)
        answer, pieces = self._answer(request, prompt), Pieces(request.stop)
        key = self._begin(request, prompt)
        finished = False
        try:
            while not answer.done:
                if should_stop():
                    whole = answer.completion(self._decode, True)
                    yield Chunk(pieces.rest(whole.text), whole)
                    return
                for news in self._news():
                    if news.key == key:
                        answer.add(news)
                        finished = finished or news.finish is not None
                if not answer.done and (piece := pieces.more(self._decode(answer.tokens))):
                    yield Chunk(piece)
            whole = self._completed(answer)
            yield Chunk(pieces.rest(whole.text), whole)
        finally:
            if not finished:
                self._abort([key])
