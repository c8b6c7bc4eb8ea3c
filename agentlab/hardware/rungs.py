"""The rungs of the quantization ladder: how many bytes a linear module takes on each."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from agentlab.config import RungName

NF4_BLOCK = 64  # bitsandbytes: weights that share one absolute maximum
_NF4_NESTED_BLOCK = 256  # and such maxima, themselves in 8 bits, that share one of 32 bits
_HQQ_GROUP = 64
_HQQ_PER_WORD = 10  # weights of 3 bits in one int32


@dataclass(frozen=True)
class Rung:
    """One precision of the linear modules; embedding, head, norms and biases stay in the element type.

    bits: of one weight with what is needed to restore it, in a large matrix. packed_bytes(in, out): the weights of one
    module. state_bytes(in, out, element_bytes): scales, zeros and absolute maxima beside them, which
    `get_memory_footprint` of transformers leaves out.
    """

    name: RungName
    bits: float
    packed_bytes: Callable[[int, int], int]
    state_bytes: Callable[[int, int, int], int]

    @property
    def is_quantized(self) -> bool:
        return self.bits < 16


def _no_state(n_in: int, n_out: int, element_bytes: int) -> int:
    return 0


def _nf4_state(n_in: int, n_out: int, element_bytes: int) -> int:
    # double quantization (Dettmers et al. 2023, QLoRA, section 3): an absolute maximum per block in 8 bits, and per
    # 256 of those one of 32 bits, beside their mean
    blocks = ceil(n_in * n_out / NF4_BLOCK)
    return blocks + 4 * ceil(blocks / _NF4_NESTED_BLOCK) + 4


def _hqq3_packed(n_in: int, n_out: int) -> int:
    # groups along the input (axis 1); along the output (axis 0) 64 rows fill 7 words: 3.5 bits instead of 3.2
    groups = n_in * n_out // _HQQ_GROUP
    return 4 * _HQQ_GROUP * ceil(groups / _HQQ_PER_WORD)


FP32 = Rung("fp32", 32.0, lambda n_in, n_out: 4 * n_in * n_out, _no_state)
BF16 = Rung("bf16", 16.0, lambda n_in, n_out: 2 * n_in * n_out, _no_state)  # fp16 on cards without bf16
INT8 = Rung("int8", 8.03, lambda n_in, n_out: n_in * n_out, lambda n_in, n_out, _: 4 * n_out)  # one fp32 scale a row
NF4 = Rung("nf4", 4.127, lambda n_in, n_out: ceil(n_in * n_out / 2), _nf4_state)
HQQ3 = Rung(
    "hqq3", 3.7, _hqq3_packed, lambda n_in, n_out, element_bytes: 2 * element_bytes * (n_in * n_out // _HQQ_GROUP)
)

RUNGS: dict[RungName, Rung] = {rung.name: rung for rung in (FP32, BF16, INT8, NF4, HQQ3)}
LADDER = (BF16, INT8, NF4, HQQ3)  # a GPU's, from precise to small


def element_bytes(rung: RungName | None, device: str) -> int:
    """Bytes of one element of what is not quantized: 2, and 4 at fp32 and for what is quantized on a CPU.

    rung: None for a model that is quantized in its files.
    """
    return 4 if rung == "fp32" or (device == "cpu" and rung != "bf16") else 2
