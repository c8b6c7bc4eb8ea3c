"""Settings of vLLM from a budget: what fits is below it, what does not is refused in bytes."""

import dataclasses

import pytest
import torch

from agentlab.hardware.ledger import held_bytes
from agentlab.hardware.shape import PUBLISHED, published
from agentlab.inference import OutOfMemoryError, vllm_worker
from agentlab.inference.vllm_settings import (
    CONTEXT_GIB,
    RANKS,
    SCORED_TOKENS,
    ModelSizes,
    least_for_gpu,
    lora_rank,
    model_sizes,
    note_of_free,
    planned_bytes,
    planned_lines,
    settings_for_cpu,
    settings_for_free,
    settings_for_gpu,
    tensor_shapes,
)

GIB = 2**30
MIB = 2**20
SHAPE = published("Qwen2.5-1.5B")
SMALL = ModelSizes(SHAPE, 2 * SHAPE.parameters, 2)


def test_one_token_of_qwen_takes_28_kib_and_a_slot_of_rank_16_35_mib():
    assert SMALL.kv_bytes_per_token == 28 * 1024
    assert SMALL.slot_bytes(16) / 2**20 == pytest.approx(35.2, abs=0.1)


@pytest.mark.parametrize("budget", [3.9, 4.0, 5.0, 6.0, 24.0])
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_everything_together_stays_below_the_budget(budget, rank):
    settings = settings_for_gpu(budget, SMALL, rank)
    assert planned_bytes(settings, SMALL) <= budget * GIB
    assert settings.kv_cache_memory_bytes >= settings.max_model_len * SMALL.kv_bytes_per_token
    assert settings.max_cpu_loras >= settings.max_loras >= 1
    assert settings.max_lora_rank >= rank


