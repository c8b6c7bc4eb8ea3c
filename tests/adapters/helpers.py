"""Adapters for tests, and the slow, obvious way to compute what they mean."""

import time

import torch

from agentlab.adapters import Card, Lora, delta

# Modules of the tiny Llama in conftest.py: (out, in).
LLAMA = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(2)
    for module, shape in {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 48)}.items()
}
TOKENS = torch.arange(24).reshape(2, 12)


def random_lora(
    seed: int, rank: int = 4, alpha: float = 8.0, shapes: dict[str, tuple[int, int]] | None = None, scale: float = 0.3
) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: (
            torch.randn(rank, n_in, generator=generator) * scale,
            torch.randn(n_out, rank, generator=generator) * scale,
        )
        for name, (n_out, n_in) in (shapes or LLAMA).items()
    }
    targets = sorted({name.rsplit(".", 1)[-1] for name in modules})
    return Lora(modules, rank, alpha, 0.1, targets, "tiny")


def weighted(parents: list[Lora], weights: list[float], module: str) -> torch.Tensor:
    """Σ w_i·delta_i, dense, float64."""
    total = torch.zeros(())
    for parent, weight in zip(parents, weights, strict=True):
        if module in parent.modules:
            a, b = (factor.double() for factor in parent.modules[module])
            total = total + weight * parent.alpha / parent.rank * (b @ a)
    return total


def best_approximation(dense: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def distance(one: Lora, other: Lora) -> float:
    """The largest relative difference between two adapters' deltas over their modules."""
    assert set(one.modules) == set(other.modules)
    return max(relative(delta(one, name), delta(other, name)) for name in one.modules)


def card(adapter_id: str, fitness: float | None = 0.5, **changes: object) -> Card:
    values: dict[str, object] = {
        "adapter_id": adapter_id,
        "name": f"tiny {adapter_id}",
        "task_domain": "toolcalls",
        "rank": 4,
        "alpha": 8.0,
        "dropout": 0.1,
        "target_modules": ["q_proj"],
        "weights": f"{adapter_id}/adapter_model.safetensors",
        "performance_metrics": {} if fitness is None else {"fitness": fitness},
        "generation": 0,
        "base_model": "tiny",
        "base_sha256": "b" * 64,
        "weights_sha256": None,
        "operator": "founder",
        "state": "kept",
        "created_at_s": time.time(),
        "suite": "toolcalls",
    }
    return Card.model_validate(values | changes)
