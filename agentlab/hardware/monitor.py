"""What the machine has and uses right now: GPU memory, RAM and swap in MB (2**20 bytes), and each GPU's state."""

import contextlib
import functools
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_MB = 2**20


@dataclass(frozen=True)
class MemoryStats:
    """Memory of all GPUs together and of the machine, in MB. Without a GPU its three values are 0."""

    gpu_total: float
    gpu_used: float
    gpu_free: float
    cpu_total: float
    cpu_used: float
    cpu_free: float  # what a program can still get, caches that the kernel would give up included
    swap_used: float
    timestamp: float  # seconds since the epoch


@dataclass(frozen=True)
class Gpu:
    """One GPU. A value is None where the driver does not report it, as power and temperature under WSL2."""

    name: str
    memory_total_mb: float | None = None
    memory_used_mb: float | None = None
    memory_free_mb: float | None = None
    utilisation_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    compute_capability: tuple[int, int] | None = None  # (major, minor)


def memory_stats() -> MemoryStats:
    """The memory now. Never raises; what cannot be read counts as 0."""
    import psutil

    total = used = free = 0.0
    for device in gpus():
        total += device.memory_total_mb or 0.0
        used += device.memory_used_mb or 0.0
        free += device.memory_free_mb or 0.0
    cpu_total = cpu_free = swap_used = 0.0
    with contextlib.suppress(Exception):  # a container may hide parts of /proc
        ram = psutil.virtual_memory()
        cpu_total, cpu_free = ram.total / _MB, ram.available / _MB
    with contextlib.suppress(Exception):
        swap_used = psutil.swap_memory().used / _MB
    return MemoryStats(
        gpu_total=total,
        gpu_used=used,
        gpu_free=free,
        cpu_total=cpu_total,
        cpu_used=cpu_total - cpu_free,
        cpu_free=cpu_free,
        swap_used=swap_used,
        timestamp=time.time(),
    )


def process_ram_mb() -> float:
    """Resident memory of this process, in MB."""
    import psutil

    return psutil.Process().memory_info().rss / _MB


def family_ram_mb() -> float:
    """Resident memory of this process and of those that it started, in MB.

    Of the others without what they share: their libraries and files are this process's too, as a rule, and would count
    once for each. Pages of a fork that neither has written to since count twice.
    """
    import psutil

    own = psutil.Process()
    total = own.memory_info().rss
    for child in own.children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):  # it may be ending just now
            memory = child.memory_info()
            total += memory.rss - getattr(memory, "shared", 0)  # which Linux alone tells
    return total / _MB


def gpus(nvml: Any = None) -> list[Gpu]:
    """The GPUs that the NVIDIA driver knows; an empty list without a driver. Never raises.

    Where CUDA_VISIBLE_DEVICES names some, by number, by UUID or by a MIG instance's, those alone and in that order: the
    first is the one that torch uses. One that is to hide all (empty, -1) leaves them here, to be shown; see
    `accelerator`. nvml: the library to ask instead of pynvml.
    """
    nvml = nvml or _nvml()
    return [] if nvml is None else list(_read(nvml))


def has_ram(size_bytes: float) -> bool:
    """Whether so much RAM is free; also where nobody can say what is."""
    free = memory_stats().cpu_free * _MB
    return not free or size_bytes <= free


def free_gib(nvml: Any = None) -> float:
    """Memory of the GPU that torch runs on that nobody has, in GiB; infinite where the driver does not say."""
    card = gpus(nvml)[:1]
    free_mb = card[0].memory_free_mb if card else None
    return float("inf") if free_mb is None else free_mb / 1024


def torch_total_gib() -> float:
    """All memory of the GPU that torch runs on, in GiB, of which torch's limit is a share. Makes no context on it."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory) / 2**30


def driver_version(nvml: Any = None) -> str | None:
    """The NVIDIA driver's version; None without a driver."""
    nvml = nvml or _nvml()
    version = None if nvml is None else _value(nvml.nvmlSystemGetDriverVersion)
    return version.decode(errors="replace") if isinstance(version, bytes) else version