def test_a_larger_budget_never_takes_anything_away():
    previous = settings_for_gpu(3.8, SMALL, 16)
    for tenths in range(39, 100):
        current = settings_for_gpu(tenths / 10, SMALL, 16)
        for name in ("max_loras", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            assert getattr(current, name) >= getattr(previous, name)
        previous = current


def test_a_model_that_does_not_fit_is_refused_with_its_bytes():
    seven = dataclasses.replace(SMALL, weight_bytes=int(5.17 * GIB))
    with pytest.raises(OutOfMemoryError, match=r"5\.17 GiB.*budget of 5 GiB; allowed: a smaller model"):
        settings_for_gpu(5.0, seven, 16)


def test_the_least_is_the_last_that_a_shrinking_budget_gives():
    least = least_for_gpu(SMALL, 16)
    budget = planned_bytes(least, SMALL) / GIB
    assert settings_for_gpu(budget + 1e-6, SMALL, 16) == least
    with pytest.raises(OutOfMemoryError):
        settings_for_gpu(budget - 1e-6, SMALL, 16)
    assert sum(size for _, size in planned_lines(least, SMALL)) == planned_bytes(least, SMALL)


def test_what_the_driver_takes_is_the_budgets_to_say():
    usual, more = (settings_for_gpu(5.0, SMALL, 16, context_gib=size) for size in (0.35, 0.85))
    assert more.outside_bytes - usual.outside_bytes == GIB // 2
    assert usual.kv_cache_memory_bytes - more.kv_cache_memory_bytes == GIB // 2  # the cache is what is left
    assert planned_bytes(more, SMALL) <= 5 * GIB
    assert least_for_gpu(SMALL, 16, 0.85).outside_bytes == more.outside_bytes


def test_no_more_is_planned_than_is_free_and_the_reason_is_said():
    assert settings_for_free(5.0, 24.0, SMALL, 16) == settings_for_gpu(5.0, SMALL, 16)
    assert settings_for_free(5.0, float("inf"), SMALL, 16) == settings_for_gpu(5.0, SMALL, 16)
    assert settings_for_free(5.0, 4.4, SMALL, 16) == settings_for_gpu(4.4, SMALL, 16)
    assert note_of_free(5.0, 24.0, settings_for_free(5.0, 24.0, SMALL, 16)) == ""
    assert note_of_free(5.0, 4.4, settings_for_gpu(4.4, SMALL, 16)).startswith(
        "only 4.40 GiB of the GPU are free, of 5 that vLLM may take: it answers within "
    )
    with pytest.raises(OutOfMemoryError, match=r"^only 2\.93 GiB of the GPU are free: weights of 2\.88 GiB"):
        settings_for_free(5.0, 2.93, SMALL, 16)
    with pytest.raises(OutOfMemoryError, match=r"^weights of"):
        settings_for_free(2.9, 24.0, SMALL, 16)


def test_ranks_are_those_of_vllm():
    import typing

    from vllm.config.lora import MaxLoRARanks

    assert typing.get_args(MaxLoRARanks) == RANKS
    assert [lora_rank(rank) for rank in (1, 2, 8, 9, 64, 65, 512)] == [1, 8, 8, 16, 64, 128, 512]
    with pytest.raises(ValueError, match="rank 513; allowed: up to 512"):
        lora_rank(513)


def test_sizes_are_read_from_the_folder_alone(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    sizes = model_sizes(tiny_model, 4)
    assert sizes.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    widths = [m.in_features + m.out_features for n, m in model.named_modules() if n.endswith("_proj")]
    assert sizes.slot_bytes(8) == 4 * 8 * sum(widths)
    state = model.state_dict()
    assert all(tuple(state[name].shape) == shape for name, shape in tensor_shapes(tiny_model).items())
    settings = settings_for_cpu(sizes, 16)
    assert settings.max_model_len == 512
    assert settings.kv_cache_memory_bytes <= GIB


class Segments:
    """torch's caching allocator for tensors that stay: each takes the smallest gap that holds it, or a new segment."""

    def __init__(self):
        self.reserved, self.gaps = 0, {True: [], False: []}

    def take(self, size):
        size = -(-int(size) // 512) * 512
        small = size <= MIB
        gaps = self.gaps[small]
        gap = min((gap for gap in gaps if gap >= size and (small or gap < size + 20 * MIB)), default=None)
        if gap is None:
            gap = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.reserved += gap
        else:
            gaps.remove(gap)
        gaps.append(gap - size)


def reserved_at_start(settings, shape):
    """Bytes that vLLM 0.32 has the allocator reserve before its first step, tensor by tensor in its order."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    model = Segments()
    embedding = 2 * -(-shape.vocab // 64) * 64 * shape.hidden
    model.take(embedding)
    for size in (4, 2):  # the angles of all positions, and their copy in 16 bits
        model.take(size * shape.context_length * shape.head_dim)
    for _ in range(shape.layers):
        model.take(2 * (queries + 2 * keys) * shape.hidden)
        model.take(2 * queries * shape.hidden)
        model.take(2 * 2 * shape.intermediate * shape.hidden)
        model.take(2 * shape.intermediate * shape.hidden)
        for _ in range(2):
            model.take(2 * shape.hidden)
    if not shape.tied:
        model.take(embedding)
    for _ in range(shape.layers):
        for at in (0, 1):
            for sizes in shape.linears.values():
                model.take(2 * settings.max_loras * settings.max_lora_rank * sizes[at])
    for size in (settings.max_num_seqs * shape.vocab * 4, settings.max_num_seqs * shape.vocab // 8):
        model.take(size)
    model.take(8.125 * MIB)  # cuBLAS
    model.take(settings.kv_cache_memory_bytes)
    return model.reserved


@pytest.mark.parametrize("name", [path.stem for path in sorted(PUBLISHED.glob("*.json"))])
@pytest.mark.parametrize("rank", [8, 16, 64, 256])
def test_the_limit_on_the_process_leaves_room_for_what_it_reserves(name, rank):
    shape = published(name)
    sizes = ModelSizes(shape, 2 * shape.parameters, 2)
    least = planned_bytes(least_for_gpu(sizes, rank), sizes) / GIB
    for more in (0.001, 0.1, 0.3, 0.5, 1.0, 2.0, 8.0):
        for adapters in (1, 4, 8):
            settings = settings_for_gpu(least + more, sizes, rank, adapters)
            allowed = (least + more - CONTEXT_GIB) * GIB
            step = sizes.step_bytes(settings.max_num_batched_tokens, settings.max_num_seqs, settings.max_lora_rank)
            assert reserved_at_start(settings, shape) + step <= allowed


@pytest.mark.parametrize("size", [512, 2560, MIB // 2, MIB, 3 * MIB, 4.375 * MIB, 9 * MIB, 10 * MIB, 26.25 * MIB])
def test_what_one_of_many_tensors_takes_is_what_the_segments_hold(size):
    segments = Segments()
    for _ in range(960):
        segments.take(size)
    assert segments.reserved == pytest.approx(960 * held_bytes(size), rel=0.02, abs=2 * MIB)
    assert held_bytes(0) == 0


def test_a_cache_of_the_least_context_has_the_block_that_vllm_keeps():
    assert SMALL.least_cache_bytes(1024, "cuda") == (1024 + 16) * 28 * 1024
    assert SMALL.least_cache_bytes(1025, "cuda") == (1040 + 16) * 28 * 1024
    least = least_for_gpu(SMALL, 16)
    assert least.kv_cache_memory_bytes == SMALL.least_cache_bytes(least.max_model_len, "cuda")


def test_the_logits_of_a_scored_prompt_are_computed_in_the_parts_that_are_planned(monkeypatch):
    from vllm.v1.worker.gpu.sample import prompt_logprob

    monkeypatch.setattr(prompt_logprob, "CHUNK_SIZE", prompt_logprob.CHUNK_SIZE)  # it is given back
    assert prompt_logprob.CHUNK_SIZE > SCORED_TOKENS
    vllm_worker._limit_logits()
    scored, hidden = [], torch.zeros(300, 4)

    def logits(states):
        scored.append(len(states))
        raise StopIteration

    with pytest.raises(StopIteration):
        prompt_logprob.compute_prompt_logprobs_with_chunking(torch.zeros(300, dtype=torch.int64), hidden, logits, 0)
    assert scored == [SCORED_TOKENS]
