"""LoRA weights in memory, and their PEFT folder on disk. Only safetensors are read or written."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agentlab.adapters import peft_config
from agentlab.adapters.folders import new_folder
from agentlab.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>\w+(?:[.-]\w+)*)\.lora_(?P<factor>[AB])\.weight")


@dataclass(eq=False)
class Lora:
    """A plain LoRA: on each module W becomes W + B·A·alpha/rank.

    `modules` maps a module's full name to its factors A (rank, in) and B (out, rank), float32 on the CPU.
    `target_modules` are the name endings it was declared with; `base_model` is a name or folder, "" if unknown.
    """

    modules: dict[str, tuple["Tensor", "Tensor"]]
    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]
    base_model: str

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def delta(lora: Lora, module: str) -> "Tensor":
    """B·A·alpha/rank of `module`: (out, in), float32. Raises AdapterError for a module that the adapter lacks."""
    if module not in lora.modules:
        raise AdapterError(f"the adapter changes no module {module}; it has: {', '.join(sorted(lora.modules)[:5])}, …")
    a, b = lora.modules[module]
    return (b @ a) * lora.scaling


def load(folder: Path) -> Lora:
    """The adapter in a PEFT folder.

    Raises AdapterError, one sentence, for anything that is missing, damaged or not a plain LoRA: the project merges
    adapters by their factors, and rsLoRA, DoRA, biases or saved modules would make that silently wrong.
    """
    folder = Path(folder)
    shape = peft_config.read(folder)
    modules = _pairs(_tensors(folder), folder / WEIGHTS_FILE, shape.rank)
    targets = shape.target_modules
    if targets is None:
        targets = sorted(modules)
    else:
        endings = tuple(f".{target}" for target in targets)
        for module in modules:
            if not f".{module}".endswith(endings):
                raise AdapterError(
                    f"{folder / WEIGHTS_FILE} changes {module}, which target_modules ({', '.join(targets)}) does "
                    "not name; restore the adapter from a copy"
                )
    return Lora(modules, shape.rank, shape.alpha, shape.dropout, targets, shape.base_model)


def save(lora: Lora, folder: Path) -> None:
    """Write `lora` as a PEFT folder, atomically, replacing one that is there; the same adapter gives the same bytes.

    Raises AdapterError for weights that `load` would refuse, StorageError where the disk does not take them.
    """
    import torch
    from safetensors.torch import save as to_bytes

    folder = Path(folder)
    tensors = {}
    for module, factors in sorted(lora.modules.items()):
        for factor, value in zip("AB", factors, strict=True):
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = (
                value.detach().to("cpu", torch.float32).contiguous().clone()
            )
    _pairs(tensors, folder / WEIGHTS_FILE, lora.rank)
    shape = peft_config.LoraShape(lora.rank, float(lora.alpha), lora.dropout, lora.target_modules, lora.base_model)
    with new_folder(folder, replace=True) as draft:
        (draft / WEIGHTS_FILE).write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
        peft_config.write(draft, shape)


def _tensors(folder: Path) -> dict[str, "Tensor"]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load as load_bytes

    path = folder / WEIGHTS_FILE
    try:
        # Read into memory, not mapped: a file that is culled or cut while it is mapped kills the process.
        tensors = load_bytes(path.read_bytes())
    except FileNotFoundError:
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{folder} holds adapter_model.bin, a pickle that can run code and is never loaded; "
                "ask its maker for safetensors"
            ) from None
        raise AdapterError(f"no weights at {folder}: {WEIGHTS_FILE} is missing") from None
    except (OSError, SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise AdapterError(f"{path} is damaged ({error}); restore the adapter from a copy or train it again") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise AdapterError(f"{path}: {name} is {tensor.dtype}; allowed: float32, float16, bfloat16")
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


def _pairs(tensors: dict[str, "Tensor"], path: Path, rank: int) -> dict[str, tuple["Tensor", "Tensor"]]:
    import torch

    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        match = _KEY.fullmatch(name)
        if match is None:
            raise AdapterError(f"{path} holds {name[:120]}, which is no factor of a plain LoRA on a linear layer")
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{path}: {name} holds NaN or infinity; train the adapter again with a lower learning rate"
            )
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    if not found:
        raise AdapterError(f"{path} holds no LoRA factors")
    modules = {}
    for module, factors in found.items():
        if len(factors) != 2:
            raise AdapterError(
                f"{path}: of {module} only lora_{min(factors)} is there; restore the adapter from a copy"
            )
        a, b = factors["A"], factors["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank or 0 in (a.shape[1], b.shape[0]):
            raise AdapterError(
                f"{path}: the factors of {module} are {tuple(a.shape)} and {tuple(b.shape)}; "
                f"allowed for rank {rank}: ({rank}, in) and (out, {rank})"
            )
        modules[module] = (a, b)
    return modules
