"""Hooks into transformers' generate: seeded sampling per row, stop strings, clocks, cancelling."""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

_LEAST_TEMPERATURE = 1e-6  # below it, scores divided by it grow beyond what noise can change, and at last overflow
_TAIL = 24  # tokens looked back at for a stop string
_LEAST_ROWS = 4  # of a batch that is made smaller once answers have ended
_ENDED_PART = 0.25


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Sampling by the Gumbel trick: argmax(logits / T + g) has the softmax distribution at temperature T.

    Each row draws its noise from its own generator, so an answer depends on its seed alone and not on its neighbours;
    rows at temperature 0, or so little above that noise decides nothing but near ties, stay greedy.
    """

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[int]) -> None:
        self.temperatures = list(temperatures)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        self.temperatures = [self.temperatures[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # (B, T), (B, V) → (B, V)
        scores = scores.clone()
        for row, (temperature, generator) in enumerate(zip(self.temperatures, self.generators, strict=True)):
            if temperature >= _LEAST_TEMPERATURE:
                uniform = torch.rand(scores.shape[-1], generator=generator).clamp_(1e-10, 1 - 1e-7)
                gumbel = -torch.log(-torch.log(uniform))
                scores[row] = scores[row].float() / temperature + gumbel.to(scores.device)
        return scores


class Watcher(StoppingCriteria):  # type: ignore[misc]
    """Called after each token: keeps the time of it, ends rows at their stop strings and limits, or all when asked.

    decode: tokens to the text that is searched for stop strings. ends: the model's end tokens. `finished(row)`: whether
    another hook has ended the row. Once a quarter of a larger batch has ended, all of it is: whoever called `generate`
    goes on with the rows that are `going_on`, so that an answer costs nothing after its end.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: Sequence[tuple[str, ...]],
        limits: Sequence[int],
        prompt_length: int,
        ends: Collection[int],
        should_stop: Callable[[], bool],
        finished: Callable[[int], bool] = lambda row: False,
    ) -> None:
        self.decode = decode
        self.stops = list(stops)
        self.limits = list(limits)
        self.prompt_length = prompt_length
        self.ends = frozenset(ends)
        self.ended: list[int | None] = [None] * len(self.limits)  # after how many tokens
        self.should_stop = should_stop
        self.finished = finished
        self.times: list[float] = []  # when token i of the batch was ready, monotonic seconds
        self.cancelled = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        last = input_ids[:, -1].tolist()  # waits for a GPU, whose work is only queued until then
        self.times.append(time.monotonic())
        length = input_ids.shape[1] - self.prompt_length
        self.cancelled = self.cancelled or self.should_stop()
        done = [self.cancelled or n <= length or self.finished(i) for i, n in enumerate(self.limits)]
        for row, stop in enumerate(self.stops):
            if stop and not done[row]:
                tail = self.decode(input_ids[row, max(self.prompt_length, input_ids.shape[1] - _TAIL) :].tolist())
                done[row] = any(text in tail for text in stop)
        for row, token in enumerate(last):
            done[row] = done[row] or token in self.ends  # the tokenizer's own end, which `generate` may not know
            if done[row] and self.ended[row] is None:
                self.ended[row] = length
        going, rows = self.ended.count(None), len(done)
        if rows >= _LEAST_ROWS and going <= (1 - _ENDED_PART) * rows:
            done = [True] * rows
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def going_on(self) -> list[int]:
        """The rows whose answers have not ended."""
        return [row for row, ended in enumerate(self.ended) if ended is None]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        self.stops = [self.stops[row] for row in rows]
        self.limits = [self.limits[row] for row in rows]
        self.ended = [self.ended[row] for row in rows]


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, at most all but the last of the shortest."""
    first, last = min(prompts), max(prompts)  # the two that differ most, in lexicographic order
    limit = min(len(prompt) for prompt in prompts) - 1
    for index in range(limit):
        if first[index] != last[index]:
            return index
    return limit
