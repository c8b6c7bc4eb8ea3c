"""A training that is continued goes on as if it had never ended. Real training on the tiny model."""

import dataclasses

import pytest
import safetensors.torch
import torch
from learning_helpers import genome_of

from agentlab.errors import AdapterError
from agentlab.learning.sft import train
from agentlab.learning.state import TrainingState
from agentlab.learning.trainer import CompactSFTTrainer

RATE = 1e-2


def run(engine, examples, steps, start=None, resume=None, emit=lambda event: None, ratio=1.0):
    """(adapter, losses, end) of so many steps at a steady rate, all on one example: the order counts for nothing."""
    ends = []
    lora, training = train(
        engine,
        genome_of(steps=steps, batch_size=2, learning_rate=RATE),
        start,
        examples[:1] * 2 * steps,
        warmup_steps=0,
        average=0.5,
        loraplus_ratio=ratio,
        resume=resume,
        keep=ends.append,
        emit=emit,
    )
    return lora, training.losses, ends[0]


def close(one, other):
    return all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in other) and list(one) == list(
        other
    )


@pytest.fixture
def halves(engine, examples):
    return run(engine, examples, 5)


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_five_and_five_steps_are_ten(engine, examples, ratio, tmp_path):
    mean, losses, whole = run(engine, examples, 10, ratio=ratio)
    lora, first, end = run(engine, examples, 5, ratio=ratio)
    end.save(tmp_path / "end.safetensors")
    kept = TrainingState.load(tmp_path / "end.safetensors")
    same, second, both = run(engine, examples, 5, lora, kept, ratio=ratio)
    assert first + second == pytest.approx(losses, rel=1e-3)
    assert close(both.weights, whole.weights)
    for name, factors in mean.modules.items():  # half of ten steps are the second five
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(same.modules[name], factors, strict=True))
    assert (end.steps, both.steps, whole.steps) == (5, 10, 10)
    for name, moments in whole.moments.items():
        for ours, expected in zip(both.moments[name], moments, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-7)


def test_without_it_a_continuation_goes_back_and_warms_up(engine, examples, halves):
    """What it is for: the mean of the last weights lies behind them."""
    lora, _, end = halves
    _, anew, _ = run(engine, examples, 5, lora)
    _, on, _ = run(engine, examples, 5, lora, end)
    assert anew[0] > on[0]


def test_the_end_is_that_of_the_last_step_and_not_the_mean(engine, halves):
    lora, _, end = halves
    weights = {name for name in end.weights if "lora_A" in name}
    assert weights
    means = [pair[0] for pair in lora.modules.values()]
    assert not any(torch.equal(end.weights[name], mean) for name in weights for mean in means)


def test_one_of_another_shape_is_not_forced_onto_the_adapter(engine, examples, halves):
    events = []
    lora, _, end = halves
    other = dataclasses.replace(end, weights={name: value[:1] for name, value in end.weights.items()})
    _, losses, _ = run(engine, examples, 2, lora, other, events.append)
    _, anew, _ = run(engine, examples, 2, lora)
    assert losses == anew  # warmed up, too
    assert any("begins anew" in getattr(event, "message", "") for event in events)


def test_another_attempt_begins_where_the_first_one_did(engine, examples, halves, monkeypatch):
    """A lack of memory in mid-training, after Adam has taken steps: the second attempt is an undisturbed one."""
    lora, _, end = halves
    before = {name: [moment.clone() for moment in pair] for name, pair in end.moments.items()}
    whole, losses, _ = run(engine, examples, 3, lora, end)
    short_of_memory(monkeypatch, at_step=2)
    events = []
    again, others, _ = run(engine, examples, 3, lora, end, events.append)
    assert [event.kind for event in events if event.kind == "remedy_applied"]
    assert others == pytest.approx(losses, rel=1e-4)
    for name, pair in whole.modules.items():
        for one, other in zip(pair, again.modules[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    for name, pair in end.moments.items():
        assert all(torch.equal(moment, kept) for moment, kept in zip(pair, before[name], strict=True))


def short_of_memory(monkeypatch, at_step):
    """Raises torch's error once, while the loss of that step is computed."""
    count = iter(range(1, 1000))
    compute = CompactSFTTrainer.compute_loss

    def compute_loss(self, *arguments, **named):
        if next(count) == at_step:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return compute(self, *arguments, **named)

    monkeypatch.setattr(CompactSFTTrainer, "compute_loss", compute_loss)


def test_a_rate_that_a_remedy_lowered_stays_low(engine, examples, halves):
    """A parent that diverged at its genome's rate was trained at less, and so is whoever continues it."""
    lora, _, end = halves
    assert end.learning_rate == RATE
    lowered = dataclasses.replace(end, learning_rate=RATE / 1000)
    _, _, slow = run(engine, examples, 2, lora, lowered)
    _, _, fast = run(engine, examples, 2, lora, end)
    assert slow.learning_rate == RATE / 1000
    moved = [
        sum(float((after.weights[name] - end.weights[name]).abs().sum()) for name in end.weights)
        for after in (slow, fast)
    ]
    assert moved[0] < moved[1] / 100


def cut(path):
    return path.read_bytes()[:-100]


def flipped_bit(path):
    """Of the last weight's exponent: another number, finite like before."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x20
    return bytes(content)


def of_another_kind(path):
    return safetensors.torch.save({"weight a": torch.zeros(2), "steps": torch.tensor(3), "rate": torch.tensor(0.1)})


def no_steps(path):
    return safetensors.torch.save({k: v for k, v in safetensors.torch.load(path.read_bytes()).items() if k != "steps"})


def something_else(path):
    return b"\x00" * 64


@pytest.mark.parametrize("damage", [cut, flipped_bit, of_another_kind, no_steps, something_else])
def test_a_damaged_file_is_named(halves, tmp_path, damage):
    path = tmp_path / "end.safetensors"
    halves[2].save(path)
    path.write_bytes(damage(path))
    with pytest.raises(AdapterError, match=r"end\.safetensors is damaged"):
        TrainingState.load(path)


def test_the_same_end_gives_the_same_bytes(halves, tmp_path):
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        halves[2].save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    kept = TrainingState.load(paths[0])
    assert kept.steps == 5
    assert all(torch.equal(kept.weights[name], value) for name, value in halves[2].weights.items())


def test_a_short_continuation_is_a_mean_with_what_it_continues(engine, examples):
    """Of nine steps four or five count; the last one alone would throw away what the mean before had smoothed."""
    lora, _, end = run(engine, examples, 8)
    longer, _, last = run(engine, examples, 1, lora, end)
    name, (before_a, before_b) = next(iter(lora.modules.items()))
    mean_a, mean_b = longer.modules[name]
    last_a, last_b = (
        next(w for n, w in last.weights.items() if name in n and kind in n) for kind in ("lora_A", "lora_B")
    )
    torch.testing.assert_close(mean_a, (3 * before_a + last_a) / 4)
    torch.testing.assert_close(mean_b, (3 * before_b + last_b) / 4)
