"""What only a GPU can show of training: `make gpu`."""

import gc

import pytest
import torch
from gpu import ON_A_GPU
from learning_helpers import genome_of

from agentlab import models
from agentlab.hardware import ledger
from agentlab.hardware.rungs import LADDER, RUNGS
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.learning.dataset import Example
from agentlab.learning.sft import train
from agentlab.learning.trouble import TrainingFailed

pytestmark = ON_A_GPU
MIB = 2**20
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def items(count, tokens):
    return [
        Example([3 + (7 * row + at) % 250 for at in range(tokens)], [0] + [1] * (tokens - 1)) for row in range(count)
    ]


def limit_to(more_mib):
    """Let the allocator have so many MiB more than it holds."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = min(total, torch.cuda.memory_allocated() + more_mib * MIB)
    torch.cuda.set_per_process_memory_fraction(limit / total)
    torch.cuda.reset_peak_memory_stats()
    return limit


@pytest.mark.parametrize("rung", [rung.name for rung in LADDER])
def test_something_is_learned_at_every_rung(tiny_model, rung):
    with TransformersEngine(models.resolve(str(tiny_model)), rung=rung) as engine:
        lora, training = train(engine, genome_of(steps=8, dropout=0.05), None, items(4, 48) * 8)
        assert training.losses[-1] < training.losses[0]
        assert training.remedies == []
        assert all(value.dtype == torch.float32 for pair in lora.modules.values() for value in pair)
        held = torch.cuda.memory_allocated()  # with the workspaces of the libraries, which stay
        train(engine, genome_of(steps=8, dropout=0.05), None, items(4, 48) * 8)
        gc.collect()
        assert torch.cuda.memory_allocated() == pytest.approx(held, abs=64 * 1024)


@pytest.mark.parametrize("rung", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_training_peaks_where_the_ledger_says(larger_model, rung, dropout):
    with TransformersEngine(models.resolve(str(larger_model)), rung=rung) as engine:
        limit_to(40_000)
        train(engine, genome_of(steps=3, batch_size=8, rank=16, dropout=dropout), None, items(24, 512))
        step = ledger.Step(8, 512, 16, MODULES, dropout=dropout > 0)
        planned = ledger.training(
            engine._shape, RUNGS[rung], step, workspace_bytes=ledger.blas_bytes(2, engine.capability)
        )
        assert torch.cuda.max_memory_allocated() / MIB == pytest.approx(planned.total / MIB, abs=150)


@pytest.mark.parametrize("rung", ["bf16", "nf4"])
def test_a_batch_that_does_not_fit_is_accumulated_and_learns_the_same(larger_model, rung):
    genome = genome_of(steps=3, batch_size=8, rank=16)
    with TransformersEngine(models.resolve(str(larger_model)), rung=rung) as engine:
        _, undisturbed = train(engine, genome, None, items(24, 512))
        limit = limit_to(200)
        _, training = train(engine, genome, None, items(24, 512))
        assert training.remedies[0]["action"] == "batch of 4 with 2 accumulated"
        assert torch.cuda.max_memory_reserved() <= limit
        assert training.losses == pytest.approx(undisturbed.losses, rel=0.02)


def test_where_not_even_one_short_item_fits_the_candidate_fails_and_the_engine_lives(larger_model):
    with TransformersEngine(models.resolve(str(larger_model)), rung="bf16") as engine:
        limit_to(30)
        with pytest.raises(TrainingFailed, match="out_of_memory"):
            train(engine, genome_of(steps=2, batch_size=2, rank=16), None, items(4, 2048), max_length=4096)
        torch.cuda.set_per_process_memory_fraction(1.0)
        _, training = train(engine, genome_of(steps=2, batch_size=2, rank=16), None, items(4, 64))
        assert len(training.losses) == 2
