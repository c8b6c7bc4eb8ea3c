"""What torch's operations ask an allocator for, counted on a CPU while a GPU's memory is meant.

Not a benchmark by itself: `vram.py --traced` runs the phases under it, and the tests do. Ends, as a script, in one JSON
line that says what its own check counted.
"""

import argparse
import contextlib
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_BLOCK = 512  # bytes: what CUDA's caching allocator rounds a request up to


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations have made since it was begun, `now` and at their `peak`.

    What was there before does not count, nor what a single operation takes and gives back inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, int] = {}
        self._before: set[int] = set()
        self._paused = False
        self.begin()

    def begin(self) -> None:
        """What is there now does not count."""
        everything = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
        self._before = {tensor.untyped_storage()._cdata for tensor in everything if tensor.layout == torch.strided}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self._paused:
            for tensor in pytree.tree_leaves(found):
                if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                    self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._held or place in self._before:
            return
        self._held[place] = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.now += self._held[place]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, place)

    def _drop(self, place: int) -> None:
        self.now -= self._held.pop(place, 0)

    def uncounted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as one kernel of a GPU does it, which takes nothing."""

        def quiet(*args: Any, **kwargs: Any) -> Any:
            self._paused = True
            try:
                return function(*args, **kwargs)
            finally:
                self._paused = False

        return quiet


@contextlib.contextmanager
def as_on_a_gpu(counted: Allocations, training: bool) -> Iterator[None]:
    """Have engine and trainer do on a CPU what they do on a GPU: 16 bits, autocast, checkpointing, TRL's own loss.

    training: autocast is on, which PEFT asks for without a device, and that means a GPU.
    The loss's Triton kernels are the same in torch here; what those take beside a tile of logits is not counted.
    """
    import trl.kernels.chunked_logprob as kernels
    import trl.trainer.utils

    from agentlab.inference import attention, loading
    from agentlab.learning import sft, trainer

    config, autocast = sft.SFTConfig, torch.is_autocast_enabled
    gpus = {"bf16": True, "fp16": False, "gradient_checkpointing": True}
    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (loading, "element_type", lambda rung, device: torch.bfloat16),
            (attention, "register", lambda: "sdpa"),
            (sft, "SFTConfig", lambda **values: config(**(values | gpus))),
            (trainer, "_is_plain", lambda base, inputs: False),
            (torch, "is_autocast_enabled", lambda *device: autocast(*device) if device else training),
            (trl.trainer.utils, "_use_triton", lambda device: True),  # only tokens that count are projected
            *((kernels, name, counted.uncounted(getattr(kernels, name))) for name in _KERNELS),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield


_KERNELS = ("_forward_tile", "_backward_tile", "_addmm_fp32")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with Allocations() as counted:
        first = torch.zeros(1000, dtype=torch.float32)
        second = first + 1
        del first
        third = second.view(10, 100).sum(dim=1)
    print(json.dumps({"benchmark": "allocations", "peak_bytes": counted.peak, "now_bytes": counted.now, "expected": [
        2 * 4096, 4096 + -(-third.nbytes // _BLOCK) * _BLOCK,
    ]}))  # fmt: skip


if __name__ == "__main__":
    main()
