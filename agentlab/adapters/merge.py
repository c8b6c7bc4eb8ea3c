"""Merging adapters: exactly, in the delta itself, or by PEFT's methods; and the noise of mutation.

Notation: adapter i changes a weight by delta_i = B_i·A_i·alpha_i/rank_i, with A_i (rank_i, in) and B_i (out, rank_i).
"""

import hashlib
import math
from typing import TYPE_CHECKING

from agentlab.adapters.lora import Lora
from agentlab.adapters.peft_config import MAX_RANK
from agentlab.config import MergeMethod
from agentlab.errors import AdapterError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    Factors = tuple[Tensor, Tensor]

# Singular values below these are rounding, not content: relative to the factors' norms and to the largest one.
_ROUNDING = 1e-13
_NEGLIGIBLE = 1e-9
_FRESH_ROW = 3**-0.5  # root mean square length of a fresh A's rows: in entries, uniform within ±1/√in


def crossover(
    parents: list[Lora],
    weights: list[float],
    rank: int,
    alpha: float | None = None,
    method: MergeMethod = "exact",
    *,
    density: float = 0.5,
    seed: int = 0,
) -> Lora:
    """The adapter of `rank` that stands for Σ weight_i · parent_i.

    `exact`: its delta is the best rank-`rank` approximation of Σ w_i·delta_i, for parents of any ranks, alphas and
    target modules (a module that a parent lacks counts as zero). The other methods are PEFT's, with PEFT's numbers
    (`agentlab.adapters.peft_merge` says where these differ from the weighted sum); `density` is the share of values
    that TIES and DARE keep. `alpha` None keeps the first parent's alpha/rank. `seed` decides DARE's draws and the
    fresh A rows of unused rank.

    Raises AdapterError if the parents do not belong together or a number is out of its range.
    """
    _check(parents, weights, rank, alpha, density)
    alpha = float(alpha) if alpha is not None else parents[0].scaling * rank
    if method == "exact":
        merged = {name: _exact(parents, weights, rank, name) for name in _module_names(parents)}
    else:
        from agentlab.adapters.peft_merge import merge_with_peft

        if len(parents) == 1 or not method.endswith("svd"):  # these combine factors, row by row, and need equal ranks
            parents = [_at_rank(parent, rank) for parent in parents]
        merged = merge_with_peft(parents, weights, rank, method, density=density, seed=seed)
    modules = {}
    for name, (a, b) in merged.items():  # the factors are for scaling 1
        modules[name] = _revived(_float32(a, name), _float32(b * (rank / alpha), name), seed, name)
    return Lora(
        modules,
        rank,
        alpha,
        parents[0].dropout,
        sorted({target for parent in parents for target in parent.target_modules}),
        parents[0].base_model,
    )


def resize_rank(lora: Lora, rank: int, alpha: float | None = None, seed: int = 0) -> Lora:
    """`lora` at another rank: the same delta where it fits, else its best approximation. `alpha` as in crossover."""
    return crossover([lora], [1.0], rank, alpha, seed=seed)


def add_noise(lora: Lora, relative: float, seed: int) -> Lora:
    """`lora` with Gaussian noise on A and B, of `relative` times each matrix's own root mean square.

    A pure function of its arguments. A matrix of zeros gets none, so an untouched module stays untouched.
    """
    import torch

    if not (math.isfinite(relative) and relative >= 0):
        raise AdapterError(f"noise: {relative}; allowed: a finite number from 0")
    modules = {}
    for name, factors in lora.modules.items():
        noisy = []
        for factor, value in zip("AB", factors, strict=True):
            drawn = torch.randn(value.shape, generator=_generator(seed, name, factor))
            noisy.append(value + drawn * (relative * value.square().mean().sqrt()))
        modules[name] = (noisy[0], noisy[1])
    return Lora(modules, lora.rank, lora.alpha, lora.dropout, list(lora.target_modules), lora.base_model)


