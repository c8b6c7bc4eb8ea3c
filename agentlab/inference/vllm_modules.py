"""The linear modules of a model by its files alone: which adapters vLLM can take for it, known before it sees one."""

from agentlab.adapters import Lora
from agentlab.errors import AdapterError
from agentlab.inference.vllm_settings import tensor_shapes
from agentlab.models import ModelFiles


class Modules:
    """What adapters of one model may change on vLLM. targets: the last parts of its linear modules' names, no head.

    is_quantized: in its files, so that the shapes there are not the modules' own.
    """

    def __init__(self, model: ModelFiles, is_quantized: bool) -> None:
        """Raises ModelError."""
        self._name = model.name
        self._is_quantized = is_quantized
        self._shapes = tensor_shapes(model.folder)
        linear = [n.removesuffix(".weight") for n, s in self._shapes.items() if n.endswith(".weight") and len(s) == 2]
        linear += [name.removesuffix(".qweight") for name in self._shapes if name.endswith(".qweight")]
        self.targets = {n.rpartition(".")[2] for n in linear if "embed" not in n and "lm_head" not in n}

    def check(self, adapter: str, lora: Lora, largest_rank: int) -> None:
        """Raise AdapterError for one that is too large, or that does not fit the model."""
        if lora.rank > largest_rank:
            raise AdapterError(
                f"adapter {adapter} has rank {lora.rank}; allowed: up to {largest_rank}, for which this engine was "
                "opened"
            )
        for module, (a, b) in sorted(lora.modules.items()):
            shape = self._shapes.get(f"{module}.weight")
            packed = any(key.startswith(f"{module}.") for key in self._shapes)
            if module.rpartition(".")[2] not in self.targets and (shape is not None or packed):
                raise AdapterError(
                    f"adapter {adapter} changes {module}; allowed on this engine: {', '.join(sorted(self.targets))}"
                )
            if shape is None and not packed:
                raise AdapterError(f"adapter {adapter} does not fit {self._name}: no module {module}")
            needed = (b.shape[0], a.shape[1])
            if shape is not None and len(shape) == 2 and tuple(shape) != needed and not self._is_quantized:
                raise AdapterError(
                    f"adapter {adapter} does not fit {self._name}: {module} has shape {needed}, the model needs {shape}"
                )

    def without_effect(self) -> Lora | None:
        """An adapter of zeros; None for a model without a module that one could change."""
        import torch

        for name, shape in sorted(self._shapes.items()):
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in self.targets and len(shape) == 2:
                factors = torch.zeros(1, shape[1]), torch.zeros(shape[0], 1)
                return Lora({module: factors}, 1, 1.0, 0.0, [module.rpartition(".")[2]], "")
        return None
