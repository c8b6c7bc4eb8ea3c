"""Minutes and disk of a generation, estimated from a device's rates; every figure is an estimate, never a measurement.

Decoding is bound by memory: every token reads the weights once. Reading prompts and training are bound by arithmetic:
2 FLOPs per weight and token forward, 2 more for the gradient of the activations, and 2 for computing a layer again
under checkpointing; frozen weights need no gradient (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, without its
last third).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from agentlab.config import Settings
from agentlab.hardware import ledger
from agentlab.hardware.rungs import FP32
from agentlab.hardware.shape import ModelShape

if TYPE_CHECKING:
    from agentlab.hardware.sizing import Workload

COPIES = 2  # an adapter lies in the run's pool and, as a logged model, in MLflow's store
_LAPTOP_GIB = 8  # a larger budget means a workstation's card


@dataclass(frozen=True)
class Speed:
    """A device's assumed rates: what arrives of its memory's bandwidth and of its arithmetic in such programs."""

    name: str
    bytes_per_s: float
    flops: float


# 192 GB/s (96 bits of GDDR6 at 16 Gbit/s), of which decoding reaches three quarters; about 22 TFLOPS in 16 bits, of
# which small batches reach a third.
LAPTOP = Speed("an RTX 4050 Laptop", 0.75 * 192e9, 0.3 * 22e12)
# 1,008 GB/s and 165 TFLOPS: an RTX 4090.
WORKSTATION = Speed("an RTX 4090", 0.75 * 1008e9, 0.3 * 165e12)
# What two AVX2 cores reach with a 135M model in fp32: 13 tokens/s alone, 8 × 64 trained tokens in 3 s.
CPU = Speed("two AVX2 cores", 7.0e9, 1.0e11)
_RESTORED = 0.55  # so fast are int8 and nf4 beside fp32 there (16.5 and 17.3 of 30.6 tokens/s), and AWQ on vLLM


def speed_of(device: Literal["cuda", "cpu"], vram_gib: float) -> Speed:
    """The assumed rates for a device with this budget."""
    return CPU if device == "cpu" else LAPTOP if vram_gib <= _LAPTOP_GIB else WORKSTATION


@dataclass(frozen=True)
class Estimate:
    """Estimates for one model, on the device that `assumed` names."""

    assumed: str
    decode_tokens_per_s: float  # one request
    tokens_in_target: int  # of an answer to a mean prompt within budget.latency_s
    train_minutes: float  # of a generation in the mean of a run; 0 for a model that is only served
    evaluate_minutes: float
    disk_mib: float  # adapters at the settings' rank, in pool and store, and the ends of a generation's trainings
    model_disk_mib: float  # the model's own files in 16 bits


def estimate(
    settings: Settings, shape: ModelShape, weight_bytes: int, speed: Speed, workload: "Workload",
    device: Literal["cuda", "cpu"], trained: bool, batch_size: int,
) -> Estimate:  # fmt: skip
    """Time of a generation, disk of a run, and how many tokens fit into the latency target.

    batch_size: of the evaluation, as it fits into memory.
    """
    # of an untied embedding a token reads one row
    unread = 0 if shape.tied else (4 if device == "cpu" else 2) * shape.embedding_parameters
    decode = speed.bytes_per_s / max(1, weight_bytes - unread)
    if device == "cpu":  # arithmetic costs as much there as reading, and what is not fp32 is restored first
        whole = ledger.weights(shape, FP32, 4).total
        decode = (1.0 if weight_bytes >= whole else _RESTORED) * speed.bytes_per_s / max(1, whole - unread)
    active = shape.linear_parameters + shape.embedding_parameters  # the head takes part, the embedding is looked up
    prefill = speed.flops / (2 * active)
    left_s = settings.budget.latency_s - workload.prompt_tokens / prefill
    population = settings.population
    evaluated = population.size + population.blend
    training = settings.training
    mean_tokens = workload.prompt_tokens + workload.answer_tokens
    tokens = training.tokens if training.steps is None else training.steps * training.batch_size * mean_tokens
    passes = 6 if device == "cuda" else 4
    children = (population.generations - 1) * (population.size - population.elites)
    founders = population.size * (training.founder_share if children else 1.0)
    # a continuation looks at twice as many items as it learns from, one pass forward each
    looks = 2 * 2 * children if settings.continues and training.focus else 0
    train_s = ((founders + children) * passes + looks) / population.generations * tokens * active / speed.flops
    # the challenger and the champion answer the gate's items
    items = evaluated * workload.fitness_items + 2 * workload.gate_items
    batches = items / batch_size
    evaluate_s = items * workload.prompt_tokens / prefill + batches * workload.answer_tokens / decode
    # until the generation ends: where each training ended, weights and two moments
    states = 3 * population.size if settings.continues else 0
    file = ledger.adapter_file_bytes(shape, settings.lora.rank, settings.lora.target_modules)
    return Estimate(
        assumed=speed.name,
        decode_tokens_per_s=decode,
        tokens_in_target=max(0, int(left_s * decode)),
        train_minutes=train_s / 60 if trained else 0.0,
        evaluate_minutes=evaluate_s / 60 if trained else 0.0,
        disk_mib=(COPIES * (population.pool + evaluated) + states) * file / ledger.MIB if trained else 0.0,
        model_disk_mib=2 * shape.parameters / ledger.MIB,
    )
