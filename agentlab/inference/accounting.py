"""What a resident model holds, for whoever watches memory."""

import weakref
from typing import TYPE_CHECKING, Any

from agentlab.hardware.watch import OWNERS, Holding

if TYPE_CHECKING:
    from agentlab.inference.resident import ResidentModel

_MIB = 2**20


def account_for(model: "ResidentModel") -> None:
    """Register the model's base, its adapters and, on a GPU, what training or answering takes beside them.

    For as long as the model lives and is not closed; of two models the last one counts. The allocator's cache is
    reserved on purpose and idle: it is given up when somebody needs it.
    """
    alive = weakref.ref(model)
    OWNERS.register("base", lambda: Holding(_weights_mib(_base(alive), adapters=False)))
    OWNERS.register("adapters", lambda: Holding(_weights_mib(_base(alive), adapters=True)))
    if model.device == "cuda":
        OWNERS.register("training", lambda: _beside(_base(alive), while_training=True))
        OWNERS.register("kv_cache", lambda: _beside(_base(alive), while_training=False))


def _base(alive: "weakref.ref[ResidentModel]") -> Any:
    model = alive()
    if model is None or model.base is None:
        raise ReferenceError("the model is closed")  # the registry leaves out whoever cannot answer
    return model.base


def _weights_mib(base: Any, adapters: bool) -> float:
    named = list(base.named_parameters())
    return float(sum(p.numel() * p.element_size() for name, p in named if ("lora_" in name) is adapters)) / _MIB


def _beside(base: Any, while_training: bool) -> Holding:
    """What torch's allocator holds beyond the weights, for whichever of the two uses it now."""
    import torch

    if base.training is not while_training:
        return Holding(0.0)
    reserved, allocated = torch.cuda.memory_reserved() / _MIB, torch.cuda.memory_allocated() / _MIB
    weights = _weights_mib(base, adapters=False) + _weights_mib(base, adapters=True)
    return Holding(max(0.0, reserved - weights), idle_mib=max(0.0, reserved - allocated))
