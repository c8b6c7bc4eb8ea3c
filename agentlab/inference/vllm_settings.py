"""What vLLM is told about memory: settings that fit a budget, from sizes that are known before anything is loaded."""

import dataclasses
import math
from pathlib import Path

from agentlab import files
from agentlab.errors import ModelError
from agentlab.hardware import ledger
from agentlab.hardware.shape import ModelShape
from agentlab.hardware.sizing import Device
from agentlab.inference.contract import OutOfMemoryError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM has slots."""
_GIB = 2**30
CONTEXT_GIB = 0.35  # CUDA's own context, where nobody says otherwise
_SLACK_GIB = 0.15  # what nobody counted, and what the libraries keep outside the allocator
_FRAGMENTS_BYTES = 20 * ledger.MIB  # of freed tensors between those that stay
_BLOCK_TOKENS = {"cuda": 16, "cpu": 128}  # that vLLM's cache hands out at once
SCORED_TOKENS = 128
"""Tokens of a prompt whose logits vLLM is told to compute at once where it scores one; by itself it takes 1,024, which
are 300 MiB of a vocabulary of 150,000 that its own measurement at the start does not see."""
_CPU_KV_BYTES = _GIB
_SEQUENCES = 32
_BATCHED_TOKENS = 2048
_LONGEST = 8192
_LEAST = (256, 1, 1024)  # tokens of a step, sequences, context


def outside_bytes(context_gib: float) -> int:
    """What vLLM's process takes of a GPU beside weights, adapters, cache and a step."""
    return int((context_gib + _SLACK_GIB) * _GIB)


