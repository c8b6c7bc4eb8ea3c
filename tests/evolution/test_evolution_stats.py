import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from agentlab.evolution.stats import detectable_gain, mean_interval, paired_gain, paired_p_value, wins_and_losses

unit = st.floats(0, 1)
binary = st.sampled_from([0.0, 1.0])


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (7, 20), (199, 200), (33, 100)])
def test_right_or_wrong_scores_have_wilsons_interval(right, n):
    mean, low, high = mean_interval([1.0] * right + [0.0] * (n - right))
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert mean == pytest.approx(right / n)
    assert low == pytest.approx(expected.low, abs=1e-9)
    assert high == pytest.approx(expected.high, abs=1e-9)


@given(st.lists(unit, min_size=1, max_size=60))
def test_interval_contains_the_mean_and_stays_in_the_unit_range(scores):
    mean, low, high = mean_interval(scores)
    assert 0 <= low <= mean <= high <= 1
    assert high > low


@given(st.lists(unit, min_size=2, max_size=60))
def test_graded_scores_are_never_wider_than_right_or_wrong_ones_of_the_same_mean(scores):
    n, mean = len(scores), float(np.mean(scores))
    _, low, high = mean_interval(scores)
    z = 1.959963984540054
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    assert high - low <= 2 * half + 1e-9


def test_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one score"):
        mean_interval([])


def test_clean_sweep_has_a_gain_of_one_and_still_a_width():
    gain, low, high = paired_gain([1.0] * 20, [0.0] * 20)
    assert (gain, high) == (1.0, 1.0)
    assert 0.7 < low < 1.0


def test_identical_scores_have_no_gain_and_an_interval_around_zero():
    scores = [1.0, 0.0, 1.0, 1.0] * 10
    gain, low, high = paired_gain(scores, scores)
    assert gain == 0
    assert low == pytest.approx(-high)
    assert 0 < high < 0.2


def test_graded_gain_is_students_interval():
    new, old = [0.9, 0.5, 0.7, 0.4, 1.0], [0.5, 0.5, 0.2, 0.6, 0.1]
    gain, low, high = paired_gain(new, old)
    d = np.subtract(new, old)
    half = 2.7764451 * d.std(ddof=1) / math.sqrt(5)  # t(0.975, 4)
    assert gain == pytest.approx(d.mean())
    assert (low, high) == (pytest.approx(gain - half, abs=1e-6), pytest.approx(min(1.0, gain + half), abs=1e-6))


def test_one_graded_item_says_nothing():
    assert paired_gain([0.7], [0.2]) == (pytest.approx(0.5), pytest.approx(-0.5), 1.0)


@given(st.lists(st.tuples(binary, binary) | st.tuples(unit, unit), min_size=1, max_size=60))
def test_gain_lies_in_its_interval_and_turns_round_with_its_arguments(pairs):
    new, old = zip(*pairs, strict=True)
    gain, low, high = paired_gain(new, old)
    assert -1 <= low <= gain <= high <= 1
    assert paired_gain(old, new) == (pytest.approx(-gain), pytest.approx(-high), pytest.approx(-low))


def test_gain_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        old, luck = rng.random(120) < 0.4, rng.random(120)
        new = np.where(old, luck < 0.9, luck < 0.3)  # true gain: 0.4·0.9 + 0.6·0.3 - 0.4 = 0.14
        _, low, high = paired_gain(new.astype(float), old.astype(float))
        covered += low <= 0.14 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_wins_and_losses_count_each_direction_and_refuse_unequal_lengths():
    assert wins_and_losses([1, 0, 0.5, 1], [0, 1, 0.5, 0.2]) == (2, 1)
    with pytest.raises(ValueError):
        wins_and_losses([1, 0], [1])


@given(st.integers(0, 60), st.integers(0, 60))
def test_p_value_is_the_exact_one_sided_sign_test(wins, losses):
    expected = binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue if wins + losses else 1.0
    assert paired_p_value(wins, losses) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 200), st.integers(0, 40), st.sampled_from([0.3, 0.05, 0.05 / 3, 0.001]))
def test_detectable_gain_is_the_smallest_that_passes(items, losses, alpha):
    gain = detectable_gain(items, losses, alpha)
    assert 0 < gain <= 1
    wins = round(gain * items) + losses
    if wins + losses <= items and paired_p_value(wins, losses) <= alpha:
        assert paired_p_value(wins - 1, losses) > alpha
    else:  # out of reach: not even winning all other items is enough
        assert gain == 1
        assert paired_p_value(max(0, items - losses), losses) > alpha
