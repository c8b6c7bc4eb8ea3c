"""One batch of requests through transformers' `generate`; it becomes smaller as answers end."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from agentlab.hardware.ledger import SHARE_ROWS, SHARE_TOKENS
from agentlab.inference import drafts
from agentlab.inference.constrained import Constrained
from agentlab.inference.contract import Request
from agentlab.inference.decoding import SeededSampling, Watcher, common_prefix


class Batch:
    """Requests for one model with one adapter, and what was generated for each.

    tokens: the new ones of each request, up to where its answer ended, an end token included. logprobs: one for each of
    them, or more, where any request asked for them. watcher: when each token came. structured: the rows' grammars.
    """

    def __init__(
        self, requests: Sequence[Request], prompts: Sequence[list[int]], decode: Callable[[list[int]], str],
        pad: int, ends: Collection[int], constrained: Constrained | None, should_stop: Callable[[], bool], device: str,
        share: bool = True,
    ) -> None:  # fmt: skip
        """share: whether rows may begin with a copy of what they have in common."""
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]
        self.structured = [None] * len(requests) if constrained is None else list(constrained.rows)
        self._pad = pad
        self._longest = longest = max(len(prompt) for prompt in prompts)
        shared = common_prefix(prompts) if share and len(prompts) >= SHARE_ROWS else 0
        self._shared = shared = shared if shared >= SHARE_TOKENS else 0
        # (B, T): what all prompts begin with, padding, the rest of each prompt
        rows = [(p[:shared], longest - len(p), p[shared:]) for p in prompts]
        self._ids = torch.tensor([head + [pad] * gap + tail for head, gap, tail in rows], device=device)
        self._mask = torch.tensor([[1] * shared + [0] * gap + [1] * len(tail) for _, gap, tail in rows], device=device)
        self._wants_logprobs = any(request.logprobs for request in requests)
        finished = (lambda row: False) if constrained is None else constrained.finished
        limits = [request.max_new_tokens for request in requests]
        self.watcher = Watcher(decode, [r.stop for r in requests], limits, longest, ends, should_stop, finished)
        self._hooks: list[SeededSampling | Constrained] = []
        if any(request.temperature > 0 for request in requests):
            self._hooks.append(SeededSampling([r.temperature for r in requests], [r.seed for r in requests]))
        if constrained is not None:
            self._hooks.append(constrained)  # the last: it chooses

    def decode(self, model: Any, cache: DynamicCache, streamer: Any = None, draft: bool = False) -> None:
        """Generate until every answer has ended. The cache may hold a single prompt's beginning; it grows in place.

        draft: let a single request read along what is likely to follow; its cache has to be one that can be cut.
        """
        if draft and len(self.tokens) == 1:
            self._decode_drafting(model, cache, streamer)
            return
        going = list(range(len(self.tokens)))  # whose answers have not ended
        if self._shared:  # read once, then copied for every row
            model(input_ids=self._ids[:1, : self._shared], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(going))
        while going:
            output = self._generate(model, cache, streamer)
            sequences = output.sequences[:, self._longest :].tolist()
            for row, sequence, length in zip(going, sequences, self.watcher.ended, strict=True):
                self.tokens[row] = sequence[:length]
            if self._wants_logprobs:
                new = _logprobs(output.logits, output.sequences[:, self._ids.shape[1] :])
                for row, values in zip(going, new, strict=True):
                    self.logprobs[row] += values
            left = self.watcher.going_on()
            going = [going[row] for row in left]
            if left:
                self._select(left, output.sequences, cache)

    def _decode_drafting(self, model: Any, cache: DynamicCache, streamer: Any) -> None:
        under = self.structured[0]
        if streamer is not None:
            streamer.put(self._ids)
        ids, logprobs = drafts.decode(
            model, cache, self._ids, self.watcher.limits[0], self._hooks,
            lambda ids: bool(self.watcher(ids, None).all()),
            (lambda: ()) if under is None else (lambda: () if under.finished else under.path),
            (lambda token: None) if streamer is None else streamer.put,
        )  # fmt: skip
        self.tokens[0] = ids[0, self._longest :].tolist()
        self.logprobs[0] = logprobs if self._wants_logprobs else []

    def _generate(self, model: Any, cache: DynamicCache, streamer: Any) -> Any:
        return model.generate(
            past_key_values=cache,
            input_ids=self._ids,
            attention_mask=self._mask,
            max_new_tokens=max(self.watcher.limits) - (self._ids.shape[1] - self._longest),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self._pad,
            logits_processor=LogitsProcessorList(self._hooks),
            stopping_criteria=StoppingCriteriaList([self.watcher]),
            return_dict_in_generate=True,
            output_logits=self._wants_logprobs,
            streamer=streamer,
        )

    def _select(self, rows: list[int], sequences: torch.Tensor, cache: DynamicCache) -> None:
        """Go on with these rows, counted in the batch as it is now; sequences: (B, T) with what was generated."""
        index = torch.tensor(rows, device=sequences.device)
        cache.reorder_cache(index)  # of all kinds of layers; fewer rows are a choice among them
        self._ids = sequences[index]
        new = self._ids.shape[1] - self._mask.shape[1]
        self._mask = torch.nn.functional.pad(self._mask[index], (0, new), value=1)
        for hook in (self.watcher, *self._hooks):
            hook.select(rows)


def _logprobs(logits: Sequence[torch.Tensor], generated: torch.Tensor) -> list[list[float]]:
    columns = []
    for step, scores in enumerate(logits):  # (B, V) each; one step at a time keeps one fp32 copy, not all
        chosen, exact = generated[:, step : step + 1], scores.float()
        columns.append(exact.gather(1, chosen).squeeze(1) - exact.logsumexp(1))
    return torch.stack(columns, dim=1).tolist() if columns else [[] for _ in generated]