@dataclasses.dataclass(frozen=True)
class VllmSettings:
    """What of vLLM's settings decides about memory and speed; see its documentation of the same names.

    max_loras: adapters on the device at once. max_cpu_loras: adapters in RAM; others are read from disk when needed.
    sleep_mode: weights may go to RAM and the cache away while something else needs the device. outside_bytes: what the
    process takes of a GPU beside all that, and keeps while it sleeps: CUDA's context and a little slack.
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
    outside_bytes: int = outside_bytes(CONTEXT_GIB)


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What the settings are made from: a model's shape, its weights as they are loaded, one element of its cache."""

    shape: ModelShape
    weight_bytes: int
    element_bytes: int

    @property
    def kv_bytes_per_token(self) -> int:
        return ledger.kv_bytes_per_token(self.shape, self.element_bytes)

    def slot_bytes(self, rank: int) -> int:
        return ledger.slot_bytes(self.shape, rank, self.element_bytes)

    def step_bytes(self, batched_tokens: int, sequences: int, rank: int) -> int:
        """What one step of so many tokens of so many requests holds besides weights and cache.

        Largest in a layer, beside what its adapters' first factors give in fp32, or where a prompt is scored.
        """
        shape, element = self.shape, self.element_bytes
        step = ledger.prefill_bytes(shape, sequences, -(-batched_tokens // sequences), element)
        step += 3 * 4 * batched_tokens * rank
        scored = element * (3 * batched_tokens * shape.hidden + min(SCORED_TOKENS, batched_tokens) * shape.vocab)
        return max(step, scored)

    def rounding_bytes(self, rank: int, slots: int) -> int:
        """What the allocator of a GPU reserves for weights and slots beyond their bytes, tensor by tensor.

        vLLM keeps query, key and value as one matrix, and so the MLP's two; slots are a pair of tensors per module.
        """
        shape, element = self.shape, self.element_bytes
        heads = 1 if shape.tied else 2
        head = element * shape.embedding_parameters
        packed = (self.weight_bytes - heads * head) / (element * (shape.linear_parameters + shape.small_parameters))
        one = {name: n_in * n_out for name, (n_in, n_out) in shape.linears.items()}
        fused = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
        weights = [max(0.0, packed) * element * sum(one[name] for name in names) for names in fused]
        pairs = [element * rank * slots * size for sizes in shape.linears.values() for size in sizes]
        extra = shape.layers * sum(ledger.held_bytes(size) - size for size in weights + pairs)
        return int(extra + heads * (ledger.held_bytes(head) - head))

    def workspace_bytes(self, sequences: int) -> int:
        """What vLLM's process holds on a GPU from its start on: angles of positions, masks and counts of sampling,
        cuBLAS' workspace, fragments."""
        angles = self.shape.context_length * self.shape.head_dim
        sampling = sequences * self.shape.vocab * 4 * (1 + 2 / 32)
        held = (
            ledger.held_bytes(self.element_bytes * angles) + ledger.held_bytes(4 * angles) + ledger.held_bytes(sampling)
        )
        return int(held) + ledger.blas_bytes(1) + _FRAGMENTS_BYTES

    def least_cache_bytes(self, tokens: int, device: Device) -> int:
        """The smallest cache with which vLLM starts for a context of `tokens`: whole blocks, and one that it keeps."""
        block = _BLOCK_TOKENS[device]
        return (math.ceil(tokens / block) + 1) * block * self.kv_bytes_per_token


def planned_lines(settings: VllmSettings, sizes: ModelSizes) -> tuple[tuple[str, int], ...]:
    """Everything that vLLM takes of a GPU with these settings, (name, bytes)."""
    return (
        ("weights", sizes.weight_bytes),
        ("adapters", settings.max_loras * sizes.slot_bytes(settings.max_lora_rank)),
        ("kv_cache", settings.kv_cache_memory_bytes),
        ("working", sizes.step_bytes(settings.max_num_batched_tokens, settings.max_num_seqs, settings.max_lora_rank)),
        ("workspace", sizes.workspace_bytes(settings.max_num_seqs)),
        ("rounded_up", sizes.rounding_bytes(settings.max_lora_rank, settings.max_loras)),
        ("driver_context", settings.outside_bytes),
    )


def planned_bytes(settings: VllmSettings, sizes: ModelSizes) -> int:
    """The sum of `planned_lines`."""
    return sum(size for _, size in planned_lines(settings, sizes))


def lora_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that holds `rank`. Raises ValueError above the largest."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise ValueError(f"rank {rank}; allowed: up to {RANKS[-1]}")


def settings_for_gpu(
    budget_gib: float, sizes: ModelSizes, rank: int, adapters: int = 4, cpu_adapters: int = 16, max_model_len: int = 0,
    context_gib: float = CONTEXT_GIB,
) -> VllmSettings:  # fmt: skip
    """Settings with which weights, adapter slots, activations and cache stay below the budget together.

    What has to shrink does so in this order: adapter slots on the device, tokens of a step, sequences, context.
    Raises OutOfMemoryError that names the bytes where not even the smallest fits.
    """
    context = min(max_model_len or _LONGEST, sizes.shape.context_length)
    slot_rank = lora_rank(rank)
    tried = [(slots, _BATCHED_TOKENS, _SEQUENCES, context) for slots in range(min(adapters, cpu_adapters), 0, -1)]
    tried += [(1, 1024, 16, context), (1, 512, 8, context), (1, 512, 4, min(context, 2048)), (1, *_LEAST)]
    for slots, batched, sequences, wanted in tried:
        length = min(wanted, context)
        wanted_bytes, least_bytes = (sizes.least_cache_bytes(tokens, "cuda") for tokens in (sequences * length, length))
        found = VllmSettings(
            kv_cache_memory_bytes=0,
            max_model_len=length,
            max_num_seqs=sequences,
            max_num_batched_tokens=batched,
            max_loras=slots,
            max_cpu_loras=max(slots, cpu_adapters),
            max_lora_rank=slot_rank,
            sleep_mode=True,
            outside_bytes=outside_bytes(context_gib),
        )
        left = int(budget_gib * _GIB) - planned_bytes(found, sizes)
        if left >= least_bytes:
            return dataclasses.replace(found, kv_cache_memory_bytes=min(left, wanted_bytes))
    raise OutOfMemoryError(
        f"weights of {sizes.weight_bytes / _GIB:.2f} GiB, one adapter slot of rank {slot_rank} and a cache for "
        f"{_LEAST[2]} "
        f"tokens do not fit a budget of {budget_gib:.4g} GiB; allowed: a smaller model, or a larger budget.vram_gib"
    )


def settings_for_free(
    budget_gib: float, free_gib: float, sizes: ModelSizes, rank: int, adapters: int = 4,
    context_gib: float = CONTEXT_GIB,
) -> VllmSettings:  # fmt: skip
    """`settings_for_gpu` where no more than `free_gib` can be had now: vLLM does not start where that is less."""
    try:
        return settings_for_gpu(min(budget_gib, free_gib), sizes, rank, adapters, context_gib=context_gib)
    except OutOfMemoryError as error:
        if free_gib >= budget_gib:
            raise
        raise OutOfMemoryError(f"only {free_gib:.2f} GiB of the GPU are free: {error}") from None


def note_of_free(budget_gib: float, free_gib: float, settings: VllmSettings) -> str:
    """What a person should know where vLLM gets less than the budget; "" where it does not."""
    if free_gib >= budget_gib:
        return ""
    return (
        f"only {free_gib:.2f} GiB of the GPU are free, of {budget_gib:.4g} that vLLM may take: it answers within "
        f"{settings.max_model_len:,} tokens, {settings.max_num_seqs} requests and {settings.max_loras} adapters at "
        "once; close other programs that use the GPU"
    )


def least_for_gpu(sizes: ModelSizes, rank: int, context_gib: float = CONTEXT_GIB) -> VllmSettings:
    """The smallest that `settings_for_gpu` goes down to, whatever the budget."""
    batched, sequences, wanted = _LEAST
    length = min(wanted, sizes.shape.context_length)
    return VllmSettings(
        kv_cache_memory_bytes=sizes.least_cache_bytes(length, "cuda"),
        max_model_len=length,
        max_num_seqs=sequences,
        max_num_batched_tokens=batched,
        max_loras=1,
        max_lora_rank=lora_rank(rank),
        sleep_mode=True,
        outside_bytes=outside_bytes(context_gib),
    )


def settings_for_cpu(sizes: ModelSizes, rank: int, adapters: int = 4, cpu_adapters: int = 16) -> VllmSettings:
    """Settings for a machine without an accelerator: a cache of a GiB at most."""
    context = min(_LONGEST, sizes.shape.context_length)
    wanted = _SEQUENCES * context * sizes.kv_bytes_per_token
    return VllmSettings(
        kv_cache_memory_bytes=max(min(wanted, _CPU_KV_BYTES), sizes.least_cache_bytes(context, "cpu")),
        max_model_len=context,
        max_loras=min(adapters, cpu_adapters),
        max_cpu_loras=cpu_adapters,
        max_lora_rank=lora_rank(rank),
    )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in a folder's safetensors, from their headers alone. Raises ModelError."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors, _ = files.safetensors_header(path)
            found |= {name: tuple(row["shape"]) for name, row in tensors.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
    return found


def model_sizes(folder: Path, element_bytes: int) -> ModelSizes:
    """The sizes of the model in `folder`, loaded with so many bytes for each weight, or as its files are quantized.

    Raises ModelError for a model whose shape nobody can plan.
    """
    shape = ModelShape.read(folder / "config.json")
    if shape.prequantized is not None:
        weight_bytes = ledger.stored_weight_bytes(folder)
    elif shape.exact:
        weight_bytes = element_bytes * shape.parameters
    else:  # a family with weights that the shape does not count
        weight_bytes = element_bytes * sum(math.prod(size) for size in tensor_shapes(folder).values())
    return ModelSizes(shape, weight_bytes, element_bytes)
