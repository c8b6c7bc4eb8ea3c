"""Scoring a model on a split, and what fitness makes of it."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import pydantic

from agentlab import files
from agentlab.config import Settings
from agentlab.errors import EvolutionStopped
from agentlab.events import Calibrated, Evaluated, EvaluationProgress, Event
from agentlab.evolution.run import Run, checked
from agentlab.evolution.stats import mean_interval
from agentlab.hardware.meter import PeakMeter
from agentlab.inference import Completion, Engine, Request
from agentlab.records import BASE, Score
from agentlab.tasks import Item, Suite, score_split


@dataclasses.dataclass(frozen=True)
class Rates:
    """Tokens per second of the base model on single requests, measured once per run."""

    prefill_tokens_per_s: pydantic.PositiveFloat
    decode_tokens_per_s: pydantic.PositiveFloat

    def latency_s(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Seconds of one answer at these rates."""
        return prompt_tokens / self.prefill_tokens_per_s + completion_tokens / self.decode_tokens_per_s


_RATES = pydantic.TypeAdapter(Rates)
_LONG_ANSWER = [{"role": "user", "content": "Tell a long story about a river, from its spring to the sea."}]


def stored_rates(run: Run) -> Rates | None:
    """The run's rates, once they were measured."""
    return checked(run.folder / "rates.json", _RATES)


def calibrate(run: Run, engine: Engine, suite: Suite, emit: Callable[[Event], None]) -> Rates:
    """The run's rates: read from its folder, or measured now and written there.

    From the fastest of at most five, after one to warm up: whatever else the machine does can only make them slower,
    and once the two fastest agree nothing did. To two digits, because more would be noise.
    """
    if (stored := stored_rates(run)) is not None:
        return stored
    prefill: list[float] = []
    short: list[float] = []  # seconds of a long answer's first token,
    long: list[float] = []  # and of its first `written`
    written = 1
    items = suite.split("train")
    for number in range(6):
        one = _alone(engine, suite.chat(items[number % len(items)]), 1)
        first, many = (_alone(engine, _LONG_ANSWER, n) for n in (1, 17))
        if number == 0:
            continue
        prefill.append(one.prompt_tokens / max(one.latency_s, 1e-6))
        short.append(max(first.latency_s, 1e-6))
        long.append(max(many.latency_s, 1e-6))
        written = many.completion_tokens
        if all(_agree(found) for found in (prefill, [1 / s for s in short], [1 / s for s in long])):
            break
    rates = Rates(_two_digits(max(prefill)), _two_digits(_decode_rate(min(short), min(long), written)))
    files.write_json(run.folder / "rates.json", dataclasses.asdict(rates))
    emit(Calibrated(**dataclasses.asdict(rates)))
    return rates


def _alone(engine: Engine, messages: list[dict[str, str]], tokens: int) -> Completion:
    return engine.generate([Request(messages, max_new_tokens=tokens, reuse_prompt=False)], 1)[0]


def _decode_rate(short_s: float, long_s: float, written: int) -> float:
    """Tokens/s of decoding, from the fastest first token and the fastest answer of so many tokens.

    Of one pair alone the difference may be next to nothing, when something slowed the first token down.
    """
    if written < 2:
        return 10.0  # a model that ends at once says nothing about it
    spent = long_s - short_s
    return (written - 1) / (spent if spent > 0 else long_s)


def _agree(rates: Sequence[float]) -> bool:
    """Whether the two fastest are within a twentieth of each other."""
    best = sorted(rates)[-2:]
    return len(best) == 2 and best[0] >= 0.95 * best[1]


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def fitness(accuracy: float, latency_s: float, vram_mib: float, settings: Settings) -> float:
    """accuracy - 0.1·max(0, latency/target - 1) - 0.1·max(0, VRAM/budget - 1).

    Latency and memory are planned figures (rates times tokens, the ledger's bytes), so that selection repeats itself.
    """
    over_time = max(0.0, latency_s / settings.budget.latency_s - 1.0)
    over_memory = max(0.0, vram_mib / (settings.budget.vram_gib * 1024) - 1.0)
    return accuracy - 0.1 * over_time - 0.1 * over_memory