def driver_cuda(nvml: Any = None) -> tuple[int, int] | None:
    """The newest CUDA, (major, minor), that the driver runs; None without a driver that says so."""
    nvml = nvml or _nvml()
    number = None if nvml is None else _value(nvml.nvmlSystemGetCudaDriverVersion_v2)
    return None if number is None else (number // 1000, number % 1000 // 10)


@functools.cache
def torch_cuda() -> tuple[int, int] | None:
    """The CUDA, (major, minor), that the installed torch is built for, read from its files; None: built for the CPU."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        with contextlib.suppress(OSError):
            text = (Path(folder) / "version.py").read_text(encoding="utf-8")
            if found := re.search(r"^cuda\b[^=\n]*= *'(\d+)\.(\d+)", text, re.MULTILINE):
                return int(found[1]), int(found[2])
    return None


def driver_is_too_old() -> bool:
    """Whether torch is built for a CUDA that the driver cannot run: it then computes on the CPU, GPU or not."""
    return runs_cuda(driver_cuda(), torch_cuda()) is False


def runs_cuda(driver: tuple[int, int] | None, built: tuple[int, int] | None) -> bool | None:
    """Whether a driver runs what is built for a CUDA: every one of its own major version; None where nobody knows."""
    return None if driver is None or built is None else driver[0] >= built[0]


def process_vram_mb(index: int, nvml: Any = None) -> float | None:
    """Memory of this process and those that it started on a GPU, in MB; None where the driver does not report it, as
    under WSL2.

    0 only where others are listed, with their sizes and under ids that are known here: an empty list is also what a
    driver shows that reports none, and in a container this process may be listed under its id outside.
    """
    nvml = nvml or _nvml()
    handles = [] if nvml is None else _handles(nvml)
    if index >= len(handles):
        return None
    handle = handles[index]
    running = _value(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    mine = _own_pids() if running else set()
    sizes = [one.usedGpuMemory for one in running if one.pid in mine and one.usedGpuMemory is not None]
    if not sizes and not (running and all(one.usedGpuMemory is not None and _is_here(one.pid) for one in running)):
        return None
    return float(sum(sizes)) / _MB


def _is_here(pid: int) -> bool:
    """Whether a process of this id can be seen from here."""
    import psutil

    return bool(psutil.pid_exists(pid))


def _own_pids() -> set[int]:
    """This process and all that it started, as an engine in a process of its own."""
    import psutil

    pids = {os.getpid()}
    with contextlib.suppress(psutil.Error, OSError):
        pids |= {child.pid for child in psutil.Process().children(recursive=True)}
    return pids


def accelerator() -> Literal["cuda", "cpu"]:
    """Where torch will run: what it says itself where it is imported; to import it for that would take seconds.

    Else on a GPU that the driver shows, with a torch built for one that the driver can run.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        with contextlib.suppress(Exception):  # another thread may be importing it just now
            return "cuda" if torch.cuda.is_available() else "cpu"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    usable = torch_cuda() is not None and not driver_is_too_old()
    return "cuda" if usable and not hidden and gpus() else "cpu"


def _read(nvml: Any) -> Iterator[Gpu]:
    for index, handle in enumerate(_handles(nvml)):
        name = _value(nvml.nvmlDeviceGetName, handle) or f"GPU {index}"
        memory = _value(nvml.nvmlDeviceGetMemoryInfo, handle)
        load = _value(nvml.nvmlDeviceGetUtilizationRates, handle)
        celsius = _value(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        milliwatts = _value(nvml.nvmlDeviceGetPowerUsage, handle)
        capability = _value(nvml.nvmlDeviceGetCudaComputeCapability, handle)
        yield Gpu(
            name=name.decode(errors="replace") if isinstance(name, bytes) else str(name),
            memory_total_mb=None if memory is None else memory.total / _MB,
            memory_used_mb=None if memory is None else memory.used / _MB,
            memory_free_mb=None if memory is None else memory.free / _MB,
            utilisation_percent=None if load is None else float(load.gpu),
            temperature_c=None if celsius is None else float(celsius),
            power_w=None if milliwatts is None else milliwatts / 1000,
            compute_capability=None if capability is None else (int(capability[0]), int(capability[1])),
        )


def _handles(nvml: Any) -> list[Any]:
    """NVML's handles of the GPUs that CUDA_VISIBLE_DEVICES lets programs see.

    Its numbers are taken as NVML's, which count along the bus; CUDA counts so with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    count = _value(nvml.nvmlDeviceGetCount) or 0
    found = [_value(nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count)]
    words = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if words[0] in ("", "-1"):
        return [handle for handle in found if handle is not None]
    seen = []
    for word in words:
        if word.isdecimal():
            named = found[int(word) : int(word) + 1]
        elif word.startswith("MIG-"):  # a part of a card, which NVML does not count as a device
            named = [_value(nvml.nvmlDeviceGetHandleByUUID, word)]
        else:  # the beginning of an UUID suffices
            named = [handle for handle in found if handle is not None and _uuid(nvml, handle).startswith(word)]
        if len(named) != 1 or named[0] is None:  # CUDA hides the first that is none, and all after it
            break
        seen.append(named[0])
    return seen


def _uuid(nvml: Any, handle: Any) -> str:
    uuid = _value(nvml.nvmlDeviceGetUUID, handle)
    return uuid.decode(errors="replace") if isinstance(uuid, bytes) else str(uuid)


def _value(function: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers; None where it does not."""
    try:
        return function(*arguments)
    except Exception:
        return None


@functools.cache
def _nvml() -> Any:
    """The initialised library, or None. Asked once per process: a missing driver costs a search of the disk."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml
