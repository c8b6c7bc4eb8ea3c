"""Time turned into tokens and steps; log-probabilities into confidence, and whether that is calibrated."""

import json
import math
import threading

import pytest
from helpers import Scripted, agent_of
from hypothesis import given
from hypothesis import strategies as st

from agentlab.agent.budget import UNBOUNDED, Budget, Speed
from agentlab.agent.confidence import (
    brier_score,
    expected_calibration_error,
    sequence_probability,
    token_probability,
)


def test_speed_is_learned_from_generations():
    speed = Speed()
    assert not speed.known
    speed.observe(100, 0.5, 11, 1.5)
    assert (speed.prefill_tokens_per_s, speed.decode_tokens_per_s) == (200, 10)
    speed.observe(100, 0.25, 11, 0.75)  # twice as fast now: it moves towards it
    assert 200 < speed.prefill_tokens_per_s < 400
    assert 10 < speed.decode_tokens_per_s < 20
    assert speed.seconds(0, 100) == 100 / speed.decode_tokens_per_s


@given(st.integers(0, 10_000), st.floats(0, 10), st.integers(0, 500), st.floats(0, 20))
def test_no_measurement_makes_a_speed_negative_or_infinite(prompt, first, new, total):
    speed = Speed()
    speed.observe(prompt, first, new, total)
    assert speed.prefill_tokens_per_s >= 0
    assert speed.decode_tokens_per_s >= 0


def test_tokens_and_steps_follow_the_speed():
    slow, fast = Speed(100, 10), Speed(1000, 100)
    budget = Budget(10.0)
    assert 80 < budget.tokens(slow, 100) < 95  # a second to read, nine to write, less a margin
    assert budget.tokens(fast, 100) > 900
    assert budget.tokens(slow, 2000) == 0
    assert budget.steps(slow, 100, 20, 30) == 1  # 3 s a call, 4 s the answer
    assert budget.steps(fast, 100, 20, 30) > 20
    assert Budget(None).tokens(slow, 100) == UNBOUNDED
    assert budget.tokens(Speed(), 100) == UNBOUNDED  # not measured: the clock alone decides


def test_a_budget_is_over_at_its_deadline_and_when_somebody_cancels():
    assert Budget(1e-9).over()
    budget = Budget(None, threading.Event())
    assert not budget.over()
    budget.cancel.set()
    assert budget.over()


def test_confidence_of_known_probabilities():
    logs = [math.log(0.5), math.log(0.25)]
    assert sequence_probability(logs) == pytest.approx(0.125)
    assert token_probability(logs) == pytest.approx(math.sqrt(0.125))
    for nothing in ([], None):  # not 0: an engine that tells none has not said that it is unsure
        assert sequence_probability(nothing) is token_probability(nothing) is None


def test_calibration_by_hand():
    assert brier_score([1, 0, 0.5], [1, 0, 1]) == pytest.approx(0.25 / 3)
    # two bins: 0.9 against 1.0 twice, 0.3 against 0.5 twice
    assert expected_calibration_error([0.9, 0.9, 0.3, 0.3], [1, 1, 1, 0]) == pytest.approx(0.5 * 0.1 + 0.5 * 0.2)
    assert expected_calibration_error([1.0], [1]) == 0
    with pytest.raises(ValueError, match="2 confidences for 1"):
        brier_score([0.1, 0.2], [1])


def test_a_log_probability_that_is_no_number_makes_a_confidence_unknown():
    for odd in (math.nan, math.inf):
        assert token_probability([-0.1, odd]) is sequence_probability([-0.1, odd]) is None
    assert token_probability([-0.1, -math.inf]) == 0  # what the model held for impossible
    result = agent_of(engine=Scripted("Hi.", logprob=math.nan)).ask("Hello?")
    assert result.confidence_score is None
    json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
