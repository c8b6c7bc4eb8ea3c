"""What is known about candidates, as written to disk: genome, training, score, state, verdict."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Operator = Literal["founder", "continuation", "crossover", "mutation", "blend"]
State = Literal["bred", "trained", "evaluated", "kept", "culled", "failed"]
BASE = "base"  # the base model without an adapter, wherever an adapter id is expected


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class BaseModelRecord(_Record):
    """The base model that a run stays with, the engine that scores it, and the rung that it is trained at.

    transformers scores at that rung, vLLM at its own.
    """

    name: str
    sha256: str
    engine: Literal["transformers", "vllm"] = "transformers"
    rung: str | None = None  # None: as it is stored
    versions: dict[str, str] = {}


class Genome(_Record):
    """How a candidate comes to be. Everything that training needs is here or on disk already."""

    candidate: str  # g003-c02
    generation: int
    operator: Operator
    parents: list[str]
    merge_weights: list[float]  # of the parents, in their order; sums to 1
    merge_method: str
    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]
    learning_rate: float
    steps: int  # optimiser steps; a blend has 0
    batch_size: int
    data_mix: dict[str, float]  # relative weight of each group of training items; empty: as they come
    weight_noise: float  # relative size of the noise added before training; 0: none
    mutated: list[str]  # names of the genes that mutation changed
    seed: int
    advisor: str = "chance"


class Training(_Record):
    """What training one candidate took. `losses` per optimiser step; `remedies` as in the events; memory in MiB."""

    train_seconds: float
    train_tokens: int
    losses: list[float]
    remedies: list[dict[str, Any]] = []
    vram_peak_mib: float = 0.0
    ram_peak_mib: float = 0.0  # 0: not measured


class Score(_Record):
    """One model on one split. Item scores are in [0, 1], in the split's order.

    `latency_estimated_s` is the mean answer from token counts and the run's calibrated rates, the one that fitness
    uses; `latency_p50_s` and `latency_p95_s` were measured on single requests. Memory in MiB.
    """

    adapter: str
    split: str
    suite: str
    engine: str
    item_scores: list[float]
    answers: list[str]
    prompt_tokens: list[int]
    completion_tokens: list[int]
    accuracy: float
    accuracy_ci_low: float
    accuracy_ci_high: float
    latency_estimated_s: float
    latency_answers: int = 0  # how many single requests
    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    vram_peak_mib: float = 0.0
    ram_peak_mib: float = 0.0
    eval_seconds: float = 0.0
    fitness: float | None = None


class Candidate(_Record):
    """A genome on its way; one file per candidate, rewritten at every change of state."""

    genome: Genome
    state: State = "bred"
    training: Training | None = None
    score: Score | None = None  # on the fitness split
    weights_sha256: str | None = None
    reason: str = ""  # why it failed

    @property
    def fitness(self) -> float:
        if self.score is None or self.score.fitness is None:
            raise ValueError(f"{self.genome.candidate} has no fitness yet")
        return self.score.fitness


class Verdict(_Record):
    """The gate's decision on one challenger: an exact paired test on the gate items."""

    generation: int
    challenger: str
    incumbent: str  # an adapter id or "base"
    wins: int
    losses: int
    items: int
    challenger_accuracy: float
    incumbent_accuracy: float
    p_value: float
    alpha: float
    detectable_gain: float
    passed: bool
    verdict: str  # one sentence


class GenerationResult(_Record):
    """Written last: its existence means that the generation is finished."""

    generation: int
    members: list[str]  # who competed, elites first
    pool: list[str]  # best first
    culled: list[str]
    champion: str  # adapter id or "base"
    verdict: Verdict | None
    seconds: float


class SealedResult(_Record):
    """The comparison on the sealed split. Intervals are 95 %."""

    champion: str
    champion_sha256: str
    items: int
    base: Score
    champion_score: Score
    gain: float
    gain_ci_low: float
    gain_ci_high: float
    openings: int


class BaselineResult(_Record):
    """One SFT of equal cost beside the champion, on the sealed items; the gain is the champion's over the SFT."""

    steps: int
    learning_rate: float
    train_tokens: int
    population_train_tokens: int
    score: Score
    champion: str
    champion_accuracy: float
    gain: float
    gain_ci_low: float
    gain_ci_high: float
