import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentlab.adapters import Lora, add_noise, crossover, delta, resize_rank
from agentlab.errors import AdapterError

from .helpers import best_approximation, distance, random_lora, relative, weighted

SHAPES = {"wide": (12, 40), "tall": (40, 12)}
ranks = st.integers(1, 16)
alphas = st.floats(0.5, 64)
# Exact zero is allowed; between it and 1e-3 a parent would be rounding in float32, which 1e-4 cannot ask for.
weight = st.one_of(st.just(0.0), st.floats(0.001, 3), st.floats(-3, -0.001))


@settings(max_examples=60, deadline=None)
@given(
    parents=st.lists(st.tuples(st.integers(0, 1000), ranks, alphas, weight), min_size=1, max_size=3),
    rank=st.integers(1, 20),
    alpha=st.one_of(st.none(), alphas),
)
def test_exact_is_the_best_approximation(
    parents: list[tuple[int, int, float, float]], rank: int, alpha: float | None
) -> None:
    loras = [random_lora(seed, r, a, SHAPES) for seed, r, a, _ in parents]
    weights = [w for *_, w in parents]
    child = crossover(loras, weights, rank, alpha)
    assert child.rank == rank
    assert child.alpha == (pytest.approx(alpha) if alpha else pytest.approx(loras[0].scaling * rank))
    for name in SHAPES:
        target = weighted(loras, weights, name)
        best = best_approximation(target, rank)
        a, b = child.modules[name]
        assert (a.shape, b.shape) == ((rank, SHAPES[name][1]), (SHAPES[name][0], rank))
        scale = max(float(parent.modules[name][0].norm()) for parent in loras)
        if float(target.norm()) < 1e-6 * scale:  # parents that cancel leave nothing to compare with
            assert float(delta(child, name).norm()) < 1e-5 * scale
            continue
        found = delta(child, name).double()
        # Equal singular values at the cut leave the best approximation open, not its error.
        assert float((found - target).norm()) <= float((best - target).norm()) + 1e-4 * float(target.norm())
        values = torch.linalg.svdvals(target)
        if rank >= len(values) or float(values[rank - 1] - values[rank]) > 1e-6 * float(values[0]):
            assert relative(found, best) < 1e-4


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rank=ranks, alpha=alphas, share=st.floats(0, 1))
def test_identical_parents_give_that_parent(seed: int, rank: int, alpha: float, share: float) -> None:
    parent = random_lora(seed, rank, alpha, SHAPES)
    child = crossover([parent, copy.deepcopy(parent)], [share, 1 - share], rank)
    assert distance(child, parent) < 1e-5
    assert child.scaling == pytest.approx(parent.scaling)


@settings(max_examples=30, deadline=None)
@given(one=st.integers(0, 500), other=st.integers(501, 1000), rank=st.integers(1, 12), share=st.floats(0.05, 0.95))
def test_order_of_parents_does_not_matter(one: int, other: int, rank: int, share: float) -> None:
    first, second = random_lora(one, 4, 8.0, SHAPES), random_lora(other, 6, 3.0, SHAPES)
    child = crossover([first, second], [share, 1 - share], rank)
    twin = crossover([second, first], [1 - share, share], rank)
    assert distance(child, twin) < 1e-5


def test_same_call_gives_the_same_bits() -> None:
    parents = [random_lora(1), random_lora(2, 8)]
    one, other = (crossover(parents, [0.3, 0.7], 14) for _ in range(2))
    for name, (a, b) in one.modules.items():
        assert torch.equal(a, other.modules[name][0])
        assert torch.equal(b, other.modules[name][1])


