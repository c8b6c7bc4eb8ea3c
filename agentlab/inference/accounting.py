"""What the models in use hold of the memory that is watched: the card's where torch runs on one, else the RAM."""

import threading
import weakref
from typing import TYPE_CHECKING

from agentlab.hardware import monitor
from agentlab.hardware.watch import OWNERS, Holding

if TYPE_CHECKING:
    from agentlab.inference.resident import ResidentModel
    from agentlab.inference.vllm_engine import VllmEngine

_MIB = 2**20
_lock = threading.Lock()
_models: "weakref.WeakSet[ResidentModel]" = weakref.WeakSet()
_children: "weakref.WeakSet[VllmEngine]" = weakref.WeakSet()


def account_for(model: "ResidentModel") -> None:
    """Count the model's base, its adapters and, on a GPU, what training or answering takes beside them.

    For as long as the model lives and is not closed; one that was moved into the RAM beside a GPU holds none of it.
    The allocator's cache is reserved on purpose and idle: it is given up when somebody needs it.
    """
    with _lock:
        _models.add(model)
    _register()


def account_for_child(engine: "VllmEngine") -> None:
    """Count what vLLM's process has taken of a GPU: weights, adapter slots, and a cache that is reserved on purpose.

    While it runs and is awake. On a CPU nothing: the process's RAM is not this one's.
    """
    if engine.device == "cuda":
        with _lock:
            _children.add(engine)
        _register()


def _register() -> None:
    OWNERS.register("base", _base)
    OWNERS.register("adapters", _adapters)
    OWNERS.register("training", lambda: _beside(while_training=True))
    OWNERS.register("kv_cache", lambda: _beside(while_training=False))


def _in_use() -> "tuple[list[ResidentModel], list[VllmEngine]]":
    watched = monitor.accelerator()
    with _lock:
        models = [one for one in _models if one.base is not None and one.device == watched]
        children = [one for one in _children if one.is_running]
    if not models and not children:
        raise LookupError("no model is in use")  # the registry leaves out whoever cannot answer
    return models, children


def _base() -> Holding:
    models, children = _in_use()
    return Holding(sum(map(_base_mib, models)) + sum(one.sizes.weight_bytes for one in children) / _MIB)


def _adapters() -> Holding:
    models, children = _in_use()
    slots = sum(one.settings.max_loras * one.sizes.slot_bytes(one.settings.max_lora_rank) for one in children)
    return Holding((sum(one.adapter_bytes() for one in models) + slots) / _MIB)


def _beside(while_training: bool) -> Holding:
    """What is held beyond the weights: by torch's allocator, for whichever of the two uses it now, and by vLLM."""
    models, children = _in_use()
    held = idle = 0.0
    models = [one for one in models if one.device == "cuda"]
    if not models and (while_training or not children):
        raise LookupError("nothing is held beside the weights that anybody counts")
    if models and any(one.base.training for one in models) is while_training:
        import torch

        reserved, allocated = torch.cuda.memory_reserved() / _MIB, torch.cuda.memory_allocated() / _MIB
        weights = sum(_base_mib(one) + one.adapter_bytes() / _MIB for one in models)
        held, idle = max(0.0, reserved - weights), max(0.0, reserved - allocated)
    if not while_training:
        caches = sum(one.settings.kv_cache_memory_bytes for one in children) / _MIB
        held, idle = held + caches, idle + caches
    return Holding(held, idle)


def _base_mib(model: "ResidentModel") -> float:
    named = list(model.base.named_parameters())
    return float(sum(p.numel() * p.element_size() for name, p in named if "lora_" not in name)) / _MIB