def answer_limit(engine: Engine, suite: Suite, settings: Settings) -> int:
    """Most tokens an answer may have: the setting, or 1.25 × the longest training answer + 4."""
    if settings.evaluation.max_new_tokens is not None:
        return settings.evaluation.max_new_tokens
    targets = (suite.target(item) for item in suite.split("train"))
    longest = max(engine.count_tokens([{"role": "user", "content": target}]) for target in targets)
    return int(1.25 * (longest - engine.count_tokens([{"role": "user", "content": ""}]))) + 4


def evaluate(
    engine: Engine,
    suite: Suite,
    items: Sequence[Item],
    split: str,
    adapter: str,
    settings: Settings,
    rates: Rates,
    limit: int,
    *,
    batch_size: int,
    latency_items: int = 0,
    emit: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Score:
    """Answers and scores of one model (an id loaded in the engine, or "base") on `items`, greedily decoded.

    batch_size: so many are answered at once. latency_items: so many items are answered again, one at a time, to
    measure the latency a person would see.
    Raises EvolutionStopped when asked to stop; nothing of an unfinished evaluation is kept.
    """
    name = None if adapter == BASE else adapter
    meter = PeakMeter()
    started = time.monotonic()
    requests = [Request(suite.chat(item), adapter=name, max_new_tokens=limit) for item in items]
    answers: list[Completion | None] = [None] * len(items)
    emit(EvaluationProgress(candidate=adapter, split=split, done=0, total=len(items)))
    ready = engine.answers(requests, batch_size, should_stop)
    for done, (index, completion) in enumerate(ready, start=1):
        answers[index] = completion
        if done % batch_size == 0 or done == len(items):
            emit(EvaluationProgress(candidate=adapter, split=split, done=done, total=len(items)))
    completions = [answer for answer in answers if answer is not None and answer.finish_reason != "cancelled"]
    alone = [dataclasses.replace(request, reuse_prompt=False) for request in requests[:latency_items]]
    latencies = [engine.generate([request], 1)[0].latency_s for request in alone if not should_stop()]
    if should_stop() or len(completions) < len(items):
        raise EvolutionStopped(f"stopped while evaluating {adapter} on {split}")
    texts = [completion.text for completion in completions]
    item_scores = score_split(suite, items, texts)
    accuracy, low, high = mean_interval(item_scores)
    latency = statistics.fmean(rates.latency_s(c.prompt_tokens, c.completion_tokens) for c in completions)
    longest = max(c.prompt_tokens for c in completions) + limit
    planned = engine.planned_vram_mib(min(batch_size, len(items)), longest)
    score = Score(
        adapter=adapter,
        split=split,
        suite=suite.digest,
        engine=engine.name,
        item_scores=item_scores,
        answers=texts,
        prompt_tokens=[c.prompt_tokens for c in completions],
        completion_tokens=[c.completion_tokens for c in completions],
        accuracy=accuracy,
        accuracy_ci_low=low,
        accuracy_ci_high=high,
        latency_estimated_s=latency,
        latency_answers=len(latencies),
        latency_p50_s=float(np.percentile(latencies, 50)) if latencies else None,
        latency_p95_s=float(np.percentile(latencies, 95)) if latencies else None,
        vram_peak_mib=max(meter.vram_peak_mib(), engine.vram_peak_mib()),
        ram_peak_mib=meter.ram_peak_mib() + engine.ram_peak_mib(),
        eval_seconds=time.monotonic() - started,
        fitness=fitness(accuracy, latency, planned, settings) if split == "fitness" else None,
    )
    emit(
        Evaluated(
            candidate=adapter,
            split=split,
            accuracy=accuracy,
            accuracy_ci_low=low,
            accuracy_ci_high=high,
            items=len(items),
            fitness=score.fitness,
            seconds=score.eval_seconds,
        )
    )
    return score
