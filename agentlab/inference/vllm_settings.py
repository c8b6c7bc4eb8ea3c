"""What vLLM is told about memory: settings that fit a budget, from sizes that are known before anything is loaded."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

from agentlab.errors import ModelError
from agentlab.inference.contract import OutOfMemoryError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM has slots."""
_GIB = 2**30
_CONTEXT_BYTES = int(0.5 * _GIB)  # CUDA's own context and the allocator's slack
_CPU_KV_BYTES = _GIB
_SEQUENCES = 32
_BATCHED_TOKENS = 2048
_LONGEST = 8192
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1, "I8": 1}


@dataclasses.dataclass(frozen=True)
class VllmSettings:
    """What of vLLM's settings decides about memory and speed; see its documentation of the same names.

    max_loras: adapters on the device at once. max_cpu_loras: adapters in RAM; others are read from disk when needed.
    sleep_mode: weights may go to RAM and the cache away while something else needs the device.
    """

    kv_cache_memory_bytes: int
    max_model_len: int
    max_num_seqs: int = _SEQUENCES
    max_num_batched_tokens: int = _BATCHED_TOKENS
    max_loras: int = 4
    max_cpu_loras: int = 16
    max_lora_rank: int = 64
    enforce_eager: bool = True
    sleep_mode: bool = False


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What a model's folder says of its size. `lora_width`: Σ (in + out) over the layers that adapters may change."""

    weight_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocabulary: int
    context_length: int
    lora_width: int
    element_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        """2 · layers · kv_heads · head_dim · bytes of an element: a key and a value in every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element_bytes

    def lora_slot_bytes(self, rank: int) -> int:
        """rank · Σ (in + out) · bytes of an element."""
        return rank * self.lora_width * self.element_bytes

    def activation_bytes(self, batched_tokens: int, sequences: int) -> int:
        """A bound on what one step holds besides weights and cache: one layer's tensors, and fp32 logits twice."""
        layer = batched_tokens * (2 * self.intermediate_size + 6 * self.hidden_size) * self.element_bytes
        return layer + 2 * sequences * self.vocabulary * 4


def planned_bytes(settings: VllmSettings, sizes: ModelSizes) -> int:
    """Everything that vLLM takes with these settings: weights, slots, activations, cache and the device's context."""
    return (
        sizes.weight_bytes
        + settings.max_loras * sizes.lora_slot_bytes(settings.max_lora_rank)
        + sizes.activation_bytes(settings.max_num_batched_tokens, settings.max_num_seqs)
        + settings.kv_cache_memory_bytes
        + _CONTEXT_BYTES
    )


def lora_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that holds `rank`. Raises ValueError above the largest."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(f"rank {rank}; allowed: up to {RANKS[-1]}")


def settings_for_gpu(
    budget_gib: float, sizes: ModelSizes, rank: int, adapters: int = 4, cpu_adapters: int = 16, max_model_len: int = 0
) -> VllmSettings:
    """Settings with which weights, adapter slots, activations and cache stay below the budget together.

    What has to shrink does so in this order: adapter slots on the device, tokens of a step, sequences, context.
    Raises OutOfMemoryError that names the bytes where not even the smallest fits.
    """
    context = min(max_model_len or _LONGEST, sizes.context_length)
    slot_rank = lora_rank(rank)
    tried = [(slots, _BATCHED_TOKENS, _SEQUENCES, context) for slots in range(min(adapters, cpu_adapters), 0, -1)]
    tried += [(1, 1024, 16, context), (1, 512, 8, context), (1, 512, 4, min(context, 2048)), (1, 256, 1, 1024)]
    for slots, batched, sequences, wanted in tried:
        length = min(wanted, context)
        fixed = sizes.weight_bytes + slots * sizes.lora_slot_bytes(slot_rank) + _CONTEXT_BYTES
        left = int(budget_gib * _GIB) - fixed - sizes.activation_bytes(batched, sequences)
        if left < length * sizes.kv_bytes_per_token:
            continue
        return VllmSettings(
            kv_cache_memory_bytes=min(left, sequences * length * sizes.kv_bytes_per_token),
            max_model_len=length,
            max_num_seqs=sequences,
            max_num_batched_tokens=batched,
            max_loras=slots,
            max_cpu_loras=max(slots, cpu_adapters),
            max_lora_rank=slot_rank,
            sleep_mode=True,
        )
    raise OutOfMemoryError(
        f"weights of {sizes.weight_bytes / _GIB:.2f} GiB, one adapter slot of rank {slot_rank} and a cache for 1024 "
        f"tokens do not fit a budget of {budget_gib:g} GiB; allowed: a smaller model, or a larger budget.vram_gib"
    )


def settings_for_cpu(sizes: ModelSizes, rank: int, adapters: int = 4, cpu_adapters: int = 16) -> VllmSettings:
    """Settings for a machine without an accelerator: a cache of a GiB at most."""
    context = min(_LONGEST, sizes.context_length)
    wanted = _SEQUENCES * context * sizes.kv_bytes_per_token
    return VllmSettings(
        kv_cache_memory_bytes=max(min(wanted, _CPU_KV_BYTES), context * sizes.kv_bytes_per_token),
        max_model_len=context,
        max_loras=min(adapters, cpu_adapters),
        max_cpu_loras=cpu_adapters,
        max_lora_rank=lora_rank(rank),
    )


def tensor_shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of every tensor in a folder's safetensors, from their headers alone.

    Raises ModelError for a file that is no safetensors file.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(size, 100_000_000)))
            rows = {name: (row["dtype"], tuple(row["shape"])) for name, row in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
        found |= rows
    return found


def model_sizes(folder: Path, element_bytes: int) -> ModelSizes:
    """The sizes of the model in `folder`, loaded with so many bytes for each floating-point weight."""
    from transformers import AutoConfig

    whole: Any = AutoConfig.from_pretrained(folder)
    config = whole.get_text_config()
    shapes = tensor_shapes(folder)
    weight_bytes = 0
    lora_width = 0
    for name, (dtype, shape) in shapes.items():
        numel = 1
        for length in shape:
            numel *= length
        floating = dtype in ("F64", "F32", "F16", "BF16")
        weight_bytes += numel * (element_bytes if floating else _BYTES.get(dtype, 1))
        if name.endswith("_proj.weight") and len(shape) == 2:
            lora_width += sum(shape)
    heads = config.num_attention_heads
    return ModelSizes(
        weight_bytes=weight_bytes,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocabulary=config.vocab_size,
        context_length=config.max_position_embeddings,
        lora_width=lora_width,
        element_bytes=element_bytes,
    )
