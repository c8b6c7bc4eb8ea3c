"""Real training on the tiny model."""

import math

import pytest
import torch
from learning_helpers import genome_of

from agentlab.errors import EvolutionStopped
from agentlab.inference import Request
from agentlab.learning import TrainingFailed
from agentlab.learning.sft import train
from agentlab.learning.trainer import CompactSFTTrainer
from agentlab.learning.trouble import DIVERGED_NATS

CHAT = [{"role": "user", "content": "tree 5"}]


def answers(engine, adapter=None):
    """What a person would get, with the log-probabilities to the last bit."""
    requests = [Request(CHAT, adapter=adapter, max_new_tokens=8, logprobs=True)] * 2
    return [(answer.text, answer.token_ids, answer.logprobs) for answer in engine.generate(requests)]


def snapshot(engine):
    return {
        "weights": {name: value.clone() for name, value in engine.base.state_dict().items()},
        "answers": answers(engine),
        "use_cache": engine.base.config.use_cache,
        "hooks": "forward" in vars(engine.base),
        "training": engine.base.training,
        "trainable": [name for name, value in engine.base.named_parameters() if value.requires_grad],
        "adapters": engine.adapters(),
    }


def assert_same(before, after):
    weights, expected = after.pop("weights"), dict(before)
    original = expected.pop("weights")
    assert list(weights) == list(original)
    assert all(torch.equal(weights[name], original[name]) for name in weights)
    assert after == expected


@pytest.fixture
def clean(engine):
    """Whatever happens to the candidate, the engine is what it was."""
    before = snapshot(engine)
    assert before["adapters"] == before["trainable"] == []
    assert not before["hooks"]
    yield
    assert_same(before, snapshot(engine))


def same_weights(one, other):
    return all(
        torch.equal(a, b) for name in one.modules for a, b in zip(one.modules[name], other.modules[name], strict=True)
    )


def base_loss(engine, examples):
    """Mean negative log-likelihood of the completion tokens, one example at a time, without padding."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for example in examples:
            ids = torch.tensor([example.input_ids], device=engine.device)
            logprobs = engine.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = logprobs.gather(1, ids[0, 1:, None]).squeeze(1)
            mask = torch.tensor(example.completion_mask[1:], dtype=torch.bool)
            total, count = total - float(picked[mask].sum()), count + int(mask.sum())
    return total / count


def test_loss_falls_and_the_engine_is_left_as_it_was(engine, examples, clean):
    events = []
    genome = genome_of(steps=40, batch_size=8, learning_rate=2e-2)
    lora, training = train(engine, genome, None, examples * 40, emit=events.append)
    assert len(training.losses) == 40
    assert training.losses[-1] < training.losses[0] / 2
    assert (lora.rank, lora.alpha, lora.target_modules) == (4, 8.0, sorted(genome.target_modules))
    assert len(lora.modules) == 2 * 4  # two layers
    assert [event.step for event in events] == list(range(1, 41))
    assert [event.loss for event in events] == training.losses
    assert all(event.steps == 40 and event.candidate == "g000-c00" for event in events)
    assert events[-1].tokens == training.train_tokens == 40 * sum(len(example.input_ids) for example in examples)
    assert training.train_seconds > 0
    assert training.remedies == []


def test_trained_weights_answer_better_than_the_base(engine, examples, clean):
    lora, _ = train(engine, genome_of(steps=40, batch_size=8, learning_rate=2e-2), None, examples * 40)
    before = base_loss(engine, examples)
    engine.add_adapter("g000-c00", lora)
    with engine.using("g000-c00"):
        after = base_loss(engine, examples)
    engine.unload_adapter("g000-c00")
    assert after < before / 2


def test_a_fresh_lora_starts_at_the_bases_own_loss(engine, examples, clean):
    genome = genome_of(steps=1, batch_size=8, learning_rate=1e-9)
    _, training = train(engine, genome, None, examples)
    assert training.losses == [pytest.approx(base_loss(engine, examples), abs=1e-4)]


def test_another_adapter_in_the_engine_answers_as_before(engine, examples):
    other, _ = train(engine, genome_of(seed=1), None, examples * 2)
    engine.add_adapter("g000-c09", other)
    try:
        before, base = answers(engine, "g000-c09"), answers(engine)
        train(engine, genome_of(seed=2), None, examples * 2)
        assert engine.adapters() == ["g000-c09"]
        assert answers(engine, "g000-c09") == before
        assert answers(engine) == base
        assert same_weights(engine.read_adapter("g000-c09"), other)
    finally:
        engine.unload_adapter("g000-c09")


def test_the_seed_decides_the_weights(engine, examples, clean):
    genome = genome_of(dropout=0.1)
    one, first = train(engine, genome, None, examples * 2)
    torch.rand(7)  # what the process drew before does not matter
    two, second = train(engine, genome, None, examples * 2)
    other, third = train(engine, genome_of(dropout=0.1, seed=6), None, examples * 2)
    assert same_weights(one, two)
    assert first.losses == second.losses != third.losses
    assert not same_weights(one, other)


def test_a_warm_start_continues_where_the_parent_ended(engine, examples, clean):
    genome = genome_of(steps=20, batch_size=8, learning_rate=2e-2)
    parent, first = train(engine, genome, None, examples * 20)
    untouched = [(a.clone(), b.clone()) for a, b in parent.modules.values()]
    child, second = train(engine, genome_of(steps=2, batch_size=8, learning_rate=1e-3), parent, examples * 2)
    assert second.losses[0] < first.losses[0] / 2
    assert second.losses[0] == pytest.approx(first.losses[-1], abs=0.3)
    assert not same_weights(child, parent)
    assert all(torch.equal(a, c) for (a, _), (c, _) in zip(untouched, parent.modules.values(), strict=True))


@pytest.mark.parametrize(("average", "counted"), [(0.0, 1), (0.2, 1), (0.5, 2), (1.0, 4)])
def test_the_weights_of_the_last_steps_are_averaged(engine, examples, clean, average, counted):
    passed = []

    def look():
        passed.append(engine.read_adapter("candidate"))
        return False

    lora, _ = train(engine, genome_of(), None, examples * 2, average=average, should_stop=look)
    assert len(passed) == 4
    for name, pair in lora.modules.items():
        for which, weights in enumerate(pair):
            mean = torch.stack([one.modules[name][which] for one in passed[-counted:]]).mean(0)
            torch.testing.assert_close(weights, mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("average", "expected"), [(0.0, [1e-2, 7.5e-3, 5e-3, 2.5e-3]), (0.5, [1e-2] * 4)])
def test_the_rate_falls_to_zero_unless_weights_are_averaged(engine, examples, clean, monkeypatch, average, expected):
    rates = []
    monkeypatch.setattr("agentlab.learning.sft.CompactSFTTrainer", rates_into(rates))
    train(engine, genome_of(), None, examples * 2, average=average, warmup_steps=0)
    assert rates == pytest.approx(expected)


def rates_into(found):
    """TRL's trainer, which writes the learning rate of each step down."""

    class Recording(CompactSFTTrainer):
        def log(self, logs, *arguments, **named):
            if "learning_rate" in logs:
                found.append(logs["learning_rate"])
            super().log(logs, *arguments, **named)

    return Recording


