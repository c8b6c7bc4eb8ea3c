"""A base model in memory at one rung of the quantization ladder."""

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from agentlab.config import RungName
from agentlab.errors import ModelError, first_line
from agentlab.hardware import rungs
from agentlab.hardware.oom import is_out_of_memory
from agentlab.inference.contract import OutOfMemoryError
from agentlab.inference.stored import check_rung, check_transformers, stored_quantization
from agentlab.models import ModelFiles, check_whole

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = "its weights have other sizes than its config.json says"
_HQQ = {"nbits": 3, "group_size": 64, "axis": 1}


def element_type(rung: RungName | None, device: str) -> torch.dtype:
    """What embedding, head, norms and sums are in. On a CPU all but the rung bf16 compute in fp32.

    There 16 bits would be slower, and answers would depend on their neighbours in the batch by rounding.
    """
    if rungs.element_bytes(rung, "cuda" if device == "cuda" else "cpu") == 4:
        return torch.float32
    return torch.bfloat16 if device == "cpu" or has_bf16() else torch.float16


def has_bf16() -> bool:
    """Whether the GPU computes in bf16. torch itself calls it supported where it is emulated, on any card: slowly, and
    vLLM refuses it. No context is made on the GPU for this.
    """
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def load_base(model: ModelFiles, rung: RungName | None, device: str) -> Any:
    """The base model at a rung, frozen and in evaluation mode; rung None: quantized in its files, loaded as it is.

    Raises OutOfMemoryError, and ModelError for what cannot be loaded or lacks its library.
    """
    check_rung(model, rung)
    stored = stored_quantization(model.folder)
    check_transformers(model)
    try:
        base = _load(model.folder, rung, device)
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"{model.name} at {rung or stored} does not fit into memory: {first_line(error)}"
            ) from error
        if isinstance(error, ImportError) or (stored and isinstance(error, RuntimeError)):
            what = f"{model.name} is stored in {stored}" if stored else f"{model.name} at rung {rung}"
            raise ModelError(f"{what} and cannot be loaded here: {first_line(error)}") from error
        if isinstance(error, OSError | ValueError | KeyError | RuntimeError):
            said = _SIZES if "ignore_mismatched_sizes" in str(error) else first_line(error)
            raise ModelError(f"{model.folder} cannot be loaded: {said}") from error
        raise
    base.requires_grad_(False)
    # how to sample is not the model's to say, but the request's: Qwen2.5's files penalize the words of the prompt
    ends = {name: getattr(base.generation_config, name) for name in _TOKENS}
    base.generation_config = GenerationConfig(**ends)
    return base.eval()


def _load(folder: Path, rung: RungName | None, device: str) -> Any:
    dtype = element_type(rung, device)
    if rung == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)
    if rung is None or rung in ("int8", "nf4"):
        options = {} if rung is None else {"quantization_config": _bitsandbytes(rung, dtype)}
        return _as_quantized(_from_files(folder, dtype=dtype, device_map={"": device}, **options))
    base = _from_files(folder, dtype=dtype)
    if rung != "hqq3":
        return base.to(device)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each kind of module
        return _quantized_by_hqq(base, dtype, device)


def _from_files(folder: Path, **options: Any) -> Any:
    base, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    check_whole(found, folder)
    return base


def _as_quantized(base: Any) -> Any:
    """Have bitsandbytes keep 4-bit weights as it quantized them.

    At the first answer on a CPU with AVX512-BF16 it would pack them anew for a kernel of its own, rounded to bf16:
    another model than on the next machine, not the one that was trained on, and an error for widths that are no
    multiple of 64.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return base


def _is_no_cast(record: logging.LogRecord) -> bool:
    """Whether it is something else than a line for every product that bf16 is cast to fp16, as LLM.int8 is built."""
    return "will be cast" not in record.getMessage()


def _bitsandbytes(rung: RungName, dtype: torch.dtype) -> BitsAndBytesConfig:
    if rung == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _quantized_by_hqq(base: Any, dtype: torch.dtype, device: str) -> Any:
    # transformers' own HqqConfig is not implemented in this version
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    AutoHQQHFModel.quantize_model(base, quant_config=BaseQuantizeConfig(**_HQQ), compute_dtype=dtype, device=device)
    return base


def weight_count(base: Any) -> int:
    """Number of weights of a base model as they were before they were packed, without adapters."""
    count: int = sum(p.numel() for name, p in base.named_parameters() if "lora_" not in name)
    for name, module in base.named_modules():
        packed = None if "lora_" in name else _packed(module)
        if packed is not None:
            count += module.in_features * module.out_features - packed.numel()
            bias = getattr(module, "bias", None)
            if bias is not None and not isinstance(bias, torch.nn.Parameter):
                count += bias.numel()
    return int(count)


def _packed(module: Any) -> torch.nn.Parameter | None:
    """The packed weights of a quantized linear module."""
    for name in ("W_q", "weight"):
        value = getattr(module, name, None)
        if isinstance(value, torch.nn.Parameter) and hasattr(module, "in_features") and not value.is_floating_point():
            return value
    return None
