"""The account of memory before anything runs: bytes of weights, adapters, KV cache and a training step.

Weights, KV cache and adapters are exact (the tests hold them against real tensors). Activations are a model of what
transformers, PEFT, TRL and bitsandbytes keep at the moment of their peak; it was read off the allocator's history on a
GPU, block by block, and `benchmarks/vram.py` measures how far it is off. Everything is in bytes.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from agentlab import files
from agentlab.errors import ModelError
from agentlab.hardware.rungs import BF16, NF4_BLOCK, Rung
from agentlab.hardware.shape import ModelShape

MIB = 2**20
GIB = 2**30

# TRL 1.16 projects hidden states onto the vocabulary in tiles of this size (trl.kernels.chunked_logprob).
LOGIT_TILE_TOKENS = 4096
LOGIT_TILE_VOCAB = 32_768
KV_ROOM_TOKENS = 64  # agentlab.inference.cache allocates so many tokens ahead
# agentlab.inference.batch reads a prompt's beginning once when at least so many rows share at least so many tokens.
SHARE_ROWS = 4
SHARE_TOKENS = 16
ADAM_BYTES = 8  # two moments in fp32
_ADAPTER_BYTES = 4  # PEFT keeps LoRA factors in fp32 beside a 16-bit or quantized base, and they are saved so
_NORM_BYTES = 4  # RMSNorm keeps its input in fp32
# Rungs whose frozen modules keep their inputs as if their weights had gradients: MatMul8bitLt of bitsandbytes 0.50.2,
# HQQMatmulNoCacheMul of hqq 0.2.8.
INPUT_KEEPERS = ("int8", "hqq3")
_ADAPTER_FILES = 4096  # config, card and safetensors header


@dataclass(frozen=True)
class _Account:
    """Lines in bytes; `total` is their sum."""

    @property
    def total(self) -> int:
        return sum(value for _, value in self.lines())

    def lines(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of each line."""
        for field in fields(self):
            yield field.name, getattr(self, field.name)


# -- weights ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights(_Account):
    """Bytes of a loaded base model."""

    linear: int  # the linear modules, packed
    quantization_state: int  # scales, zeros and maxima of the linear modules
    embedding: int
    head: int  # 0 where it is the embedding
    small: int  # norms, biases and the rotary buffers

    @property
    def footprint(self) -> int:
        """What transformers' `get_memory_footprint` counts: all but the quantization state."""
        return self.total - self.quantization_state


