import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlab.learning.trouble import DIVERGED_NATS, SHORTENINGS, Attempt, TrainingTrouble, check_loss, remedy


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_trouble(bad):
    with pytest.raises(TrainingTrouble, match="at step 3") as caught:
        check_loss([2.0, 1.9, bad])
    assert caught.value.problem == "nan"


def test_a_loss_far_above_the_first_is_divergence():
    check_loss([2.0, 2.0 + DIVERGED_NATS])
    check_loss([2.0, 4.0, 0.1])
    with pytest.raises(TrainingTrouble, match=r"loss rose from 2.00 to 5.10 at step 2") as caught:
        check_loss([2.0, 5.1])
    assert caught.value.problem == "divergence"


@pytest.mark.parametrize("problem", ["nan", "divergence"])
def test_unstable_training_gets_a_lower_rate_and_nothing_else(problem):
    attempt, action = remedy(Attempt(0.01, 8, 2), problem)
    assert attempt == Attempt(0.0025, 8, 2)
    assert action == "learning rate lowered to 0.0025"


@given(st.integers(1, 512))
def test_scarce_memory_gets_smaller_batches_of_the_same_items(batch_size):
    attempt = Attempt(0.01, batch_size)
    sizes = [batch_size]
    while not attempt.checkpointing:
        attempt, action = remedy(attempt, "out_of_memory")
        assert attempt.batch_size * attempt.accumulation == batch_size
        assert attempt.learning_rate == 0.01
        if not attempt.checkpointing:
            assert attempt.batch_size < sizes[-1]
            assert str(attempt.batch_size) in action
            sizes.append(attempt.batch_size)
    assert sizes[-1] == 1
    assert action == "gradient checkpointing"
    assert remedy(attempt, "out_of_memory") is None


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=64))
def test_where_one_item_at_a_time_is_too_much_the_longest_are_left_out_at_most_twice(lengths):
    attempt, limits = Attempt(0.01, 1, 8, checkpointing=True), []
    while (following := remedy(attempt, "out_of_memory", lengths)) is not None:
        attempt, action = following
        limits.append(attempt.max_tokens)
        assert str(attempt.max_tokens) in action
        assert attempt.max_tokens < max(lengths)
        lengths = [length for length in lengths if length <= attempt.max_tokens]
        assert lengths
    assert len(limits) <= SHORTENINGS
    assert limits == sorted(limits, reverse=True)


def test_a_quarter_is_left_out_and_items_of_one_length_are_not():
    assert remedy(Attempt(0.01, 1, checkpointing=True), "out_of_memory", list(range(1, 101)))[0].max_tokens == 75
    assert remedy(Attempt(0.01, 1, checkpointing=True), "out_of_memory", [7] * 9) is None


def test_an_unknown_problem_has_no_remedy():
    assert remedy(Attempt(0.01, 8), "boredom") is None
