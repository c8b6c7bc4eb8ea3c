"""Peak memory of this process over a stretch of work, in MiB."""

import contextlib
import gc
import resource
from pathlib import Path
from typing import Any


class PeakMeter:
    """Call `reset()`, work, then read the peaks. Without a GPU `vram_peak_mib()` is 0."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new stretch. Linux resets the process's high-water mark; elsewhere it covers the whole process."""
        gc.collect()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        cuda = _cuda()
        if cuda is not None:
            cuda.reset_peak_memory_stats()

    def ram_peak_mib(self) -> float:
        """Peak resident memory."""
        return ram_peak_mib() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def vram_peak_mib(self) -> float:
        """Peak of the allocator's reserved memory, what the card has to provide beside the driver's context."""
        cuda = _cuda()
        return 0.0 if cuda is None else float(cuda.max_memory_reserved()) / 2**20


def ram_peak_mib(process: int | str = "self") -> float:
    """Peak resident memory of a process as Linux keeps it; 0 where nobody knows."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _cuda() -> Any:
    import torch

    return torch.cuda if torch.cuda.is_available() else None