@pytest.fixture
def parent(engine, examples):
    """Weights at a low loss, which a large learning rate throws away in one step; a fresh LoRA has little to lose."""
    lora, training = train(engine, genome_of(steps=40, batch_size=8, learning_rate=2e-2), None, examples * 40)
    assert training.losses[-1] < 2
    return lora


def test_divergence_is_met_with_lower_rates(engine, examples, clean, parent):
    events = []
    genome = genome_of(steps=8, learning_rate=1.0)
    _, training = train(engine, genome, parent, examples * 4, warmup_steps=0, max_remedies=9, emit=events.append)
    remedies = [event for event in events if event.kind == "remedy_applied"]
    assert remedies
    assert all(event.problem == "divergence" for event in remedies)
    assert [event.learning_rate for event in remedies] == [0.25 ** (k + 1) for k in range(len(remedies))]
    assert [remedy["action"] for remedy in training.remedies] == [event.action for event in remedies]
    assert len(training.losses) == 8  # of the attempt that succeeded
    assert max(training.losses) <= training.losses[0] + DIVERGED_NATS


def test_divergence_without_remedies_is_a_failure(engine, examples, clean, parent):
    with pytest.raises(TrainingFailed, match=r"divergence: loss rose from .* at step [23] \(after 0 remedies\)"):
        train(engine, genome_of(steps=8, learning_rate=1.0), parent, examples * 4, warmup_steps=0, max_remedies=0)


def test_weights_that_are_no_numbers_fail_after_every_remedy(engine, examples, clean):
    start, _ = train(engine, genome_of(steps=1), None, examples)
    name, (a, b) = next(iter(start.modules.items()))
    start.modules[name] = (a, torch.full_like(b, math.nan))
    events = []
    with pytest.raises(TrainingFailed, match=r"nan: loss is nan at step 1 \(after 2 remedies\)"):
        train(engine, genome_of(), start, examples * 2, max_remedies=2, emit=events.append)
    assert [(event.problem, event.learning_rate) for event in events] == [("nan", 2.5e-3), ("nan", 6.25e-4)]