def _check(parents: list[Lora], weights: list[float], rank: int, alpha: float | None, density: float) -> None:
    if not parents or len(parents) != len(weights):
        raise AdapterError(f"{len(parents)} parents and {len(weights)} weights; allowed: one weight for each parent")
    if not all(math.isfinite(weight) for weight in weights):
        raise AdapterError(f"merge weights: {weights}; allowed: finite numbers")
    if not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"rank: {rank}; allowed: 1 to {MAX_RANK}")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise AdapterError(f"alpha: {alpha}; allowed: a number above 0")
    if not 0 < density <= 1:
        raise AdapterError(f"density: {density}; allowed: above 0, at most 1")
    shapes: dict[str, tuple[int, int]] = {}
    for parent in parents:
        for name, (a, b) in parent.modules.items():
            shape = (b.shape[0], a.shape[1])
            if shapes.setdefault(name, shape) != shape:
                raise AdapterError(
                    f"the parents belong to different base models: {name} is {shapes[name]} in one, {shape} in another"
                )


def _module_names(parents: list[Lora]) -> list[str]:
    return sorted({name for parent in parents for name in parent.modules})


def _exact(parents: list[Lora], weights: list[float], rank: int, name: str) -> "Factors":
    import torch

    stacked_a, stacked_b = [], []
    for parent, weight in zip(parents, weights, strict=True):
        if name in parent.modules:
            a, b = parent.modules[name]
            stacked_a.append(a.to(torch.float64))
            stacked_b.append(b.to(torch.float64) * (weight * parent.scaling))
    return _truncated(torch.cat(stacked_a), torch.cat(stacked_b, dim=1), rank)


def _truncated(a: "Tensor", b: "Tensor", rank: int) -> "Factors":
    """The best approximation of b·a, a (R, in), b (out, R), as factors (rank, in), (out, rank).

    A's rows are orthogonal and as long as those of a fresh LoRA, and B holds the singular values, so that training goes
    on as from a fresh LoRA: balanced factors (√s in each) start most directions with a short A and learn slower there.

    With b = Q_b·R_b and aᵀ = Q_a·R_a, the singular values of b·a are those of the small R_b·R_aᵀ (Eckart-Young on an
    orthogonal change of basis), so nothing of size (out, in) is ever made. Unused rank is zero in both factors.
    """
    import torch

    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    floor = max(_ROUNDING * float(r_b.norm() * r_a.norm()), _NEGLIGIBLE * float(s[0]))
    used = min(rank, int((s > floor).sum()))
    left, right = q_b @ u[:, :used], vh[:used] @ q_a.T
    if used:  # singular vectors come with a free sign: the largest entry of each left one is made positive
        largest = left.abs().argmax(dim=0)
        sign = torch.sign(left[largest, torch.arange(used)])
        left, right = left * sign, right * sign[:, None]
    new_a, new_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    new_a[:used] = _FRESH_ROW * right
    new_b[:, :used] = left * (s[:used] / _FRESH_ROW)
    return new_a, new_b


def _at_rank(lora: Lora, rank: int) -> Lora:
    """`lora` at `rank` with unused rank zero in both factors; untouched, factors and all, where the rank is the same.

    PEFT's methods that factors would leak random rows for unused rank into the result.
    """
    import torch

    if lora.rank == rank:
        return lora
    modules = {}
    for name in lora.modules:
        a, b = _exact([lora], [1.0], rank, name)
        modules[name] = (a.to(torch.float32), b.to(torch.float32))
    return Lora(modules, rank, float(rank), lora.dropout, lora.target_modules, lora.base_model)


def _revived(a: "Tensor", b: "Tensor", seed: int, name: str) -> "Factors":
    """Rank that is zero in both factors would never get a gradient: its A rows start as LoRA's do, B stays 0."""
    import torch

    dead = (a == 0).all(dim=1) & (b == 0).all(dim=0)
    if dead.any():
        bound = 1 / math.sqrt(a.shape[1])  # PEFT: kaiming_uniform_(a=√5)
        fresh = torch.empty(a.shape).uniform_(-bound, bound, generator=_generator(seed, name, "A"))
        a = torch.where(dead[:, None], fresh, a)
    return a, b


def _float32(value: "Tensor", name: str) -> "Tensor":
    import torch

    value = value.to(torch.float32).contiguous()
    if not torch.isfinite(value).all():
        raise AdapterError(
            f"merging overflows float32 in {name}: a parent is damaged or its weights exploded in training"
        )
    return value


def _generator(seed: int, name: str, factor: str) -> "Generator":
    import torch

    digest = hashlib.sha256(f"{seed}/{name}/{factor}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
