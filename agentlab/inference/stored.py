"""Models that are quantized in their files: with what, and which engine can load them here."""

import contextlib
import json
from pathlib import Path
from typing import Any

from agentlab.errors import ModelError
from agentlab.models import ModelFiles

VLLM_LOADS = ("awq", "gptq", "compressed-tensors")
"""Methods whose weights vLLM answers from as they are, on a GPU and on a CPU; it computes in 16 bits."""


def stored_quantization(folder: Path) -> str | None:
    """The method with which the weights in `folder` are quantized already, as awq or gptq; None where they are not."""
    return _quantization(folder).get("quant_method")


def check_transformers(model: ModelFiles) -> None:
    """Raise ModelError where the model's quantized weights cannot be loaded by transformers here."""
    if reason := not_by_transformers(model.folder):
        stored = stored_quantization(model.folder)
        elsewhere = "; allowed: model.engine vllm" if stored in VLLM_LOADS else ""
        raise ModelError(f"{model.name} is stored in {stored} and cannot be loaded here: {reason}{elsewhere}")


def check_learns(model: ModelFiles) -> None:
    """Raise ModelError for a model whose quantized weights can only be answered from here: transformers trains."""
    if reason := not_by_transformers(model.folder):
        raise ModelError(
            f"{model.name} is stored in {stored_quantization(model.folder)}, and nothing can be learned on it here: "
            f"{reason}; allowed: the same model as it was before, which model.rung: nf4 makes as small"
        )


def not_by_transformers(folder: Path) -> str:
    """Why transformers is not to load the quantized weights in `folder` here; "" where it may.

    Nothing is loaded: it is asked what it would ask itself first.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    values = _quantization(folder)
    if not values:
        return ""
    if values.get("quant_method") == "compressed-tensors":
        return "transformers would unpack the whole model at its first answer"
    try:
        AutoHfQuantizer.from_config(values, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # a missing library, a card that is needed, a method that nobody knows
        return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ""


def check_rung(model: ModelFiles, rung: str | None) -> None:
    """Raise ModelError where a rung is asked for of a model that has its own."""
    stored = stored_quantization(model.folder)
    if stored is not None and rung not in (None, "auto"):
        raise ModelError(
            f"{model.name} is stored in {stored} and loaded as it is: rung {rung}; allowed: model.rung auto"
        )


def _quantization(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values = config.get("quantization_config")
        return values if isinstance(values, dict) else {}
    return {}