def weights(shape: ModelShape, rung: Rung, element_bytes: int | None = None) -> Weights:
    """Bytes of the base model at a rung. element_bytes: of what is not quantized (4 at fp32, else 2)."""
    element = element_bytes or (4 if rung.name == "fp32" else 2)
    sizes = shape.linears.values()
    table = element * shape.embedding_parameters
    rotary = 2 * 4 * (shape.head_dim // 2)  # inverse frequencies in fp32, and a copy as they were
    return Weights(
        linear=shape.layers * sum(rung.packed_bytes(n_in, n_out) for n_in, n_out in sizes),
        quantization_state=shape.layers * sum(rung.state_bytes(n_in, n_out, element) for n_in, n_out in sizes),
        embedding=table,
        head=0 if shape.tied else table,
        small=element * shape.small_parameters + rotary,
    )


def stored_weight_bytes(path: Path) -> int:
    """Bytes of the weights in a model's folder (safetensors, sharded or not) or in a GGUF file, as they are stored.

    This is how a model that was quantized before it was stored is sized. Raises ModelError.
    """
    try:
        if path.is_file():
            return path.stat().st_size
        index = path / "model.safetensors.index.json"
        if index.is_file():
            total = json.loads(index.read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
            if total is not None:
                return int(total)
        parts = sorted(path.glob("*.safetensors"))
        if not parts:
            raise ModelError(f"{path} holds no safetensors weights")
        return sum(_tensor_bytes(part) for part in parts)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"the weights at {path} are damaged or cannot be read: {error}") from None


def _tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file."""
    tensors, _ = files.safetensors_header(path)
    spans = [row["data_offsets"] for row in tensors.values()]
    return sum(int(end) - int(start) for start, end in spans)


# -- adapters -----------------------------------------------------------------------------------------------------


def lora_parameters(shape: ModelShape, rank: int, modules: Collection[str]) -> int:
    """Weights of one LoRA: rank · (in + out) of every module whose name ends in one of `modules`."""
    named = {name: size for name, size in shape.linears.items() if name in modules}
    return shape.layers * rank * sum(n_in + n_out for n_in, n_out in named.values())


def adapter_bytes(shape: ModelShape, rank: int, modules: Collection[str], element_bytes: int = _ADAPTER_BYTES) -> int:
    """Bytes of one LoRA in memory, on the GPU or in RAM."""
    return element_bytes * lora_parameters(shape, rank, modules)


def adapter_file_bytes(shape: ModelShape, rank: int, modules: Collection[str]) -> int:
    """Bytes of one adapter's folder on disk, rounded up for its config and card."""
    return adapter_bytes(shape, rank, modules) + _ADAPTER_FILES


def sum_bytes(shape: ModelShape, modules: Collection[str], element_bytes: int = 4) -> int:
    """Bytes of the weights to which an adapter is added while it answers, in fp32 on a CPU; the base's own stay."""
    changed = [n_in * n_out for name, (n_in, n_out) in shape.linears.items() if name in modules]
    return shape.layers * element_bytes * sum(changed)


def slot_bytes(shape: ModelShape, max_rank: int, element_bytes: int = 2) -> int:
    """Bytes of one adapter slot in vLLM, which it allocates for every linear module whatever the adapter targets."""
    return element_bytes * lora_parameters(shape, max_rank, shape.linears)


# -- answering ----------------------------------------------------------------------------------------------------


def kv_bytes_per_token(shape: ModelShape, element_bytes: int = 2) -> int:
    """Bytes that one token of one request keeps: a key and a value per layer and key-value head."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * element_bytes


def kv_cache_bytes(shape: ModelShape, rows: int, tokens: int, element_bytes: int = 2) -> int:
    """Bytes of keys and values of `rows` requests of `tokens` tokens each; windowed layers keep no more than theirs."""
    layer = kv_bytes_per_token(shape, element_bytes) // shape.layers
    # a windowed layer drops the token that the next one pushes out before it is asked for
    windowed = tokens if shape.window is None else min(tokens, shape.window - 1)
    return rows * layer * ((shape.layers - shape.windowed_layers) * tokens + shape.windowed_layers * windowed)


def prefill_bytes(
    shape: ModelShape, rows: int, tokens: int, element_bytes: int = 2, rung: Rung = BF16, shared: int = 0
) -> int:
    """Peak of what is alive while `rows` prompts of `tokens` tokens are read, or at their last logits.

    Largest in the gated MLP, as the forward of transformers' Llama writes it: beside embedding, residual, attention's
    sum and normed input either SiLU, up and their product, or SiLU, what becomes of up, and up's weights restored. Rows
    of unequal length have a mask of a byte per pair of tokens. The logits come in fp32 beside the element type.
    shared: so many tokens that all rows begin with are read once, before the others, where that is worth it.
    """
    if rows < SHARE_ROWS or shared < SHARE_TOKENS:
        shared = 0
    count = max(rows * (tokens - shared), shared)
    streams = 4 * element_bytes * count * shape.hidden
    product = element_bytes * count * shape.intermediate
    if rung.name == "int8":  # LLM.int8: sums in 32 bits, scaled to fp16, then cast to the element type
        mlp = product + (4 + 2 + element_bytes + element_bytes) * count * shape.intermediate
    else:
        mlp = max(3 * product, 2 * product + dequantization_bytes(shape, rung, element_bytes))
    mask = rows * (tokens - shared) * tokens if rows > 1 else 0
    logits = 2 * element_bytes * count * shape.hidden + rows * (element_bytes + 4) * shape.vocab
    return max(streams + mlp, logits) + mask


def dequantization_bytes(shape: ModelShape, rung: Rung, element_bytes: int = 2) -> int:
    """Bytes of the largest linear module restored for a matrix product; 0 where none is restored.

    NF4 restores its absolute maxima to fp32 first, twice (their 8 bits, then with their mean). HQQ unpacks, subtracts
    the zeros and scales: three matrices. LLM.int8 multiplies integers, and restores on the way back alone.
    """
    largest = max(n_in * n_out for n_in, n_out in shape.linears.values())
    if rung.name == "nf4":
        return element_bytes * largest + 2 * 4 * largest // NF4_BLOCK
    return {"int8": 1, "hqq3": 3}.get(rung.name, 0) * element_bytes * largest


def blas_bytes(threads: int, capability: tuple[int, int] | None = None) -> int:
    """Workspaces that torch keeps for cuBLAS and cuBLASLt, a pair per thread that multiplies, for good.

    capability: the card's compute capability; Hopper's and data-centre Blackwell's are larger, None: another's.
    torch/csrc: getChosenWorkspaceSize and getCUDABlasLtWorkspaceSize of aten/src/ATen/cuda/CUDABlas.cpp.
    """
    large = capability is not None and capability[0] in (9, 10)
    return threads * ((32 if large else 8) * MIB + (0 if large else MIB // 8) + MIB)


def held_bytes(size: float) -> float:
    """What torch's allocator reserves on a GPU for one of many equal tensors that stay, which share whole segments.

    A segment is 2 MiB for tensors of up to 1 MiB, 20 MiB for those below 10, and the tensor's own, rounded up to 2 MiB,
    above (c10/cuda/CUDACachingAllocator.cpp).
    """
    for largest, segment in ((MIB, 2 * MIB), (10 * MIB, 20 * MIB)):
        if 0 < size <= largest:
            return segment / (segment // size)
    return math.ceil(size / (2 * MIB)) * 2 * MIB


@dataclass(frozen=True)
class Serving(_Account):
    """Bytes while answering."""

    weights: int
    adapters: int
    kv_cache: int
    working: int  # activations, logits, restored weights
    workspace: int  # of the libraries that multiply

    @property
    def useful(self) -> int:
        """What answers need to be kept for longer than one step."""
        return self.weights + self.adapters + self.kv_cache


def serving(
    shape: ModelShape,
    rows: int,
    tokens: int,
    *,
    weight_bytes: int,
    rung: Rung,
    adapter_bytes: int = 0,
    element_bytes: int = 2,
    workspace_bytes: int = 0,
    shared: int = 0,
) -> Serving:
    """Bytes for a batch of `rows` requests of `tokens` tokens (prompt and answer), adapters included.

    shared: tokens that all prompts begin with.
    """
    return Serving(
        weights=weight_bytes,
        adapters=adapter_bytes,
        kv_cache=kv_cache_bytes(shape, rows, tokens + KV_ROOM_TOKENS, element_bytes),
        working=prefill_bytes(shape, rows, tokens, element_bytes, rung, shared),
        workspace=workspace_bytes,
    )


# -- training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training(_Account):
    """Bytes at the peak of one optimiser step."""

    weights: int
    adapter: int
    optimiser: int
    gradients: int  # those that are alive at the peak
    activations: int  # kept until the backward pass comes to them
    working: int  # the largest of what comes one after the other: the loss, one layer's backward pass
    workspace: int  # of the libraries that multiply


@dataclass(frozen=True)
class Step:
    """One optimiser step of LoRA training, in micro-batches of `rows` sequences of `tokens` tokens that may all count.

    mask_bytes: what dropout keeps per element; a byte in CUDA's fused kernel, a factor in fp32 on a CPU. padded: rows
    of unequal length, whose mask keeps attention from reading grouped keys and values as they are. accumulated: more
    than one micro-batch, so that gradients of the one before are there.
    """

    rows: int
    tokens: int
    rank: int
    modules: tuple[str, ...]
    dropout: bool = True
    checkpointing: bool = True
    mask_bytes: int = 1
    padded: bool = False
    accumulated: bool = False


def training(
    shape: ModelShape, rung: Rung, step: Step, *, weight_bytes: int | None = None, element_bytes: int = 2,
    workspace_bytes: int = 0,
) -> Training:  # fmt: skip
    """Bytes of one step of LoRA training with AdamW and TRL's chunked loss."""
    parameters = _ADAPTER_BYTES * lora_parameters(shape, step.rank, step.modules)
    # as attributes of bitsandbytes' function: autograd, and so checkpointing, knows nothing of them
    held = frozen_input_bytes(shape, step, element_bytes) if step.checkpointing and rung.name == "int8" else 0
    layer = layer_activation_bytes(shape, step, element_bytes, rung, inputs=not held)
    boundary = step.rows * step.tokens * shape.hidden * element_bytes
    last_norm = _NORM_BYTES * step.rows * step.tokens * shape.hidden
    backward = _backward_bytes(shape, step, rung, element_bytes)
    loss = last_norm + loss_bytes(shape, step, element_bytes)
    # checkpointing keeps each layer's input and computes one layer again (Chen et al. 2016, arXiv:1604.06174)
    if step.checkpointing:
        activations, working = shape.layers * (boundary + held), max(loss, layer + backward)
    else:
        activations, working = shape.layers * layer, max(loss, backward)
    gradients = parameters if step.accumulated else 0
    if parameters - gradients > activations + working:  # a large adapter, few tokens: the peak is the optimiser's
        gradients, activations, working = parameters, 0, 0
    return Training(
        weights=weights(shape, rung, element_bytes).total if weight_bytes is None else weight_bytes,
        adapter=parameters,
        optimiser=ADAM_BYTES // _ADAPTER_BYTES * parameters,
        gradients=gradients,
        activations=activations,
        working=working,
        workspace=workspace_bytes,
    )


def layer_activation_bytes(
    shape: ModelShape, step: Step, element_bytes: int = 2, rung: Rung = BF16, inputs: bool = True
) -> int:
    """Bytes that one layer keeps for its backward pass, frozen weights and fused attention assumed.

    After Korthikanti et al. 2022 (arXiv:2205.05198, section 4), for a gated MLP, grouped queries and RMSNorm, without
    the attention matrix, which fused attention does not keep. Under LoRA a linear module keeps its own copy of its
    input, and with dropout the mask. Beside a quantized module no copy is made: without dropout LoRA reads the input
    itself. A frozen one keeps nothing, but for those of INPUT_KEEPERS. inputs: whether theirs count.
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = _NORM_BYTES * (2 * shape.hidden + (q + kv if shape.qk_norm else 0))
    attention = element_bytes * (2 * q + 2 * (q if step.padded else kv)) + 4 * shape.heads  # q, out, k, v, log-sums
    mlp = element_bytes * 3 * shape.intermediate  # gate, its SiLU, up
    adapted = {name: n_in for name, (n_in, _) in shape.linears.items() if name in step.modules}
    read = set(shape.linears) if inputs and rung.name in INPUT_KEEPERS else set()
    if rung.is_quantized and not step.dropout:
        read |= adapted.keys()
        copied = 0
    else:
        copied = (element_bytes + (step.mask_bytes if step.dropout else 0)) * sum(adapted.values())
    reading = element_bytes * _read(shape, read)
    rank = len(adapted) * step.rank * element_bytes
    return step.rows * step.tokens * (norms + attention + mlp + reading + copied + rank)


def frozen_input_bytes(shape: ModelShape, step: Step, element_bytes: int = 2) -> int:
    """Bytes of what the linear modules of one layer read, attention's own output included."""
    attended = shape.heads * shape.head_dim
    return element_bytes * step.rows * step.tokens * (_read(shape, shape.linears) + attended)


def _read(shape: ModelShape, modules: Collection[str]) -> int:
    """Elements per token of what these modules read, a tensor that several read once; attention's output aside."""
    shared = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    hidden = sum(any(name in modules for name in names) for names in shared)
    return hidden * shape.hidden + ("down_proj" in modules) * shape.intermediate


def loss_bytes(shape: ModelShape, step: Step, element_bytes: int = 2) -> int:
    """Bytes of TRL's chunked loss: one tile of logits, no narrower for a small vocabulary, and the states' gradient in
    fp32.

    Whole logits would take (element + 4) bytes · tokens · vocabulary, twice with their gradient.
    """
    count = step.rows * step.tokens
    tile = min(count, LOGIT_TILE_TOKENS) * LOGIT_TILE_VOCAB * element_bytes
    return tile + count * shape.hidden * (4 + element_bytes)


def _backward_bytes(shape: ModelShape, step: Step, rung: Rung, element_bytes: int) -> int:
    """What the last layer's MLP adds on its way back: gradients, and where weights are quantized one restored matrix.

    Either the gradients of SiLU, up and their product, or that of the product alone while a matrix is restored.
    """
    count = step.rows * step.tokens * element_bytes
    restored = dequantization_bytes(shape, rung, element_bytes)
    return max(
        count * (3 * shape.intermediate + shape.hidden), count * (shape.intermediate + 3 * shape.hidden) + restored
    )


# -- the other way round ------------------------------------------------------------------------------------------


def longest_context(
    shape: ModelShape, free_bytes: int, rows: int = 1, element_bytes: int = 2, rung: Rung = BF16
) -> int:
    """Most tokens per request whose KV cache and prefill fit into `free_bytes`, at most the model's own context."""

    def needed(tokens: int) -> int:
        cache = kv_cache_bytes(shape, rows, tokens + KV_ROOM_TOKENS, element_bytes)
        return cache + prefill_bytes(shape, rows, tokens, element_bytes, rung)

    return _largest(lambda tokens: needed(tokens) <= free_bytes, shape.context_length)


def most_adapters(shape: ModelShape, rank: int, modules: Collection[str], free_bytes: int) -> int:
    """How many adapters of this rank fit into `free_bytes`."""
    return max(0, free_bytes) // max(1, adapter_bytes(shape, rank, modules))


def largest_batch(
    shape: ModelShape, tokens: int, free_bytes: int, limit: int, element_bytes: int = 2, rung: Rung = BF16,
    shared: int = 0,
) -> int:  # fmt: skip
    """Most requests of `tokens` tokens that fit into `free_bytes` at once, at most `limit`; 0 where not even one."""

    def needed(rows: int) -> int:
        cache = kv_cache_bytes(shape, rows, tokens + KV_ROOM_TOKENS, element_bytes)
        return cache + prefill_bytes(shape, rows, tokens, element_bytes, rung, shared)

    def fits(rows: int) -> bool:
        return needed(rows) <= free_bytes

    # from SHARE_ROWS on rows may take less than fewer of them; above and below it more rows take more
    if limit >= SHARE_ROWS and fits(SHARE_ROWS):
        return _largest(fits, limit, SHARE_ROWS)
    return _largest(fits, min(limit, SHARE_ROWS - 1))


def _largest(fits: Callable[[int], bool], limit: int, low: int = 0) -> int:
    """The largest number from `low` to `limit` that fits, where all between do too; `low` is taken to fit."""
    high = limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
