"""The compact loss is TRL's loss."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from learning_helpers import genome_of
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainerCallback, set_seed
from trl import SFTTrainer

from agentlab import models
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.learning.sft import _undisturbed, lora_config, sft_config
from agentlab.learning.trainer import CompactSFTTrainer, packed_rows
from agentlab.learning.trouble import Attempt


class Gradients(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def run(trainer_class, engine, examples, args, callback, **more):
    """The entries of the log of a LoRA's training whose A and B are both away from zero."""
    set_seed(3)
    engine.new_adapter("candidate", lora_config(genome_of()))
    for name, value in engine.base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value.data, std=0.1, generator=torch.Generator().manual_seed(1))
    try:
        with _undisturbed(engine):
            trainer = trainer_class(
                model=engine.model,
                args=args,
                train_dataset=Dataset.from_list([vars(example) for example in examples]),
                processing_class=engine.tokenizer,
                callbacks=[callback],
                **more,
            )
            engine.activate("candidate")
            trainer.train()
        return trainer.state.log_history
    finally:
        engine.unload_adapter("candidate")


def trained_with(trainer_class, engine, examples, folder, accumulation, steps=2):
    """(losses, gradients of each step)."""
    args = sft_config(engine, str(folder), 3, Attempt(1e-3, 3, accumulation), steps, 0)
    args.max_grad_norm = 0.0  # clipping would hide a wrong scale
    gradients = Gradients()
    log = run(trainer_class, engine, examples, args, gradients)
    return [entry["loss"] for entry in log if "loss" in entry], gradients.seen


def assert_equal(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert len(one[1]) == len(other[1]) == 2
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(value.abs().max() > 0 for value in theirs.values())
        for name, value in mine.items():
            assert torch.allclose(value, theirs[name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_and_gradients_are_trls(engine, examples, tmp_path, accumulation):
    lengths = {len(example.input_ids) for example in examples}
    assert len(lengths) > 1  # padding takes part
    assert len({sum(example.completion_mask) for example in examples}) > 1  # and unequal numbers of counted tokens
    compact = trained_with(CompactSFTTrainer, engine, examples, tmp_path, accumulation)
    assert_equal(compact, trained_with(SFTTrainer, engine, examples, tmp_path, accumulation))


def rows_of(*rows, width):
    """(ids, mask, labels) padded on the right; a row is (prompt tokens, answer tokens)."""
    ids = torch.tensor([p + a + [0] * (width - len(p + a)) for p, a in rows])
    mask = torch.tensor([[1] * len(p + a) + [0] * (width - len(p + a)) for p, a in rows])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p + a)) for p, a in rows])
    return ids, mask, labels


def test_packed_rows_see_the_beginning_and_themselves():
    start = list(range(100, 120))
    packed = packed_rows(*rows_of(([*start, 1, 2], [3]), ([*start, 4], [5, 6]), width=24), torch.float32)
    labels, inputs = packed
    assert inputs["input_ids"].tolist() == [[*start, 1, 2, 3, 4, 5, 6]]
    assert labels.tolist() == [[-100] * 22 + [3, -100, 5, 6]]
    assert inputs["position_ids"].tolist() == [[*range(20), 20, 21, 22, 20, 21, 22]]
    visible = inputs["attention_mask"][0, 0] == 0
    assert visible[22].tolist() == [True] * 23 + [False] * 3
    assert visible[25].tolist() == [True] * 20 + [False] * 3 + [True] * 3
    assert not visible[:20].triu(1).any()


def test_rows_with_little_in_common_or_a_label_on_it_are_not_packed():
    start = list(range(100, 120))
    assert packed_rows(*rows_of((start, [3]), width=24), torch.float32) is None
    assert packed_rows(*rows_of(([*start[:10], 1], [3]), ([*start[:10], 2], [3]), width=24), torch.float32) is None
    assert packed_rows(*rows_of((start[:8], [*range(20)]), (start[:8], [*range(21)]), width=32), torch.float32) is None


def test_the_examples_of_the_equality_tests_are_packed(examples):
    width = max(len(example.input_ids) for example in examples)
    parts = [(e.input_ids[: -sum(e.completion_mask)], e.input_ids[-sum(e.completion_mask) :]) for e in examples[:3]]
    assert packed_rows(*rows_of(*parts, width=width), torch.float32) is not None


def test_compact_loss_is_what_runs_on_a_plain_model(engine, examples, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("TRL's own loss was called")

    monkeypatch.setattr(SFTTrainer, "compute_loss", fail)
    losses, _ = trained_with(CompactSFTTrainer, engine, examples, tmp_path, 1, steps=1)
    assert len(losses) == 1


@pytest.fixture(scope="module")
def softcapped(tiny_model, tmp_path_factory):
    """A tiny Gemma 2, whose logits are squashed after the projection."""
    folder = tmp_path_factory.mktemp("gemma")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=512,
        final_logit_softcapping=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    with TransformersEngine(models.resolve(str(folder))) as engine:
        yield engine


def test_a_softcapped_model_falls_back_to_trls_loss(softcapped, examples, tmp_path):
    compact = trained_with(CompactSFTTrainer, softcapped, examples, tmp_path, 2)
    assert_equal(compact, trained_with(SFTTrainer, softcapped, examples, tmp_path, 2))
    # logits within ±0.5 cannot be far from uniform over 259 tokens; without the cap they are
    assert all(abs(loss - 5.557) < 1.0 for loss in compact[0])
    config = softcapped.base.config
    config.final_logit_softcapping = None
    try:
        uncapped = trained_with(CompactSFTTrainer, softcapped, examples, tmp_path, 2)
    finally:
        config.final_logit_softcapping = 0.5
    assert abs(uncapped[0][0] - compact[0][0]) > 0.1


class FirstStep(TrainerCallback):
    """How far each weight goes in Adam's first step, which is of full size: the learning rate of its group."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model=None, **_):
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    def moved(self):
        first, second = self.seen
        return {name: float((second[name] - value).abs().median()) for name, value in first.items()}


@pytest.mark.parametrize(("ratio", "rate_of_a", "rate_of_b"), [(1.0, 1e-3, 1e-3), (4.0, 0.5e-3, 2e-3)])
def test_b_is_trained_so_many_times_faster_than_a(engine, examples, tmp_path, ratio, rate_of_a, rate_of_b):
    args, first = sft_config(engine, str(tmp_path), 3, Attempt(1e-3, 4, 1), 2, 0, steady=True), FirstStep()
    run(CompactSFTTrainer, engine, examples, args, first, loraplus_ratio=ratio)
    moved = first.moved()
    assert {"lora_A" in name for name in moved} == {True, False}
    for name, step in moved.items():
        assert step == pytest.approx(rate_of_a if "lora_A" in name else rate_of_b, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_gpu_of_several_trains_in_the_models_own_type(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    engine = SimpleNamespace(device="cuda", base=SimpleNamespace(dtype=dtype))
    config = sft_config(engine, str(tmp_path), 3, Attempt(1e-3, 4), 2, 0)
    assert (config.n_gpu, config.bf16, config.fp16) == (1, False, dtype == torch.float16)
