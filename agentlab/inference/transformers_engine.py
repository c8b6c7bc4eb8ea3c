"""The engine on plain transformers and PEFT: runs everywhere, trains and answers on one resident base model."""

import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, GenerationMixin

from agentlab.config import RungName
from agentlab.errors import first_line
from agentlab.events import RecoveryStep
from agentlab.hardware import ledger
from agentlab.hardware.oom import is_out_of_memory, let_go
from agentlab.hardware.recovery import Action, Footprint
from agentlab.hardware.rungs import RUNGS
from agentlab.hardware.sizing import SERVE_TOKENS
from agentlab.inference.batch import Batch
from agentlab.inference.cache import can_be_cut, growing_cache, rows_can_share
from agentlab.inference.constrained import Constrained, Row
from agentlab.inference.contract import Chunk, Completion, OutOfMemoryError, Request
from agentlab.inference.prompt_cache import PromptCache
from agentlab.inference.resident import ResidentModel
from agentlab.inference.templates import as_list
from agentlab.inference.text import Pieces, cut_tokens


class TransformersEngine(ResidentModel):
    """Answers with transformers' `generate` on a resident model.

    Requests are grouped by adapter (one adapter after another decodes faster than a mixed batch) and, within a group,
    sorted by prompt length so that little of a batch is padding; a batch becomes smaller as answers end. In fp32 a
    group's adapter is added to the weights while the group is answered. What a single request has read and written is
    kept for the next one that begins alike, as long as all of it fits into the context that was planned for. It reads
    what is likely to follow along with each of its tokens, where `drafts` is true and that pays.
    """

    name = "transformers"
    drafts = True
    _most_tokens: int | None = None  # a limit below the model's own context, while memory is short

    def _checked_prompt(self, request: Request) -> list[int]:
        self._check_open()
        return super()._checked_prompt(request)

    def _end_token_ids(self) -> set[int]:
        return set(as_list(self._base.generation_config.eos_token_id))

    def _vocabulary_size(self) -> int:
        return int(self._base.config.get_text_config().vocab_size)

    def context_length(self) -> int:
        own = int(self._base.config.max_position_embeddings)
        return own if self._most_tokens is None else min(own, self._most_tokens)

    @functools.cached_property
    def _prompts(self) -> PromptCache:
        """Of single requests; a batch gets the memory."""
        return PromptCache()

    @property
    def _can_draft(self) -> bool:
        """Whether a few tokens cost little more than one, and reading them is nothing but a call of the model.

        On a GPU bitsandbytes has a faster way for one token at 4 bits; what LLM.int8 keeps in 16 bits depends on all.
        """
        cheap = self.rung in ("fp32", "bf16") or (self.rung == "nf4" and self.device == "cpu")
        own = getattr(type(self._base), "prepare_inputs_for_generation", None)  # some Phi begin anew at a length
        return cheap and own is GenerationMixin.prepare_inputs_for_generation

    def cached_tokens(self, request: Request) -> int:
        prompt = self.encode(self.render(request.messages, request.tools))
        return self._prompts.known(request.adapter, prompt) if request.reuse_prompt else 0

    def unload_adapter(self, adapter: str) -> None:
        self._prompts.forget(adapter)
        super().unload_adapter(adapter)

    def _collect(self) -> None:
        self._prompts.clear()
        super()._collect()

    def limit_context(self, tokens: int | None) -> None:
        """Read at most so many tokens of prompt and answer; None: as many as the model can."""
        self._most_tokens = tokens

    def footprint(self, adapter: str | None = None) -> Footprint | None:
        count, size = self._adapter_bytes(adapter)
        per_token = 0 if self._shape is None else ledger.kv_bytes_per_token(self._shape, self.element_bytes)
        return Footprint(
            device="cuda" if self.device == "cuda" else "cpu",
            context_tokens=self.context_length(),
            bytes_per_token=per_token,
            rung=self.rung if self.rung_bytes() else None,
            rung_bytes=self.rung_bytes(),
            idle_adapters=count,
            idle_adapter_bytes=size,
        )

    def relieve(self, action: Action, adapter: str | None = None) -> None:
        match action.kind:
            case "shrink_context":
                self.limit_context(int(action.target))
            case "offload_adapters":
                self.offload_adapters(adapter)
            case "lower_rung":
                self.change_rung(cast(RungName, action.target))
            case _:
                super().relieve(action, adapter)
        self._collect()

    def restore(self, action: Action) -> None:
        match action.kind:
            case "shrink_context":
                self.limit_context(int(action.source))
            case "offload_adapters":
                self.recall_adapters()
            case "lower_rung":
                self.change_rung(cast(RungName, action.source), room_bytes=action.bytes_expected)
            case _:
                super().restore(action)

    def planned_vram_mib(self, rows: int, tokens: int) -> float:
        if self.device == "cpu":
            return 0.0
        weights = self.rung_bytes().get(self.rung) if self.rung is not None else None
        if weights is None:  # of a kind that the ledger does not know, or as stored
            weights = sum(p.numel() * p.element_size() for n, p in self._base.named_parameters() if "lora_" not in n)
        weights += self.adapter_bytes()
        if self._shape is None:
            return weights / ledger.MIB
        rung = RUNGS[self.rung or "nf4"]  # of one that is stored quantized: what is restored in working memory
        planned = ledger.serving(
            self._shape, rows, tokens, weight_bytes=weights, rung=rung, element_bytes=self.element_bytes,
            workspace_bytes=ledger.blas_bytes(1, self.capability),
        )  # fmt: skip
        return planned.total / ledger.MIB

    def answers(
        self, requests: Sequence[Request], batch_size: int = 32, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Completion]]:
        prompts = [self._checked_prompt(request) for request in requests]
        by_adapter: dict[str | None, list[int]] = {}
        for index, request in enumerate(requests):
            by_adapter.setdefault(request.adapter, []).append(index)
        for adapter, indices in by_adapter.items():
            indices.sort(key=lambda i: (-len(prompts[i]), i))  # longest first: memory runs out at once or not at all
            with self.using(adapter):
                start = 0
                while start < len(indices):
                    if should_stop():
                        return
                    batch = indices[start : start + batch_size]
                    try:
                        chosen = [requests[i] for i in batch]
                        if len(requests) > 1:  # what one of several is answered depends on no earlier request
                            chosen = [dataclasses.replace(request, reuse_prompt=False) for request in chosen]
                        done = self._batch(chosen, [prompts[i] for i in batch], should_stop)
                    except Exception as error:
                        if not is_out_of_memory(error):
                            raise
                        let_go(error)
                        held = len(self._prompts)
                        self._collect()
                        if len(batch) == 1 and not held:
                            raise OutOfMemoryError("not even one request fits into the device's memory") from None
                        batch_size = max(1, len(batch) // 2)
                        if batch_size < len(batch):
                            self._tell_of_a_smaller_batch(len(batch), batch_size, error)
                        continue
                    start += len(batch)
                    yield from zip(batch, done, strict=True)

    def _tell_of_a_smaller_batch(self, before: int, after: int, error: Exception) -> None:
        reason = first_line(error)
        self.tell(
            RecoveryStep(
                model=self.model_files.name, action="shrink_batch", source=str(before), target=str(after),
                bytes_expected=0, reason=reason,
            )
        )  # fmt: skip

    def _batch(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        should_stop: Callable[[], bool],
        streamer: Any = None,
    ) -> list[Completion]:
        batch = Batch(
            requests, prompts, self._decode, self.tokenizer.pad_token_id, self._stop_ids, self._constrained(requests),
            should_stop, self.device, rows_can_share(growing_cache(self._base.config)),
        )  # fmt: skip
        started = time.monotonic()
        with torch.inference_mode():
            cache, known = self._read_before(requests, prompts)
            batch.decode(self.model, cache, streamer, self.drafts and self._can_draft and can_be_cut(cache))
        if len(requests) == 1 and requests[0].reuse_prompt:
            self._prompts.keep(requests[0].adapter, [*prompts[0], *batch.tokens[0]], cache)
        return [
            self._completion(request, len(prompts[row]), known, batch, row, started)
            for row, request in enumerate(requests)
        ]

    def _read_before(self, requests: Sequence[Request], prompts: Sequence[list[int]]) -> tuple[DynamicCache, int]:
        """The cache to begin with, and how many tokens of the prompt are in it."""
        cache = None
        if len(requests) > 1:
            self._prompts.clear()
        else:
            (request,), (prompt,) = requests, prompts
            cache = self._prompts.take(request.adapter, prompt) if request.reuse_prompt else None
            kept = min(self.context_length(), SERVE_TOKENS)  # with the one in hand: what serving is planned with
            self._prompts.make_room(kept - len(prompt) - request.max_new_tokens)
        if cache is None:
            return growing_cache(self._base.config), 0
        return cache, cache.get_seq_length()

    def _constrained(self, requests: Sequence[Request]) -> Constrained | None:
        if all(request.structure is None for request in requests):
            return None
        grammars = self._grammars
        rows = [
            None if r.structure is None else Row(grammars, grammars.grammar(r.structure), r.max_new_tokens)
            for r in requests
        ]
        return Constrained(grammars, rows)

    def _completion(
        self, request: Request, prompt_tokens: int, cached_tokens: int, batch: Batch, row: int, started: float
    ) -> Completion:
        tokens, watcher, under = batch.tokens[row], batch.watcher, batch.structured[row]
        complete = under is not None and under.complete
        if under is not None and complete:
            tokens = tokens[: under.count]
        end = next((i for i, token in enumerate(tokens) if token in self._stop_ids), None)
        steps = len(tokens) if end is None else end + 1
        tokens = tokens[:end]
        finish = "stop" if end is not None or complete else "length"
        tokens, text, cut = cut_tokens(tokens, request.stop, self._decode)
        if cut:
            finish, steps = "stop", len(tokens)
        elif finish == "length" and watcher.cancelled and len(tokens) < request.max_new_tokens:
            finish = "cancelled"
        last = watcher.times[min(steps, len(watcher.times)) - 1] if watcher.times and steps else time.monotonic()
        return Completion(
            text=text,
            token_ids=tokens,
            finish_reason=finish,  # type: ignore[arg-type]
            prompt_tokens=prompt_tokens,
            latency_s=last - started,
            logprobs=batch.logprobs[row][: len(tokens)] if request.logprobs else None,
            cached_tokens=cached_tokens,
        )

    def stream(self, request: Request, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Chunk]:
        prompt = self._checked_prompt(request)
        tokens: queue.Queue[Any] = queue.Queue()
        abandoned = threading.Event()

        def work() -> None:
            stop = lambda: abandoned.is_set() or should_stop()  # noqa: E731
            speaker = _TokenQueue(tokens, len(prompt))
            try:
                with self.using(request.adapter):
                    try:
                        tokens.put(self._batch([request], [prompt], stop, speaker)[0])
                    except Exception as error:
                        if speaker.spoke or not len(self._prompts) or not is_out_of_memory(error):
                            raise
                        let_go(error)
                        self._collect()  # the room of prompts that were kept
                        tokens.put(self._batch([request], [prompt], stop, _TokenQueue(tokens, len(prompt)))[0])
            except BaseException as error:  # handed to the consumer, who raises it
                tokens.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        pieces = Pieces(request.stop)
        seen: list[int] = []
        try:
            while True:
                item = tokens.get()
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Completion):
                    yield Chunk(pieces.rest(item.text), item)
                    return
                seen.append(item)
                if piece := pieces.more(self._decode(seen)):
                    yield Chunk(piece)
        finally:
            abandoned.set()
            worker.join()

    def close(self) -> None:
        self._peft = None
        self._base = None
        self._sums = None
        self._collect()


class _TokenQueue:
    """A transformers streamer that hands each token on; the prompt comes first and is left out."""

    def __init__(self, tokens: "queue.Queue[Any]", prompt_length: int) -> None:
        self.tokens = tokens
        self.skip = prompt_length
        self.spoke = False

    def put(self, value: torch.Tensor) -> None:
        for token in value.reshape(-1).tolist():
            if self.skip:
                self.skip -= 1
            else:
                self.tokens.put(token)
                self.spoke = True

    def end(self) -> None:
        pass
