"""Reading and writing rates from measurements that something else disturbs."""

import pytest
from support import write_tiny_experiment

from agentlab import Lab
from agentlab.evolution.fitness import calibrate, stored_rates
from agentlab.inference import Completion


class Timed:
    """Reads 1,000 tokens/s and writes 20, but for what is added to the n-th request; 100 tokens a prompt."""

    def __init__(self, slower):
        self.slower, self.count = slower, 0

    def generate(self, requests, batch_size):
        (request,) = requests
        tokens = request.max_new_tokens
        seconds = 0.1 + (tokens - 1) / 20 + self.slower.get(self.count, 0.0)
        self.count += 1
        return [Completion("", [1] * tokens, "length", 100, seconds)]


@pytest.mark.parametrize(
    "slower",
    [
        {},
        {4: 0.8},  # a first token as slow as the whole answer, which was once taken for 16,000 tokens/s
        {4: 0.799, 5: 0.2, 7: 0.5},
        {0: 3.0, 1: 3.0, 2: 3.0, 3: 1.0},
    ],
)
def test_a_disturbance_makes_nothing_faster(tmp_path, tiny_model, slower):
    lab = Lab.open(write_tiny_experiment(tmp_path, tiny_model))
    rates = calibrate(lab.run, Timed(slower), lab.suite, lambda event: None)
    assert (rates.prefill_tokens_per_s, rates.decode_tokens_per_s) == (1000, 20)
    assert stored_rates(lab.run) == rates


def test_a_model_that_ends_at_once_gets_a_rate_all_the_same(tmp_path, tiny_model):
    class Silent(Timed):
        def generate(self, requests, batch_size):
            return [Completion("", [], "stop", 100, 0.1)]

    lab = Lab.open(write_tiny_experiment(tmp_path, tiny_model))
    assert calibrate(lab.run, Silent({}), lab.suite, lambda event: None).decode_tokens_per_s == 10
