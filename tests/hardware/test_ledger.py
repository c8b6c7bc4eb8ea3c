"""The ledger against published figures and against real tensors."""

import pytest

from agentlab.hardware import ledger
from agentlab.hardware.ledger import GIB, MIB
from agentlab.hardware.rungs import RUNGS
from agentlab.hardware.shape import published

# Weights in GiB at bf16, int8, nf4, hqq3; KV cache in KiB per token; an r16 slot in MiB: calculated by hand from the
# models' cards (bits per weight of the linear modules, two bytes for embedding and head).
FITS = {
    "Qwen/Qwen2.5-7B-Instruct": (14.2, 8.13, 5.17, 4.84, 56, 77),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (14.2, 8.13, 5.17, 4.84, 56, 77),
    "Qwen/Qwen3-4B": (7.49, 4.12, 2.47, 2.29, 144, 63),
    "Qwen/Qwen2.5-3B-Instruct": (5.75, 3.17, 1.91, 1.77, 36, 57),
    "Qwen/Qwen3-1.7B": (3.20, 1.90, 1.26, 1.19, 112, 33),
    "Qwen/Qwen2.5-1.5B-Instruct": (2.88, 1.66, 1.06, 1.00, 28, 35),
    "Qwen/Qwen2-1.5B-Instruct": (2.88, 1.66, 1.06, 1.00, 28, 35),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (3.31, 2.09, 1.50, 1.43, 28, 35),
    "Qwen/Qwen2.5-0.5B-Instruct": (0.92, 0.59, 0.43, 0.41, 12, 17),
}


@pytest.mark.parametrize("name", FITS)
def test_the_table_of_what_fits(name):
    shape = published(name)
    *gib, kv_kib, slot_mib = FITS[name]
    for rung, expected in zip(("bf16", "int8", "nf4", "hqq3"), gib, strict=True):
        assert ledger.weights(shape, RUNGS[rung]).total / GIB == pytest.approx(expected, rel=0.004, abs=0.0051), rung
    assert ledger.kv_bytes_per_token(shape) == kv_kib * 1024
    assert ledger.slot_bytes(shape, 16) / MIB == pytest.approx(slot_mib, abs=0.5)
