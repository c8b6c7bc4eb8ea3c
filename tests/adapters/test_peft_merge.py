"""What PEFT's own merging really gives, against real PEFT; the traps that `peft_merge` is there to avoid."""

from typing import get_args

import pytest
import torch

from agentlab.adapters import crossover, delta
from agentlab.adapters.peft_merge import add_weighted, carrier
from agentlab.config import MergeMethod
from agentlab.errors import AdapterError

from .helpers import LLAMA, distance, random_lora, relative, weighted

METHODS = [method for method in get_args(MergeMethod) if method != "exact"]


def test_a_name_in_use_merges_nothing_in_peft_and_is_refused_here() -> None:
    model = carrier([random_lora(1), random_lora(2)], ["one", "other"])
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    before = layer.lora_A["one"].weight.clone()
    model.add_weighted_adapter(["one", "other"], [0.5, 0.5], "one", combination_type="linear")  # the trap: no error
    assert torch.equal(layer.lora_A["one"].weight, before)
    with pytest.raises(AdapterError, match="one is in use"):
        add_weighted(model, ["one", "other"], [0.5, 0.5], "one", "linear", density=0.5, rank=4)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties"])
def test_unequal_ranks_are_refused_by_peft_and_resized_here(method: MergeMethod) -> None:
    parents = [random_lora(1, 4), random_lora(2, 6)]
    model = carrier(parents, ["one", "other"])
    with pytest.raises(ValueError, match="same r"):
        model.add_weighted_adapter(["one", "other"], [0.5, 0.5], "new", combination_type=method, density=0.5)
    with pytest.raises(AdapterError, match="one rank"):
        add_weighted(model, ["one", "other"], [0.5, 0.5], "new", method, density=0.5, rank=4)
    child = crossover(parents, [0.5, 0.5], 5, method=method)
    assert child.rank == 5
    assert all(a.shape[0] == 5 and torch.isfinite(b).all() for a, b in child.modules.values())


@pytest.mark.parametrize(
    ("method", "factor"), [("linear", 2.0), ("ties", 0.5), ("svd", 1.0), ("exact", 1.0), ("ties_svd", 0.5)]
)
def test_identical_parents(method: MergeMethod, factor: float) -> None:
    """0.5/0.5 of one adapter: linear doubles it and TIES halves it; svd and exact give it back."""
    parent = random_lora(1)
    child = crossover([parent, parent], [0.5, 0.5], 4, method=method, density=1.0)
    for name in LLAMA:
        assert relative(delta(child, name), factor * delta(parent, name)) < 1e-5


def test_dare_of_identical_parents_has_the_expectation_of_linear() -> None:
    parent = random_lora(1)
    for method, factor in (("dare_linear", 2.0), ("dare_ties", 0.5)):
        child = crossover([parent, parent], [0.5, 0.5], 4, method=method, density=1.0)  # type: ignore[arg-type]
        for name in LLAMA:
            assert relative(delta(child, name), factor * delta(parent, name)) < 1e-5


def test_cat_is_exact_and_sums_ranks() -> None:
    parents = [random_lora(1, 4, 8.0), random_lora(2, 3, 5.0)]
    model = carrier(parents, ["one", "other"])
    model.add_weighted_adapter(["one", "other"], [0.3, 0.7], "cat", combination_type="cat")
    assert model.peft_config["cat"].r == 7
    child = crossover(parents, [0.3, 0.7], 7)
    for name in LLAMA:
        layer = model.get_submodule(f"base_model.model.{name}")
        dense = layer.get_delta_weight("cat")
        assert relative(dense, weighted(parents, [0.3, 0.7], name)) < 1e-5
        assert relative(delta(child, name), dense) < 1e-5


def test_linear_is_far_off_on_unrelated_parents() -> None:
    parents = [random_lora(1), random_lora(2)]
    child = crossover(parents, [0.5, 0.5], 4, method="linear")
    name = next(iter(LLAMA))
    assert 0.5 < relative(delta(child, name), weighted(parents, [0.5, 0.5], name)) < 1.5


def test_linear_is_what_peft_documents() -> None:
    parents = [random_lora(1, 4, 8.0), random_lora(2, 4, 2.0)]
    child = crossover(parents, [0.5, -0.25], 4, method="linear")
    for name in LLAMA:
        (a1, b1), (a2, b2) = parents[0].modules[name], parents[1].modules[name]
        a = (0.5 * 2.0) ** 0.5 * a1 - (0.25 * 0.5) ** 0.5 * a2
        b = (0.5 * 2.0) ** 0.5 * b1 + (0.25 * 0.5) ** 0.5 * b2
        assert relative(delta(child, name), b @ a) < 1e-5


def test_svd_is_exact_for_any_ranks() -> None:
    parents = [random_lora(1, 4, 8.0), random_lora(2, 7, 3.0)]
    for rank in (2, 7, 9, 20):  # 20: more than a k_proj of 16 rows has, where PEFT returns fewer
        child = crossover(parents, [0.3, 0.7], rank, method="svd")
        assert child.rank == rank
        assert all(a.shape[0] == rank and b.shape[1] == rank for a, b in child.modules.values())
        assert distance(child, crossover(parents, [0.3, 0.7], rank)) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_asked_shape_and_depends_on_the_seed_only(method: MergeMethod) -> None:
    parents = [random_lora(1, 4), random_lora(2, 4, shapes={**LLAMA, "model.layers.0.mlp.up_proj": (48, 32)})]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    child = crossover(parents, [0.5, 0.5], 4, 16.0, method, density=0.5, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again = crossover(parents, [0.5, 0.5], 4, 16.0, method, density=0.5, seed=3)
    assert (child.rank, child.alpha) == (4, 16.0)
    assert set(child.modules) == {*LLAMA, "model.layers.0.mlp.up_proj"}
    for name, (a, b) in child.modules.items():
        assert torch.equal(a, again.modules[name][0])
        assert torch.equal(b, again.modules[name][1])
    if method.startswith("dare"):
        other = crossover(parents, [0.5, 0.5], 4, 16.0, method, density=0.5, seed=4)
        assert distance(child, other) > 0.01


def test_one_parent_is_itself_whatever_the_method() -> None:
    parent = random_lora(1)
    for method in METHODS:
        assert distance(crossover([parent], [1.0], 4, method=method), parent) < 1e-5
