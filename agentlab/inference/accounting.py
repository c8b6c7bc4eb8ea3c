"""What a resident model holds, for whoever watches memory."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from agentlab.hardware.watch import OWNERS, Holding

if TYPE_CHECKING:
    from agentlab.inference.resident import ResidentModel
    from agentlab.inference.vllm_engine import VllmEngine

_MIB = 2**20


def account_for(model: "ResidentModel") -> None:
    """Register the model's base, its adapters and, on a GPU, what training or answering takes beside them.

    For as long as the model lives and is not closed; of two models the last one counts. The allocator's cache is
    reserved on purpose and idle: it is given up when somebody needs it.
    """
    alive = weakref.ref(model)
    OWNERS.register("base", lambda: Holding(_base_mib(_there(alive))))
    OWNERS.register("adapters", lambda: Holding(_there(alive).adapter_bytes() / _MIB))
    if model.device == "cuda":
        OWNERS.register("training", lambda: _beside(_there(alive), while_training=True))
        OWNERS.register("kv_cache", lambda: _beside(_there(alive), while_training=False))


def account_for_child(engine: "VllmEngine") -> None:
    """Register what vLLM's process has taken of a GPU: weights, adapter slots, and a cache that is reserved on purpose.

    On a CPU nothing: the process's RAM is not this one's.
    """
    if engine.device != "cuda":
        return
    alive, settings, sizes = weakref.ref(engine), engine.settings, engine.sizes
    slots = settings.max_loras * sizes.slot_bytes(settings.max_lora_rank)

    def held(size: int, idle: bool = False) -> Callable[[], Holding]:
        def ask() -> Holding:
            running = alive()
            if running is None or not running.is_running:
                raise ReferenceError("the process is gone, or sleeps")
            return Holding(size / _MIB, size / _MIB if idle else 0.0)

        return ask

    OWNERS.register("base", held(sizes.weight_bytes))
    OWNERS.register("adapters", held(slots))
    OWNERS.register("kv_cache", held(settings.kv_cache_memory_bytes, idle=True))


def _there(alive: "weakref.ref[ResidentModel]") -> "ResidentModel":
    model = alive()
    if model is None or model.base is None:
        raise ReferenceError("the model is closed")  # the registry leaves out whoever cannot answer
    return model


def _base_mib(model: "ResidentModel") -> float:
    named = list(model.base.named_parameters())
    return float(sum(p.numel() * p.element_size() for name, p in named if "lora_" not in name)) / _MIB


def _beside(model: "ResidentModel", while_training: bool) -> Holding:
    """What torch's allocator holds beyond the weights, for whichever of the two uses it now."""
    import torch

    if model.base.training is not while_training:
        return Holding(0.0)
    reserved, allocated = torch.cuda.memory_reserved() / _MIB, torch.cuda.memory_allocated() / _MIB
    weights = _base_mib(model) + model.adapter_bytes() / _MIB
    return Holding(max(0.0, reserved - weights), idle_mib=max(0.0, reserved - allocated))
