"""Where a training stood at its last step, so that a continuation goes on as if it had never ended.

A trained adapter is a mean of weights, and Adam's moments are gone: whoever begins at it alone goes back to the middle
of that mean and has to warm up again. Kept in safetensors, beside the adapters and not in their PEFT folders.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from transformers import TrainerCallback

from agentlab import files
from agentlab.errors import AdapterError

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingState:
    """Of each trained parameter, by its name in the model: the weights and Adam's two moments, fp32 on the CPU."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]]
    steps: int  # of Adam, over all trainings of the line
    learning_rate: float  # of its last steps; a remedy may have lowered the genome's

    def save(self, path: Path) -> None:
        """Write it atomically. Raises StorageError where the disk does not take it."""
        tensors = {f"weight {name}": value for name, value in self.weights.items()}
        for name, moments in self.moments.items():
            tensors |= {f"{kind} {name}": value for kind, value in zip(_MOMENTS, moments, strict=True)}
        tensors |= {"steps": torch.tensor(self.steps), "rate": torch.tensor(self.learning_rate, dtype=torch.float64)}
        files.write_bytes(path, safetensors.torch.save(tensors | {"sha256": _sha256(tensors)}))

    @classmethod
    def load(cls, path: Path) -> "TrainingState":
        """Raises AdapterError for a file that is damaged or not one of these, OSError where it cannot be read."""
        try:
            tensors = safetensors.torch.load(path.read_bytes())  # not mapped: a file cut meanwhile kills the process
            if not torch.equal(tensors.pop("sha256"), _sha256(tensors)):
                raise ValueError("sha256 differs")
            steps, rate = int(tensors.pop("steps")), float(tensors.pop("rate"))
            names = [key.removeprefix("weight ") for key in tensors if key.startswith("weight ")]
            weights = {name: tensors.pop(f"weight {name}") for name in names}
            moments = {name: (tensors.pop(f"exp_avg {name}"), tensors.pop(f"exp_avg_sq {name}")) for name in names}
        except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise AdapterError(f"{path} is damaged ({error})") from error
        return cls(weights, moments, steps, rate)

    def fits(self, model: torch.nn.Module) -> bool:
        """Whether the model's trainable parameters are these, by name and shape."""
        shapes = {name: parameter.shape for name, parameter in trained(model)}
        return shapes == {name: value.shape for name, value in self.weights.items()}


class CarryOn(TrainerCallback):  # type: ignore[misc]
    """Begins a training where another one ended, if there is one, and notes where this one ends."""

    def __init__(self, begin: TrainingState | None, learning_rate: float, keep: bool = True) -> None:
        """keep: whether anybody asks for the end, which costs RAM."""
        self.begin = begin
        self._rate = learning_rate
        self._keep = keep
        self.end: TrainingState | None = None  # None also after an optimiser that is not Adam

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if self.begin is None:
            return
        with torch.no_grad():
            for name, parameter in trained(model):
                parameter.copy_(self.begin.weights[name])
        known = optimizer.state_dict()
        for index, name in enumerate(_names(model, optimizer)):
            # copies: on a CPU the optimiser takes the tensors themselves, and another attempt may begin here, too
            moments = {kind: value.clone() for kind, value in zip(_MOMENTS, self.begin.moments[name], strict=True)}
            known["state"][index] = {"step": torch.tensor(float(self.begin.steps)), **moments}
        optimizer.load_state_dict(known)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if not self._keep or state.global_step < state.max_steps:
            return
        found = optimizer.state_dict()["state"]
        names = _names(model, optimizer)
        if any(kind not in found.get(index, {}) for index in range(len(names)) for kind in _MOMENTS):
            return
        self.end = TrainingState(
            weights={name: copied(parameter) for name, parameter in trained(model)},
            moments={name: tuple(copied(found[i][kind]) for kind in _MOMENTS) for i, name in enumerate(names)},  # type: ignore[misc]
            steps=int(found[0]["step"]),
            learning_rate=self._rate,
        )


def _sha256(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of names and contents, as 32 bytes: a flipped bit of a weight is a number like any other."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that are trained, by name, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _names(model: torch.nn.Module, optimizer: Any) -> list[str]:
    """The parameters' names in the order in which the optimiser's state counts them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in fp32 and RAM, that no later step changes."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
