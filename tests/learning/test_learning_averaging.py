"""The mean of the weights that a training passed through, and of those that it continues."""

from types import SimpleNamespace

import pytest
import torch

from agentlab.learning.averaging import WeightAverage


def mean_of(weights, share, *line):
    """What is left of one weight that went through these values, one a step."""
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(share, *line)
    for step, value in enumerate(weights, start=1):
        torch.nn.init.constant_(model.weight, value)
        average.on_step_end(None, SimpleNamespace(global_step=step, max_steps=len(weights)), None, model=model)
    return float(model.weight.detach())


@pytest.mark.parametrize(
    ("weights", "share", "expected"),
    [([1, 2, 3, 4], 0.5, 3.5), ([1, 2, 3, 4], 1, 2.5), ([1, 2, 3, 4], 0.01, 4), ([7], 0.5, 7), ([1, 2, 3], 0.5, 2.5)],
)
def test_it_is_of_the_last_share_of_the_steps(weights, share, expected):
    assert mean_of(weights, share) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("before", "weights", "share", "expected"),
    [
        (4, [5, 6, 7, 8], 0.5, 6.5),  # half of eight steps are the four new ones
        (2, [5, 6, 7, 8], 0.5, 7),  # of six steps three count: 6, 7 and 8
        (8, [10, 20], 0.5, (3 * 1 + 10 + 20) / 5),  # of ten steps five count, three of them before
        (98, [10, 20], 1, (98 * 1 + 10 + 20) / 100),
        (2, [10], 0.01, 10),
    ],
)
def test_where_a_line_goes_on_it_reaches_back_into_what_came_before(before, weights, share, expected):
    assert mean_of(weights, share, before, [torch.ones(1, 1)]) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="allowed: above 0, at most 1"):
        WeightAverage(share)
