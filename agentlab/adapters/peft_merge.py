"""PEFT's own merging methods, run on adapters alone: no base model is needed.

What PEFT 0.21 gives is passed on as it is, and differs from the weighted sum of the deltas (tests prove each):
- `linear`, `dare_linear` average the factors: A = Σ √(w_i·s_i)·A_i and B likewise, so cross terms of unrelated parents
  appear and two identical parents at 0.5/0.5 give twice the parent (dare: in expectation).
- `ties`, `dare_ties` divide by the number of agreeing parents: two identical ones at 0.5/0.5, density 1, give half.
- `svd` is the weighted sum, truncated through a dense (out, in) SVD: seconds a module; `exact` gives the same in ms.
- The `*_svd` methods do their trimming on dense deltas instead of factors; `ties_svd` halves identical parents too.
- With one parent PEFT runs `linear` whatever was asked.
"""

from typing import TYPE_CHECKING, Any

from agentlab.adapters.lora import Lora
from agentlab.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor


def merge_with_peft(
    parents: list[Lora], weights: list[float], rank: int, method: str, *, density: float, seed: int
) -> dict[str, tuple["Tensor", "Tensor"]]:
    """Factors by module, for scaling 1, of `add_weighted_adapter` over `parents`.

    All parents have rank `rank`, unless `method` ends in svd.
    """
    import torch
    from torch.nn.functional import pad

    names = [f"parent{index}" for index in range(len(parents))]
    with torch.random.fork_rng(devices=[]):  # DARE draws from the global generator, and so does LoRA's first filling
        model = carrier(parents, names)
        torch.manual_seed(seed)
        add_weighted(model, names, weights, "merged", method, density=density, rank=rank)
    merged = {}
    for name in sorted({name for parent in parents for name in parent.modules}):
        layer = model.get_submodule(f"base_model.model.{name}")
        a, b = layer.lora_A["merged"].weight.detach(), layer.lora_B["merged"].weight.detach()
        missing = rank - a.shape[0]  # an SVD has no more than min(out, in) rows, whatever rank was asked
        merged[name] = (pad(a, (0, 0, 0, missing)), pad(b, (0, missing)))
    return merged


def add_weighted(
    model: Any, names: list[str], weights: list[float], new_name: str, method: str, *, density: float, rank: int
) -> None:
    """`add_weighted_adapter` without its silence: a name in use would return without merging anything."""
    if new_name in model.peft_config:
        raise AdapterError(f"adapter name {new_name} is in use; choose another one")
    ranks = {model.peft_config[name].r for name in names}
    if len(ranks) > 1 and not method.endswith("svd"):
        raise AdapterError(
            f"merging by {method} needs parents of one rank, these have {sorted(ranks)}; allowed: exact, svd"
        )
    kwargs: dict[str, Any] = {}
    if method != "linear":
        kwargs = {"svd_rank": rank, "svd_full_matrices": False, "density": density}
    model.add_weighted_adapter(names, weights, new_name, combination_type=method, **kwargs)


def carrier(parents: list[Lora], names: list[str]) -> Any:
    """A PeftModel of bare linear layers with the parents' module names and shapes, and the parents as its adapters."""
    import torch
    from peft import LoraConfig, get_peft_model

    root = torch.nn.Module()
    for parent in parents:
        for module, (a, b) in parent.modules.items():
            _place(root, module, b.shape[0], a.shape[1])
    model: Any = None
    for name, parent in zip(names, parents, strict=True):
        # A float alpha stays one: rounding it, as the annotation asks, would change the scaling.
        config = LoraConfig(r=parent.rank, lora_alpha=parent.alpha, target_modules=sorted(parent.modules))  # type: ignore[arg-type]
        if model is None:
            model = get_peft_model(root, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for module, (a, b) in parent.modules.items():
            layer = model.get_submodule(f"base_model.model.{module}")
            layer.lora_A[name].weight.data = a.detach().clone()
            layer.lora_B[name].weight.data = b.detach().clone()
    return model


def _place(root: Any, name: str, out_features: int, in_features: int) -> None:
    import torch

    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    if not hasattr(root, last):
        layer = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
        # One zero seen (out, in) times: PEFT wants a weight on a real device, and this one takes no memory.
        layer.weight = torch.nn.Parameter(torch.zeros(1, 1).expand(out_features, in_features), requires_grad=False)
        root.add_module(last, layer)
