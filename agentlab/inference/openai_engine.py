"""The engine on a server that speaks OpenAI's chat protocol: Ollama, llama.cpp, LM Studio, vLLM, …

The server writes the prompt from the messages. Where it reads the model's tool calls itself, they come back as text in
the project's own tags, so that they are read as every other engine's.
"""

import concurrent.futures
import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from agentlab.config import ModelSettings
from agentlab.inference.contract import Capabilities, Chunk, Completion, Engine, EngineError, Request
from agentlab.inference.openai_adapters import ServedAdapters, ServerAdapters
from agentlab.inference.openai_answer import Growing
from agentlab.inference.openai_reading import Reading
from agentlab.inference.openai_server import Known, RefusedByServer, Server, Unavailable, UnknownForm
from agentlab.inference.text import Pieces, cut_at_stop
from agentlab.models import ModelFiles
from agentlab.toolformat import TAGS, CallStyle, Tool, template_tools

T = TypeVar("T")

DEFAULT_CONTEXT = 4096  # what Ollama gives a model that is not told otherwise
CONCURRENT = 8
_WAIT_S = 0.05
UNKNOWN_TOKEN = -1
_BYTES_PER_TOKEN = 3.0  # of English text more, of Japanese about so many: rather too many tokens than too few
_MESSAGE_TOKENS = 5
_PROBE = [{"role": "user", "content": "Name a colour."}]
_PROBE_TOOL = {"name": "f", "description": "Does nothing", "parameters": {"type": "object", "properties": {}}}


def open_server(settings: ModelSettings, name: str, tokenizer: Path | None = None) -> Engine:
    """The engine for the model `name` on the server of these settings.

    tokenizer: a folder on this machine with the model's own tokenizer; with it, a vLLM server is spoken to in tokens,
    and structures can be kept. Raises ModelError for a model that the server does not have, EngineError where it
    cannot be reached, ConfigError for a key that is not there.
    """
    assert settings.base_url is not None
    server = Server(settings.base_url, settings.api_key_env)
    try:
        known = server.known(name)
        folder = tokenizer or known.folder
        context = min(filter(None, (settings.context_length, known.context_length)), default=DEFAULT_CONTEXT)
        if known.kind == "vllm" and folder is not None and (folder / "config.json").is_file():
            from agentlab.inference.openai_tokens import OpenAITokenEngine

            return OpenAITokenEngine(server, ModelFiles(name, folder, ""), context)
        return OpenAIEngine(server, known, name, context, folder)
    except BaseException:
        server.close()
        raise


