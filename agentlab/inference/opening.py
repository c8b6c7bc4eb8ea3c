"""Which engine answers, and opening it."""

import functools
import importlib.util
from pathlib import Path
from typing import Literal

from agentlab.config import Settings
from agentlab.errors import ModelError
from agentlab.inference.contract import Engine, OutOfMemoryError
from agentlab.models import ModelFiles, resolve

EngineName = Literal["transformers", "vllm", "openai"]


def choose_engine(settings: Settings, model: ModelFiles) -> EngineName:
    """The engine that the settings ask for. `auto`: vLLM on an accelerator where it is installed and the model fits.

    On a CPU vLLM decodes with adapters several times slower than transformers, so `auto` is transformers there.
    """
    wanted = settings.model.engine
    if wanted != "auto":
        return wanted
    if not has_vllm() or not _has_cuda() or not _fits(settings, model):
        return "transformers"
    return "vllm"


@functools.cache
def has_vllm() -> bool:
    """Whether vLLM is installed; it is not imported."""
    return importlib.util.find_spec("vllm") is not None


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _fits(settings: Settings, model: ModelFiles) -> bool:
    from agentlab.inference.vllm_settings import model_sizes, settings_for_gpu

    try:
        settings_for_gpu(settings.budget.vram_gib, model_sizes(model.folder, 2), served_rank(settings))
    except (OutOfMemoryError, ModelError, AttributeError, ValueError):
        return False  # also a model whose config names its sizes otherwise: transformers can load more kinds
    return True


def served_rank(settings: Settings) -> int:
    """The largest rank that an adapter of this experiment can have."""
    return max(settings.lora.rank, settings.mutation.max_rank)


def open_engine(settings: Settings, model: ModelFiles, engine: EngineName | None = None) -> Engine:
    """Load `model` on the engine that the settings ask for, or on this one.

    openai: `model` is only a name (`served_model`). Raises ModelError, EngineError, OutOfMemoryError.
    """
    name = engine or choose_engine(settings, model)
    if name == "openai":
        from agentlab.inference.openai_engine import open_server

        tokenizer = settings.model.tokenizer
        return open_server(settings.model, model.name, None if tokenizer is None else resolve(tokenizer).folder)
    if name == "vllm":
        if not has_vllm():
            raise ModelError("model.engine vllm: vLLM is not installed; install it, or set model.engine: transformers")
        from agentlab.inference.vllm_engine import VllmEngine

        return VllmEngine(model, settings.budget.vram_gib, rank=served_rank(settings))
    from agentlab.inference.transformers_engine import TransformersEngine

    return TransformersEngine(model, settings.budget.vram_gib)


def served_model(name: str) -> ModelFiles:
    """A model that is only a name on a server."""
    return ModelFiles(name, Path(), "")
