"""A vLLM server whose model's tokenizer is on this machine: prompts and answers as tokens, structures included."""

import json
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from agentlab.inference.contract import EngineError, Request
from agentlab.inference.openai_adapters import ServedAdapters, ServerAdapters
from agentlab.inference.openai_reading import Leash
from agentlab.inference.openai_server import Server
from agentlab.inference.templates import as_list
from agentlab.inference.token_stream import News, TokenStreamEngine
from agentlab.models import ModelFiles

_WAIT_S = 0.05


class OpenAITokenEngine(ServedAdapters, TokenStreamEngine):
    """Answers with `/v1/completions` of `vllm serve`, each request on a thread of its own."""

    name = "openai"
    is_elsewhere = True

    def __init__(self, server: Server, model: ModelFiles, context_length: int) -> None:
        """model: its name on the server, and a folder with the same tokenizer. Raises ModelError."""
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        self.model_files = model
        self.device = server.base_url
        self.server = server
        self._context = context_length
        self.tokenizer = AutoTokenizer.from_pretrained(model.folder)
        self._config: Any = AutoConfig.from_pretrained(model.folder).get_text_config()
        has_generation = (model.folder / "generation_config.json").is_file()
        self._generation = GenerationConfig.from_pretrained(model.folder) if has_generation else None
        self._adapters = ServerAdapters(server, possible=True)
        self._inbox: queue.Queue[tuple[int, News | Exception]] = queue.Queue()
        self._running: dict[int, Leash] = {}
        self._keys = 0

    def _begin(self, request: Request, prompt: list[int]) -> int:
        self._keys += 1
        leash = self._running[self._keys] = Leash()
        body: dict[str, Any] = {
            "model": self.model_files.name if request.adapter is None else self._adapters.name(request.adapter),
            "prompt": prompt,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "stop": list(request.stop),
            "stop_token_ids": sorted(self._stop_ids),
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if request.temperature > 0:
            body["seed"] = request.seed
        if request.logprobs and request.structure is None:
            body["logprobs"] = 0
        if request.structure is not None:
            body["structured_outputs"] = {"structural_tag": json.dumps(request.structure)}
        threading.Thread(target=self._read, args=(self._keys, body, leash), daemon=True).start()
        return self._keys

    def _read(self, key: int, body: dict[str, Any], leash: Leash) -> None:
        finish = None
        try:
            for chunk in self.server.chunks("/completions", body, leash):
                if leash.abandoned:
                    return
                with self.server.reading():
                    found = [self._one(key, choice) for choice in chunk.get("choices") or []]
                for news in found:
                    finish = news.finish or finish
                    self._inbox.put((key, news))
            if finish is None:
                raise self.server.broke_off()
        except Exception as error:  # handed to whoever waits for the answer
            self._inbox.put((key, error))

    def _one(self, key: int, choice: dict[str, Any]) -> News:
        """The news in a choice of a chunk. Raises TypeError or AttributeError for one of an unknown form."""
        tokens = choice.get("token_ids")
        if tokens is None and choice.get("text"):
            raise EngineError(f"the server at {self.server.base_url} sends no token ids; is it vLLM?")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        return News(key, list(tokens or []), logprobs, choice.get("finish_reason"), time.monotonic())

    def _news(self) -> list[News]:
        found = []
        try:
            key, one = self._inbox.get(timeout=_WAIT_S)
            while True:
                if key in self._running:  # what comes of abandoned requests is not wanted, errors neither
                    if isinstance(one, Exception):
                        raise one
                    found.append(one)
                    if one.finish is not None:
                        del self._running[key]
                key, one = self._inbox.get_nowait()
        except queue.Empty:
            return found

    def _abort(self, keys: Sequence[int]) -> None:
        for key in keys:
            if (leash := self._running.pop(key, None)) is not None:
                leash.abandon()  # its connection is closed, and the server stops

    def _score(self, tokens: list[int], start: int, adapter: str | None) -> list[float]:
        model = self.model_files.name if adapter is None else self._adapters.name(adapter)
        body = {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        found = self.server.post("/v1/completions", body)
        with self.server.reading():
            rows = found["choices"][0]["prompt_logprobs"]
            return [float(rows[at][str(tokens[at])]["logprob"]) for at in range(start, len(tokens))]

    def _end_token_ids(self) -> set[int]:
        return set(as_list(getattr(self._generation, "eos_token_id", None)))

    def _vocabulary_size(self) -> int:
        return int(self._config.vocab_size)

    def context_length(self) -> int:
        return self._context - 1  # vLLM scores a whole answer only where one token more would fit

    def close(self) -> None:
        self._abort(list(self._running))
        self._adapters.close()
        self.server.close()
