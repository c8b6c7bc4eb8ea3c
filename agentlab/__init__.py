"""agentlab: a workbench where a small local language model becomes a better agent, one generation at a time."""

import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentlab.lab import Lab
    from agentlab.memory import Memory

__all__ = ["Lab", "Memory"]
__version__ = "0.1.0"

# CUDA counts the fastest GPU first unless it is told to count along the bus, as the driver does for the monitor
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
# bitsandbytes warns at import about an optional CPU kernel that it would download
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import `Lab` and `Memory` when they are asked for, so that `import agentlab` stays cheap."""
    if name == "Lab":
        from agentlab.lab import Lab

        return Lab
    if name == "Memory":
        from agentlab.memory import Memory

        return Memory
    raise AttributeError(f"module 'agentlab' has no attribute {name!r}")
