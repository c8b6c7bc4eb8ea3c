"""LoRA training on quantized bases, for real."""

import pytest
import torch
from learning_helpers import genome_of

from agentlab import models
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.learning import encode
from agentlab.learning.sft import train


@pytest.mark.parametrize("rung", ["bf16", "int8", "nf4", "hqq3"])
def test_inherited_weights_are_not_rounded_on_their_way_into_training(tiny_model, suite, rung):
    with TransformersEngine(models.resolve(str(tiny_model)), rung=rung) as engine:
        examples = [encode(engine, suite, item) for item in suite.split("train")[4:8]]
        start, _ = train(engine, genome_of(steps=1, dropout=0.0), None, examples)
        for a, b in start.modules.values():  # no value that 16 bits could hold
            a.mul_(1.001), b.mul_(1.001)
        lora, _ = train(engine, genome_of(steps=1, dropout=0.0, learning_rate=1e-12), start, examples)
        for name, pair in start.modules.items():
            for before, after in zip(pair, lora.modules[name], strict=True):
                torch.testing.assert_close(after, before, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("rung", ["bf16", "int8", "nf4", "hqq3"])
def test_an_adapter_is_learned_on_a_base_of_this_rung_which_stays_as_it_is(tiny_model, suite, rung):
    with TransformersEngine(models.resolve(str(tiny_model)), rung=rung) as engine:
        examples = [encode(engine, suite, item) for item in suite.split("train")[4:8]]
        ids = torch.tensor([examples[0].input_ids], device=engine.device)
        with torch.inference_mode():
            before = engine.base(ids).logits
        lora, training = train(engine, genome_of(steps=6, dropout=0.0), None, examples * 6)
        assert training.losses[-1] < training.losses[0]
        assert all(bool(b.any()) for _, b in lora.modules.values())
        assert all(b.dtype == torch.float32 for _, b in lora.modules.values())
        with torch.inference_mode():
            assert torch.equal(engine.base(ids).logits, before)
            engine.add_adapter("g000-c00", lora)
            with engine.using("g000-c00"):
                assert not torch.allclose(engine.model(ids).logits, before)
