"""The CPU attention and the growing cache give what transformers' own give."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from agentlab import models
from agentlab.inference import Request
from agentlab.inference.attention import attend
from agentlab.inference.cache import growing_cache
from agentlab.inference.transformers_engine import TransformersEngine


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    length=st.integers(1, 5),
    earlier=st.integers(0, 7),
    masked=st.sampled_from(["no", "boolean", "additive"]),
    seed=st.integers(0, 99),
)
def test_shared_heads_are_attended_like_repeated_ones(batch, key_heads, groups, length, earlier, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    total = length + earlier
    query = torch.randn(batch, key_heads * groups, length, 8, generator=generator)
    key, value = (torch.randn(batch, key_heads, total, 8, generator=generator) for _ in range(2))
    visible = torch.rand(batch, 1, length, total, generator=generator) > 0.3
    visible[..., 0] = True  # a query that sees nothing has no defined answer
    mask = {
        "no": None,
        "boolean": visible,
        "additive": torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min),
    }[masked]
    module = types.SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = attend(module, query, key, value, mask, scaling=0.3)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5), repeats=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_cache_holds_what_transformers_holds(lengths, repeats, seed):
    config = _config()
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = growing_cache(config), DynamicCache(config=config)
    rows = 1
    for step, length in enumerate(lengths):
        if step == 1:
            ours.batch_repeat_interleave(repeats)
            theirs.batch_repeat_interleave(repeats)
            rows = repeats
        for layer in range(2):
            key, value = (torch.randn(rows, 2, length, 4, generator=generator) for _ in range(2))
            for found, expected in zip(ours.update(key, value, layer), theirs.update(key, value, layer), strict=True):
                assert torch.equal(found, expected)
    assert ours.get_seq_length() == theirs.get_seq_length() == sum(lengths)


def _config():
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, vocab_size=8)


def test_a_sliding_window_keeps_its_own_layers():
    from transformers import MistralConfig

    layers = growing_cache(MistralConfig(sliding_window=4, num_hidden_layers=2)).layers
    assert [type(layer).__name__ for layer in layers] == ["DynamicSlidingWindowLayer"] * 2


@pytest.mark.parametrize("batch_size", [1, 8])
def test_answers_are_those_of_plain_transformers(tiny_model, batch_size):
    """Batched, with a shared beginning and padding, against one prompt after another in transformers' generate."""
    chats = [
        [{"role": "system", "content": "You always answer in the same way."}, {"role": "user", "content": "a" * n}]
        for n in (1, 9, 4, 30, 2, 17, 8, 5)
    ]
    with TransformersEngine(models.resolve(str(tiny_model))) as engine:
        found = engine.generate([Request(chat, max_new_tokens=80) for chat in chats], batch_size)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for chat, completion in zip(chats, found, strict=True):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        expected = plain.generate(**ids, max_new_tokens=80, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        assert completion.token_ids == [token for token in expected if token != tokenizer.eos_token_id]
