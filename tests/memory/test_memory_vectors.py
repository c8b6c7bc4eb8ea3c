"""Search over many vectors against comparing all of them."""

import numpy as np
import pytest

from agentlab.memory.vectors import EXACT_LIMIT, Vectors


def clustered(count, dimension=64, seed=0):
    """Unit vectors around a few hundred centres, as sentences lie around topics."""
    chance = np.random.default_rng(seed)
    centres = chance.standard_normal((200, dimension))
    vectors = centres[chance.integers(0, 200, count)] + 0.7 * chance.standard_normal((count, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def many():
    vectors = clustered(EXACT_LIMIT + 6000)
    index = Vectors(64)
    index.append(vectors[: EXACT_LIMIT + 5000])
    index.settle()
    assert index._scan is not None
    for start in range(EXACT_LIMIT + 5000, len(vectors), 100):
        index.append(vectors[start : start + 100])
        index.settle()
    return index, vectors


def best(vectors, query, count, allowed=None):
    scores = vectors @ query
    if allowed is not None:
        scores = np.where(allowed, scores, -2)
    return np.argsort(-scores, kind="stable")[:count]


def test_scan_finds_what_comparing_all_finds(many):
    index, vectors = many
    queries = clustered(200, seed=1)
    same = sum(len(set(index.search(q, 10)[0]) & set(best(vectors, q, 10))) for q in queries)
    assert same >= 0.99 * 10 * len(queries)
    slots, cosines = index.search(queries[0], 10)
    assert cosines == pytest.approx(vectors[slots] @ queries[0])
    assert list(cosines) == sorted(cosines, reverse=True)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.05, 0.0002])
def test_filters_are_exact_about_membership_and_nearly_about_order(many, share):
    index, vectors = many
    allowed = np.random.default_rng(2).random(len(vectors)) < share
    queries = clustered(50, seed=3)
    same = total = 0
    for query in queries:
        slots, _ = index.search(query, 10, allowed)
        expected = best(vectors, query, min(10, allowed.sum()), allowed)
        assert allowed[slots].all()
        assert len(slots) == len(expected)
        same += len(set(slots) & set(expected))
        total += len(expected)
    assert same >= 0.99 * total


def test_a_filter_against_the_query_is_still_answered(many):
    """Only the half farthest from the query is allowed, so nothing that the scan brings first may come back."""
    index, vectors = many
    query = clustered(1, seed=4)[0]
    scores = vectors @ query
    allowed = scores < np.median(scores) * 0.9
    assert allowed.sum() > 5000
    slots, _ = index.search(query, 5, allowed)
    assert len(slots) == 5
    assert allowed[slots].all()


def test_few_vectors_and_none():
    index = Vectors(4)
    assert len(index.search(np.ones(4, np.float32), 3)[0]) == 0
    index.append(np.eye(4, dtype=np.float32))
    slots, cosines = index.search(np.array([0, 1, 0, 0], np.float32), 10)
    assert slots[0] == 1
    assert len(slots) == 4
    assert cosines[0] == 1
    assert len(index.search(np.ones(4, np.float32), 3, np.zeros(4, bool))[0]) == 0


def test_odd_dimensions_are_compared_exactly():
    vectors = clustered(EXACT_LIMIT + 5000, dimension=33)
    index = Vectors(33)
    index.append(vectors)
    index.settle()
    assert set(index.search(vectors[7], 5)[0]) == set(best(vectors, vectors[7], 5))
