"""Models that are quantized in their files: with what, and which engine can load them here."""

import contextlib
import json
from pathlib import Path
from typing import Any

from agentlab.errors import ModelError, first_line
from agentlab.hardware.shape import quantization_method
from agentlab.hardware.sizing import Device
from agentlab.models import ModelFiles

_VLLM_LOADS = ("awq", "gptq", "compressed-tensors")  # packed as they are, on a CPU, too; it computes in 16 bits
_VLLM_LOADS_ON_A_GPU = (*_VLLM_LOADS, "fp8")
_NOT_BY_VLLM = ("bitsandbytes", "hqq")
_UNPACKED = "transformers would unpack the whole model"


def stored_quantization(folder: Path) -> str | None:
    """The method with which the weights in `folder` are quantized already, as awq or gptq; None where they are not."""
    return quantization_method(_config(folder))


def by_vllm(method: str | None, device: Device) -> bool:
    """Whether vLLM is known to answer from weights as they are, or that are quantized so; None: not quantized."""
    return method is None or method in (_VLLM_LOADS_ON_A_GPU if device == "cuda" else _VLLM_LOADS)


def check_vllm(model: ModelFiles) -> None:
    """Raise ModelError for a model that is quantized so that vLLM is known not to load it."""
    method = stored_quantization(model.folder)
    if method in _NOT_BY_VLLM:
        raise ModelError(
            f"{model.name} is stored in {method}, which vLLM does not load; allowed: model.engine transformers"
        )


def check_transformers(model: ModelFiles) -> None:
    """Raise ModelError where the model's quantized weights cannot be loaded by transformers here."""
    if reason := not_by_transformers(model.folder):
        stored = stored_quantization(model.folder)
        elsewhere = "; allowed: model.engine vllm" if by_vllm(stored, "cuda") else ""
        raise ModelError(f"{model.name} is stored in {stored} and cannot be loaded here: {reason}{elsewhere}")


def check_learns(model: ModelFiles) -> None:
    """Raise ModelError for a model whose quantized weights can only be answered from here: transformers trains."""
    if reason := not_by_transformers(model.folder):
        raise ModelError(
            f"{model.name} is stored in {stored_quantization(model.folder)}, and nothing can be learned on it here: "
            f"{reason}; allowed: the same model as it was before, which model.rung: nf4 makes as small"
        )


def check_rung(model: ModelFiles, rung: str | None) -> None:
    """Raise ModelError where a rung is asked for of a model that has its own."""
    stored = stored_quantization(model.folder)
    if stored is not None and rung not in (None, "auto"):
        raise ModelError(
            f"{model.name} is stored in {stored} and loaded as it is: rung {rung}; allowed: model.rung auto"
        )


def not_by_transformers(folder: Path) -> str:
    """Why transformers is not to load the quantized weights in `folder` here; "" where it may.

    Nothing is loaded: it is asked what it would ask itself first.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    method = stored_quantization(folder)
    if method is None:
        return ""
    if method == "compressed-tensors":
        return f"{_UNPACKED} at its first answer"
    try:
        quantizer = AutoHfQuantizer.from_config(_config(folder)["quantization_config"], pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except (ImportError, RuntimeError) as error:  # a missing library, a card that is needed
        return first_line(error).rstrip(".")
    except Exception as error:  # a method that nobody knows, or values that it does not take
        return f"its quantization_config cannot be read ({type(error).__name__}: {first_line(error)})"
    return _UNPACKED if getattr(quantizer.quantization_config, "dequantize", False) else ""


def _config(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}
