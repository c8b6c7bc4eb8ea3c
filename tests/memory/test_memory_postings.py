"""BM25 in RAM against the formula written out, across bulk loads, single additions and merges."""

import math
import random
from collections import Counter

import pytest

from agentlab.memory.postings import K1, B, Postings

WORDS = [f"w{i}" for i in range(300)]


def brute(documents, query):
    lengths = [len(document) for document in documents]
    average = 2 ** (round(32 * math.log2(sum(lengths) / len(lengths))) / 32)  # the nearest of 32 steps a doubling
    scores = {}
    for number, document in enumerate(documents):
        counts, score = Counter(document), 0.0
        for term, weight in query.items():
            frequency = sum(term in other for other in documents)
            idf = math.log1p((len(documents) - frequency + 0.5) / (frequency + 0.5))
            length = K1 * (1 - B + B * lengths[number] / average)
            score += weight * idf * counts[term] * (K1 + 1) / (counts[term] + length)
        if score > 0:
            scores[number] = score
    return scores


@pytest.mark.parametrize("sizes", [[40], [1500], [1, 1, 1], [1100, 3, 1100, 1]])
def test_scores_are_the_formula(sizes):
    chance = random.Random(1)
    index, documents = Postings(), []
    for size in sizes:
        new = [chance.choices(WORDS, [1 / (i + 1) for i in range(300)], k=chance.randint(1, 12)) for _ in range(size)]
        documents += new
        index.append(" ".join(document) for document in new)
    for query in ({"w0": 1.0, "w5": 2.0, "w200": 1.0}, {"w299": 1.0}, {"absent": 1.0}, {"w1": 1.0, "w2": 1.0}):
        expected = brute(documents, query)
        with index.scored(query) as (slots, scores, limit):
            got = {int(slot): float(scores[slot]) for slot in slots}
        assert got.keys() == expected.keys()
        assert got == pytest.approx(expected, rel=1e-4)
        assert all(score <= limit for score in got.values())
    with index.scored({"w0": 1.0}) as (_, scores, _):
        pass
    assert not scores.any(), "the scratch was not cleared"