def test_factors_have_the_shape_of_a_fresh_lora_and_fixed_signs() -> None:
    child = crossover([random_lora(1), random_lora(2)], [0.5, 0.5], 4)
    for a, b in child.modules.values():
        # rows of a fresh A, uniform within ±1/√in, have a mean square length of 1/3
        assert torch.allclose(a @ a.T, torch.eye(4) / 3, atol=1e-5)
        lengths = b.norm(dim=0)
        assert torch.equal(lengths, lengths.sort(descending=True).values)
        assert (b.gather(0, b.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_a_parent_of_zeros_only_scales() -> None:
    parent, zero = random_lora(1), random_lora(2)
    zero.modules = {name: (a, torch.zeros_like(b)) for name, (a, b) in zero.modules.items()}
    child = crossover([parent, zero], [0.25, 0.75], 4)
    for name in parent.modules:
        assert relative(delta(child, name), 0.25 * delta(parent, name)) < 1e-5


def test_nothing_but_zeros_gives_a_fresh_adapter() -> None:
    zero = random_lora(1)
    zero.modules = {name: (torch.zeros_like(a), torch.zeros_like(b)) for name, (a, b) in zero.modules.items()}
    for child in (crossover([zero, zero], [0.5, 0.5], 4), crossover([random_lora(3)] * 2, [1.0, -1.0], 4)):
        for a, b in child.modules.values():
            assert (b == 0).all()
            assert (a.std(dim=1) > 0).all()


def test_unused_rank_is_fresh_and_trainable() -> None:
    parent = random_lora(1, rank=4)
    child = resize_rank(parent, 9, seed=5)
    assert distance(child, parent) < 1e-5
    for a, b in child.modules.values():
        assert (b[:, 4:] == 0).all()
        assert (a[4:].abs().amax(dim=1) > 0).all()
        assert a[4:].abs().max() <= a.shape[1] ** -0.5
        a.requires_grad_()
        b.requires_grad_()
        (b @ a).sum().backward()
        assert (b.grad[:, 4:] != 0).any()
    again, other = resize_rank(parent, 9, seed=5), resize_rank(parent, 9, seed=6)
    name = next(iter(parent.modules))
    assert torch.equal(again.modules[name][0], child.modules[name][0])
    assert not torch.equal(other.modules[name][0], child.modules[name][0])


def test_modules_that_a_parent_lacks_count_as_zero() -> None:
    both = {"l.q_proj": (8, 8), "l.v_proj": (8, 8)}
    one, other = random_lora(1, 2, 4.0, both), random_lora(2, 3, 6.0, {"l.v_proj": (8, 8), "l.up_proj": (9, 8)})
    child = crossover([one, other], [0.6, 0.4], 5)
    assert child.target_modules == ["q_proj", "up_proj", "v_proj"]
    assert set(child.modules) == {"l.q_proj", "l.v_proj", "l.up_proj"}
    for name in child.modules:
        assert relative(delta(child, name), weighted([one, other], [0.6, 0.4], name)) < 1e-5


def test_noise_is_relative_and_a_function_of_its_seed() -> None:
    parent = random_lora(1, rank=16)
    noisy, again, other = (add_noise(parent, 0.1, seed) for seed in (3, 3, 4))
    for name, factors in parent.modules.items():
        for index, value in enumerate(factors):
            moved = noisy.modules[name][index] - value
            assert float(moved.square().mean().sqrt() / value.square().mean().sqrt()) == pytest.approx(0.1, rel=0.2)
            assert torch.equal(noisy.modules[name][index], again.modules[name][index])
            assert not torch.equal(noisy.modules[name][index], other.modules[name][index])
    assert distance(add_noise(parent, 0.0, 1), parent) == 0


def test_noise_leaves_an_untouched_module_untouched() -> None:
    fresh = random_lora(1)
    fresh.modules = {name: (a, torch.zeros_like(b)) for name, (a, b) in fresh.modules.items()}
    assert all((delta(add_noise(fresh, 0.5, 1), name) == 0).all() for name in fresh.modules)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parents": []}, "one weight for each"),
        ({"weights": [1.0]}, "one weight for each"),
        ({"weights": [float("nan"), 1.0]}, "finite"),
        ({"rank": 0}, "rank"),
        ({"rank": 10**6}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"density": 0.0}, "density"),
    ],
)
def test_refuses_impossible_numbers(changes: dict[str, object], said: str) -> None:
    arguments: dict[str, object] = {"parents": [random_lora(1)] * 2, "weights": [0.5, 0.5], "rank": 4}
    with pytest.raises(AdapterError, match=said):
        crossover(**(arguments | changes))  # type: ignore[arg-type]


def test_refuses_parents_of_different_bases_and_overflow() -> None:
    with pytest.raises(AdapterError, match="different base models"):
        crossover([random_lora(1, shapes={"q": (8, 8)}), random_lora(1, shapes={"q": (8, 9)})], [0.5, 0.5], 4)
    huge = random_lora(1, shapes={"q": (8, 8)}, scale=3e38)
    huge.modules = {"q": (huge.modules["q"][0].clamp(-3e38, 3e38), huge.modules["q"][1].clamp(-3e38, 3e38))}
    with pytest.raises(AdapterError, match="overflows"):
        crossover([huge], [1e30], 4)
    with pytest.raises(AdapterError, match="noise"):
        add_noise(random_lora(1), float("nan"), 1)


def test_parents_are_not_changed() -> None:
    parent = random_lora(1)
    before = copy.deepcopy(parent.modules)
    for method in ("exact", "linear", "ties"):
        child: Lora = crossover([parent, random_lora(2)], [0.5, 0.5], 4, method=method)  # type: ignore[arg-type]
        for pair in child.modules.values():
            for factor in pair:
                factor.zero_()
    add_noise(parent, 0.5, 1)
    for name, (a, b) in before.items():
        assert torch.equal(a, parent.modules[name][0])
        assert torch.equal(b, parent.modules[name][1])