def scarce(monkeypatch, error, largest):
    """A device on which only batches of up to `largest` fit: nothing here can be made to run out for real."""
    real, sizes = CompactSFTTrainer.train, []

    def attempt(self, *args, **kwargs):
        sizes.append((self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps))
        if sizes[-1][0] > largest:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(CompactSFTTrainer, "train", attempt)
    return sizes


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory\nmore"), MemoryError()],
    ids=["type", "message", "silent"],
)
def test_out_of_memory_halves_the_batch_and_learns_the_same(engine, examples, monkeypatch, clean, error):
    whole, undisturbed = train(engine, genome_of(), None, examples * 2)
    sizes, events = scarce(monkeypatch, error, largest=2), []
    lora, training = train(engine, genome_of(), None, examples * 2, emit=events.append)
    assert sizes == [(4, 1), (2, 2)]
    assert [event.problem for event in events if event.kind == "remedy_applied"] == ["out_of_memory"]
    assert training.remedies[0]["action"] == "batch of 2 with 2 accumulated"
    assert training.losses == pytest.approx(undisturbed.losses, abs=1e-3)
    for name, (a, b) in whole.modules.items():
        assert torch.allclose(lora.modules[name][0], a, atol=1e-3)
        assert torch.allclose(lora.modules[name][1], b, atol=1e-3)


def test_out_of_memory_with_a_single_item_meets_every_remedy_and_then_fails(engine, examples, monkeypatch, clean):
    attempts, events = [], []

    def never(self, *args, **kwargs):
        longest = max(len(row["input_ids"]) for row in self.train_dataset)
        options = self.args
        attempts.append((options.per_device_train_batch_size, options.gradient_checkpointing, longest))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CompactSFTTrainer, "train", never)
    with pytest.raises(TrainingFailed, match=r"out_of_memory: CUDA out of memory \(after 5 remedies\)"):
        train(engine, genome_of(), None, examples * 2, emit=events.append)
    whole = max(len(example.input_ids) for example in examples)
    assert attempts[:4] == [(4, False, whole), (2, False, whole), (1, False, whole), (1, True, whole)]
    assert [attempt[:2] for attempt in attempts[4:]] == [(1, True)] * 2
    assert whole > attempts[4][2] > attempts[5][2]
    told = " ".join(event.message for event in events if event.kind == "warned")
    assert all(f"longer than {longest} tokens are left out" in told for *_, longest in attempts[4:])


def kept_bytes(limit, seen):
    """A fake limit on what autograd keeps: torch's own hooks count each saved tensor, and refuse what is too much."""
    held = {"now": 0}

    def pack(tensor):
        held["now"] += tensor.numel() * tensor.element_size()
        seen.append(held["now"])
        if held["now"] > limit:
            held["now"] = 0
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 byte")
        return tensor

    def unpack(tensor):
        held["now"] -= tensor.numel() * tensor.element_size()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def test_checkpointing_trains_where_the_activations_of_one_item_do_not_fit(engine, examples, clean):
    with kept_bytes(10**12, peak := []):
        whole, undisturbed = train(engine, genome_of(batch_size=1, steps=2), None, examples[:2])
    events = []
    with kept_bytes(max(peak) // 2, []):
        lora, training = train(engine, genome_of(batch_size=1, steps=2), None, examples[:2], emit=events.append)
    assert [remedy["action"] for remedy in training.remedies] == ["gradient checkpointing"]
    assert training.losses == pytest.approx(undisturbed.losses, abs=1e-3)
    for name, (a, b) in whole.modules.items():
        assert torch.allclose(lora.modules[name][0], a, atol=1e-3)
        assert torch.allclose(lora.modules[name][1], b, atol=1e-3)
    assert not engine.base.is_gradient_checkpointing
    assert not engine.base.get_input_embeddings()._forward_hooks


def test_other_errors_are_not_hidden(engine, examples, monkeypatch, clean):
    scarce(monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), largest=0)
    with pytest.raises(RuntimeError, match="mat1"):
        train(engine, genome_of(), None, examples)


def test_a_stop_request_ends_training_at_the_next_step(engine, examples, clean):
    events = []
    with pytest.raises(EvolutionStopped, match="stopped while training g000-c00"):
        train(engine, genome_of(), None, examples * 2, emit=events.append, should_stop=lambda: len(events) >= 1)
    assert len(events) <= 2


def test_long_items_are_left_out_with_a_warning(engine, examples, clean):
    lengths = sorted(len(example.input_ids) for example in examples)
    limit = lengths[3]
    left = sum(length > limit for length in lengths)
    assert 0 < left < 8
    events = []
    _, training = train(engine, genome_of(steps=2), None, examples, max_length=limit, emit=events.append)
    assert events[0].message == f"g000-c00: {left} items longer than {limit} tokens are left out"
    assert training.train_tokens == sum(length for length in lengths if length <= limit)
    with pytest.raises(TrainingFailed, match=r"every training item is longer than training.max_length = 16 tokens"):
        train(engine, genome_of(), None, examples, max_length=16)
