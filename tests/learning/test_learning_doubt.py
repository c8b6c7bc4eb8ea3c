"""What an adapter would get wrong, against the same probabilities computed one item at a time."""

import dataclasses

import numpy as np
import pytest
import torch
from learning_helpers import genome_of

from agentlab.errors import EvolutionStopped
from agentlab.learning import doubt
from agentlab.learning.sft import train


@pytest.fixture(scope="module")
def lora(engine, suite):
    from agentlab.learning import encode

    items = suite.split("train")[:8]
    trained, _ = train(engine, genome_of(steps=3), None, [encode(engine, suite, item) for item in items])
    return trained


def alone(engine, lora, example):
    """The log-probability of the completion, the plain way."""
    ids, mask = torch.tensor([example.input_ids]), torch.tensor(example.completion_mask, dtype=torch.bool)
    engine.add_adapter("plain", lora)
    try:
        with engine.using("plain"), torch.inference_mode():
            log_p = engine.model(input_ids=ids).logits[0].float().log_softmax(-1)
    finally:
        engine.unload_adapter("plain")
    return sum(float(log_p[at - 1, ids[0, at]]) for at in torch.nonzero(mask).flatten().tolist())


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("limits", [{}, {"_ROWS": 3}, {"_TOKENS": 50}, {"_LOGITS": 1}])
def test_doubt_is_one_minus_the_probability_of_the_completion(
    engine, lora, examples, monkeypatch, limits, shared, plain
):
    monkeypatch.setattr(doubt, "projects_plainly", lambda _config: plain)
    monkeypatch.setattr(doubt, "rows_can_share", lambda _cache: shared)
    for name, value in limits.items():
        monkeypatch.setattr(doubt, name, value)
    seen, real = [], doubt._log_likelihoods
    monkeypatch.setattr(doubt, "_log_likelihoods", lambda *given: seen.append(real(*given)) or seen[-1])
    found = doubt.doubts(engine, lora, examples)
    expected = [alone(engine, lora, example) for example in examples]
    assert sorted(np.concatenate(seen)) == pytest.approx(sorted(expected), abs=1e-4)
    assert found == pytest.approx(1 - np.exp(expected), abs=1e-6)
    assert len({round(value, 3) for value in expected}) > 4
    assert (len(seen) > 1) == bool(limits)
    assert engine.adapters() == []


def test_a_likely_completion_is_not_doubted(engine, lora, examples, monkeypatch):
    monkeypatch.setattr(doubt, "_log_likelihoods", lambda _engine, batch, *_: np.log(np.linspace(0.5, 1.0, len(batch))))
    found = doubt.doubts(engine, lora, examples)
    assert (found.min(), found.max()) == pytest.approx((0.0, 0.5))
    longest = max(range(len(examples)), key=lambda i: (len(examples[i].input_ids), -i))
    assert found[longest] == pytest.approx(0.5)  # longest first: each value is its own item's


def test_training_on_items_takes_doubt_from_them(engine, examples):
    taught, _ = train(engine, genome_of(steps=20), None, examples[:4] * 20)
    base = dataclasses.replace(taught, modules={name: (a, 0 * b) for name, (a, b) in taught.modules.items()})
    before, after = (np.array([alone(engine, one, example) for example in examples[:4]]) for one in (base, taught))
    assert (after > before + 1).all()
    assert (doubt.doubts(engine, taught, examples[:4]) < doubt.doubts(engine, base, examples[:4])).all()


def test_it_can_be_stopped_and_leaves_nothing_behind(engine, lora, examples):
    with pytest.raises(EvolutionStopped):
        doubt.doubts(engine, lora, examples, lambda: True)
    assert engine.adapters() == []


def test_no_items_are_no_work(engine, lora):
    assert doubt.doubts(engine, lora, []).shape == (0,)