class OpenAIEngine(ServedAdapters, Engine):
    """Answers with `/v1/chat/completions`. What the server cannot do is found out when it is first asked for."""

    name = "openai"
    is_elsewhere = True

    def __init__(
        self, server: Server, known: Known, model: str, context_length: int, tokenizer: Path | None = None
    ) -> None:
        self.server = server
        self.known = known
        self.model = model
        self.model_files = ModelFiles(model, tokenizer or Path(), "")
        self.device = server.base_url
        self._context = context_length
        self._folder = tokenizer
        self._adapters = ServerAdapters(server, known.kind == "vllm")
        self._opens: bool | None = None  # whether the template opens a thought; None: the server was not asked yet

    # -- what the server can do ---------------------------------------------------------------------------------------

    def capabilities(self) -> Capabilities:
        return Capabilities(
            logprobs=self._gives_logprobs,
            seeds=self._keeps_seeds,
            structure=False,
            tools=self._takes_tools,
            adapters=self._adapters.possible,
            exact_tokens=self.known.kind == "vllm",
        )

    @functools.cached_property
    def _gives_logprobs(self) -> bool:
        with contextlib.suppress(RefusedByServer, UnknownForm):
            return bool(self._ask(self._body(Request(_PROBE, max_new_tokens=1)) | {"logprobs": True}).logprobs)
        return False

    @functools.cached_property
    def _keeps_seeds(self) -> bool:
        """Whether one seed gives one answer, tried three times."""
        body = self._body(Request(_PROBE, max_new_tokens=12, temperature=1.5, seed=5))
        return len({self._ask(body).whole() for _ in range(3)}) == 1

    @functools.cached_property
    def _takes_tools(self) -> bool:
        if self.known.kind == "vllm":  # it reads calls only with a parser; its template shows them or does not
            return self._tokenized(_PROBE, [_PROBE_TOOL]) > self._tokenized(_PROBE, None)
        shown: bool | None = None
        if self.known.kind == "ollama":
            shown = self._unless_it_fails(self._says_tools)
        if shown is None:  # llama.cpp without --jinja fails instead of refusing
            shown = self._unless_it_fails(self._reads_tools)
        return bool(shown)

    def _says_tools(self) -> bool:
        found = self.server.post("/api/show", {"model": self.model})
        with self.server.reading():
            return "tools" in (found.get("capabilities") or [])

    def _reads_tools(self) -> bool:
        """Whether a prompt with a tool is taken, and is longer than without: ignored tools make it no longer."""
        sizes = [
            self._ask(self._body(Request(_PROBE, max_new_tokens=1, tools=tools), check=False)).usage
            for tools in ([_PROBE_TOOL], None)
        ]
        shown, bare = (size.get("prompt_tokens") for size in sizes)
        return shown is None or bare is None or shown > bare

    @staticmethod
    def _unless_it_fails(found_out: Callable[[], T]) -> T | None:
        """What is found out; None where the server fails at it. Raises Unavailable: then nothing was found out."""
        try:
            return found_out()
        except Unavailable:
            raise
        except EngineError:
            return None

    def call_style(self) -> CallStyle | None:
        return TAGS if self._takes_tools and self.known.kind != "vllm" else None

    def opens_thought(self, messages: list[dict[str, Any]]) -> bool:
        """By the prompt, where the server shows it; else, and where the server takes thoughts out, by its answers."""
        if self._opens is None:
            with contextlib.suppress(Unavailable):  # it is asked again the next time
                self._opens = (self._unless_it_fails(self._prompt) or "").rstrip().endswith("<think>")
        return bool(self._opens)

    def _prompt(self) -> str:
        """The prompt that the server makes of a chat; "" where it does not show it."""
        if self.known.kind == "llama.cpp":
            shown = self.server.post("/apply-template", {"messages": _PROBE})
            with self.server.reading():
                return str(shown["prompt"])
        if self.known.kind == "vllm":
            read = self.server.post("/tokenize", {"model": self.model, "messages": _PROBE})
            with self.server.reading():
                shown = self.server.post("/detokenize", {"model": self.model, "tokens": read["tokens"]})
                return str(shown["prompt"])
        return ""

    def _learn(self, text: str, finished: bool) -> None:
        """From one answer: a lone </think> shows that the template opens the thought, a whole one without shows not."""
        begin, end = text.find("<think>"), text.find("</think>")
        if end >= 0:
            self._opens = begin < 0 or end < begin
        elif finished:
            self._opens = False

    # -- requests -----------------------------------------------------------------------------------------------------

    def _body(self, request: Request, check: bool = True) -> dict[str, Any]:
        """What is posted for a request. Raises EngineError for what the server cannot do."""
        where = f"the server at {self.server.base_url}"
        model = self.model if request.adapter is None else self._adapters.name(request.adapter)
        if request.structure is not None:
            raise EngineError(
                f"{where} keeps no structures here; allowed: requests without one, or a vLLM server whose model's "
                "tokenizer is on this machine (model.tokenizer)"
            )
        body: dict[str, Any] = {
            "model": model,
            "messages": [_message(message) for message in request.messages],
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "stream_options": {"include_usage": True},
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if request.temperature > 0:
            body["seed"] = request.seed
        if request.tools:
            if check and self.call_style() is None:
                raise EngineError(f"{where} shows no tools to {self.model}")
            body["tools"] = template_tools(request.tools)
        if self.known.kind == "vllm":
            body["return_token_ids"] = True
        return body

    def _checked(self, request: Request) -> dict[str, Any]:
        body = self._body(request)
        if request.logprobs:
            if not self._gives_logprobs:
                raise EngineError(f"the server at {self.server.base_url} gives no log-probabilities of {self.model}")
            body["logprobs"] = True
        if request.temperature > 0 and not self._keeps_seeds:
            raise EngineError(
                f"the server at {self.server.base_url} answers one seed in different ways; allowed: temperature 0"
            )
        size = self.count_tokens(request.messages, request.tools)
        if size + request.max_new_tokens > self._context:
            raise EngineError(
                f"a prompt of {size} tokens and {request.max_new_tokens} new ones exceed the model's context of "
                f"{self._context} tokens (model.context_length)"
            )
        return body

    def _ask(self, body: dict[str, Any]) -> Growing:
        growing = Growing()
        for chunk in self.server.chunks("/chat/completions", body):
            with self.server.reading():
                growing.add(chunk)
        if growing.finish is None:  # what is found out by half an answer would be believed for good
            raise self.server.broke_off(growing.empty)
        return growing

    def answers(
        self, requests: Sequence[Request], batch_size: int = 32, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Completion]]:
        bodies = [self._checked(request) for request in requests]
        asked = threading.Event()
        size = max(1, min(batch_size, CONCURRENT))
        waiting = list(enumerate(zip(requests, bodies, strict=True)))[::-1]
        running: dict[concurrent.futures.Future[Completion], int] = {}
        with concurrent.futures.ThreadPoolExecutor(size) as pool:
            try:
                while waiting or running:
                    if should_stop():
                        asked.set()
                        waiting.clear()
                    while waiting and len(running) < size:
                        index, (request, body) = waiting.pop()
                        running[pool.submit(self._whole, request, body, asked.is_set)] = index
                    first = concurrent.futures.FIRST_COMPLETED
                    for future in concurrent.futures.wait(running, 0.02, first).done:
                        yield running.pop(future), future.result()
            finally:
                asked.set()

    def _whole(self, request: Request, body: dict[str, Any], should_stop: Callable[[], bool]) -> Completion:
        *_, last = self._streamed(request, body, should_stop)
        assert last.completion is not None
        return last.completion

    def stream(self, request: Request, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Chunk]:
        return self._streamed(request, self._checked(request), should_stop)

    def _streamed(self, request: Request, body: dict[str, Any], should_stop: Callable[[], bool]) -> Iterator[Chunk]:
        growing, pieces = Growing(), Pieces(request.stop)
        started = last_s = time.monotonic()
        cancelled = False
        reading = Reading(lambda leash: self.server.chunks("/chat/completions", body, leash))
        try:
            while not reading.ended:
                chunk = reading.take(_WAIT_S)
                if chunk is not None:
                    with self.server.reading():
                        growing.add(chunk)
                    last_s = time.monotonic()
                if chunk is not None and (piece := pieces.more(growing.text)):
                    yield Chunk(piece)
                if should_stop():
                    cancelled = growing.finish is None
                    break
                if cut_at_stop(growing.text, request.stop) != growing.text:
                    break  # the server knows no stop strings
        finally:
            reading.abandon()
        completion = self._completion(request, growing, last_s - started, cancelled)
        yield Chunk(pieces.rest(completion.text), completion)

    def _completion(self, request: Request, growing: Growing, latency_s: float, cancelled: bool) -> Completion:
        whole = growing.whole()
        text = cut_at_stop(whole, request.stop)
        if growing.finish is None and not cancelled and text == whole:
            raise self.server.broke_off(growing.empty)
        finish = "length" if growing.finish == "length" else "stop"
        if cancelled or text != whole:
            finish = "stop" if text != whole else "cancelled"
        self._learn(whole, growing.finish == "stop")
        tokens = self._tokens(growing, text)
        logprobs = growing.logprobs[: len(tokens)] if request.logprobs else None
        if logprobs is not None:
            tokens = tokens[: len(logprobs)]
        prompt_tokens = growing.usage.get("prompt_tokens") or self.count_tokens(request.messages, request.tools)
        return Completion(text, tokens, finish, prompt_tokens, max(latency_s, 1e-6), logprobs)  # type: ignore[arg-type]

    def _tokens(self, growing: Growing, text: str) -> list[int]:
        """The server's own token ids; else a known tokenizer's; else so many unknown ones as it, or a guess, says."""
        if growing.tokens:
            return self._without_end(growing)
        if self._tokenizer is not None:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        counted = len(growing.logprobs) or growing.usage.get("completion_tokens") or _guess(text)
        return [UNKNOWN_TOKEN] * int(counted)

    def _without_end(self, growing: Growing) -> list[int]:
        """Without the end token, which a server counts among the generated ones."""
        return growing.tokens[:-1] if growing.finish == "stop" and len(growing.tokens) > 1 else growing.tokens

    # -- tokens -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _tokenizer(self) -> Any:
        if self._folder is None:
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder)

    def count_tokens(self, messages: list[dict[str, Any]], tools: Sequence[Tool] | None = None) -> int:
        """Tokens of the prompt: the server's own count where it is vLLM, a known tokenizer's, else an upper guess."""
        if self.known.kind == "vllm":
            return self._tokenized(messages, tools)
        if self._tokenizer is not None and self._tokenizer.chat_template is not None:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=template_tools(tools) if tools else None, tokenize=False, add_generation_prompt=True,
            )  # fmt: skip
            return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        shown = json.dumps(template_tools(tools), ensure_ascii=False) if tools else ""
        texts = [json.dumps(_message(message), ensure_ascii=False) for message in messages]
        return sum(map(_guess, [*texts, shown])) + _MESSAGE_TOKENS * len(messages)

    def _tokenized(self, messages: list[dict[str, Any]], tools: Sequence[Tool] | None) -> int:
        body: dict[str, Any] = {"model": self.model, "messages": [_message(message) for message in messages]}
        if tools:
            body["tools"] = template_tools(tools)
        found = self.server.post("/tokenize", body)
        with self.server.reading():
            return int(found["count"])

    def context_length(self) -> int:
        return self._context

    def close(self) -> None:
        self._adapters.close()
        self.server.close()


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the protocol has it: a call's arguments are a JSON text."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    sent = []
    for call in calls:
        function = dict(call["function"])
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
        sent.append({**call, "function": function})
    return {**message, "tool_calls": sent}


def _guess(text: str) -> int:
    return round(len(text.encode()) / _BYTES_PER_TOKEN)
