"""The linear modules of a model by its files alone: which adapters vLLM can take for it, known before it sees one."""

from agentlab.adapters import Lora
from agentlab.errors import AdapterError
from agentlab.hardware.shape import ModelShape
from agentlab.inference.vllm_settings import tensor_shapes
from agentlab.models import ModelFiles

_PACKED = (".qweight", ".weight_packed")  # the weights of a linear module that is quantized in its files


class Modules:
    """What adapters of one model may change on vLLM. targets: the last parts of its linear modules' names, no head."""

    def __init__(self, model: ModelFiles, shape: ModelShape) -> None:
        """shape: tells the sizes of modules whose weights are packed. Raises ModelError."""
        self._name = model.name
        shapes = tensor_shapes(model.folder)
        self._all = {tensor.rpartition(".")[0] for tensor in shapes}
        # (out, in) features of every linear module; None where nobody knows them
        self._linear: dict[str, tuple[int, ...] | None] = {}
        for tensor, size in shapes.items():
            module = tensor.rpartition(".")[0]
            if tensor.endswith(".weight") and len(size) == 2:
                self._linear[module] = size
            elif tensor.endswith(_PACKED):
                features = shape.linears.get(_kind(module)) if shape.exact else None
                self._linear[module] = features and features[::-1]
        self.targets = {_kind(module) for module in self._linear if "embed" not in module and "lm_head" not in module}

    def check(self, adapter: str, lora: Lora, largest_rank: int) -> None:
        """Raise AdapterError for one that is too large, or that does not fit the model."""
        if lora.rank > largest_rank:
            raise AdapterError(
                f"adapter {adapter} has rank {lora.rank}; allowed: up to {largest_rank}, for which this engine was "
                "opened"
            )
        for module, (a, b) in sorted(lora.modules.items()):
            if module not in self._all:
                raise AdapterError(f"adapter {adapter} does not fit {self._name}: no module {module}")
            if _kind(module) not in self.targets:
                raise AdapterError(
                    f"adapter {adapter} changes {module}; allowed on this engine: {', '.join(sorted(self.targets))}"
                )
            found, needed = (b.shape[0], a.shape[1]), self._linear.get(module)
            if needed is not None and needed != found:
                raise AdapterError(
                    f"adapter {adapter} does not fit {self._name}: {module} has shape {found}, the model needs {needed}"
                )

    def without_effect(self) -> Lora | None:
        """An adapter of zeros; None for a model without a module that one could change."""
        import torch

        for module, size in sorted(self._linear.items()):
            if size is not None and _kind(module) in self.targets:
                factors = torch.zeros(1, size[1]), torch.zeros(size[0], 1)
                return Lora({module: factors}, 1, 1.0, 0.0, [_kind(module)], "")
        return None


def _kind(module: str) -> str:
    return module.rpartition(".")[2]
