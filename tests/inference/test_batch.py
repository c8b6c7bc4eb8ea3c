"""A batch that becomes smaller as its answers end gives what each request gives alone."""

import shutil

import pytest
import torch
from conformance import CHAT, OTHER, TOOLS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Lfm2Config, Lfm2ForCausalLM

from agentlab import models
from agentlab.inference import Request
from agentlab.inference.decoding import SeededSampling
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.toolformat import TAGS, structure


@pytest.fixture(scope="module")
def engine(tiny_model):
    with TransformersEngine(models.resolve(str(tiny_model))) as engine:
        yield engine


requests = st.builds(
    Request,
    messages=st.sampled_from([CHAT, OTHER, [*CHAT, {"role": "assistant", "content": "."}, *OTHER]]),
    max_new_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.0, 1.5]),
    seed=st.integers(0, 9),
    stop=st.sampled_from([(), (), ("e",), ("th", "a")]),
    logprobs=st.booleans(),
    reuse_prompt=st.just(False),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(requests, min_size=2, max_size=14))
def test_each_answer_is_what_it_is_alone(engine, batch):
    together = engine.generate(batch, batch_size=len(batch))
    for request, found in zip(batch, together, strict=True):
        (alone,) = engine.generate([request])
        assert (found.text, found.token_ids, found.finish_reason) == (alone.text, alone.token_ids, alone.finish_reason)
        assert found.completion_tokens <= request.max_new_tokens
        if request.logprobs:
            torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(alone.logprobs), atol=1e-4, rtol=1e-4)
        else:
            assert found.logprobs is None


def test_structured_and_free_rows_that_end_at_different_times(engine):
    tag = structure(TOOLS, TAGS, "required")
    batch = [Request(CHAT, max_new_tokens=limit, structure=tag, reuse_prompt=False) for limit in (90, 128, 160)]
    batch += [Request(OTHER, max_new_tokens=limit, temperature=1.0, seed=limit) for limit in (1, 2, 5, 9, 60)]
    together = engine.generate(batch, batch_size=len(batch))
    for request, found in zip(batch, together, strict=True):
        (alone,) = engine.generate([request])
        assert (found.text, found.finish_reason) == (alone.text, alone.finish_reason)


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 5e-324])
def test_a_temperature_by_which_scores_would_overflow_is_greedy(engine, temperature):
    greedy, hardly = engine.generate(
        [Request(CHAT, max_new_tokens=12), Request(CHAT, max_new_tokens=12, temperature=temperature, seed=3)]
    )
    assert hardly.token_ids == greedy.token_ids
    scores = torch.tensor([[-90.0, 3.0, 90.0, 90.0001]])
    assert torch.equal(SeededSampling([temperature], [3])(None, scores), scores)


def test_an_answer_costs_nothing_after_its_end(engine):
    limits = [4] * 8 + [8] * 4 + [40] * 4
    counted = []
    hook = engine.base.register_forward_hook(lambda module, inputs, output: counted.append(output.logits.shape[0]))
    try:
        answers = engine.generate([Request(CHAT, max_new_tokens=limit) for limit in limits], batch_size=16)
    finally:
        hook.remove()
    written = [max(answer.completion_tokens, 1) for answer in answers]
    assert max(written) > 8, "the tiny model ended all answers early; choose other limits"
    # one row of the prompts' common beginning, then every row as long as its answer goes on
    assert sum(counted) <= 1 + sum(min(limit, written + 1) for limit, written in zip(limits, written, strict=True))


def test_cancelling_ends_all_rows_at_once(engine):
    calls = []

    def should_stop():
        calls.append(1)
        return len(calls) > 6

    found = list(engine.answers([Request(CHAT, max_new_tokens=40 + row) for row in range(8)], 8, should_stop))
    assert len(found) == 8
    assert {answer.finish_reason for _, answer in found} <= {"cancelled", "stop"}
    assert all(answer.completion_tokens <= 7 for _, answer in found)


def test_models_with_states_beside_keys_and_values(tiny_model, tmp_path):
    """Convolutions (LFM2) run through a prompt: rows share no beginning, and a smaller batch keeps its states."""
    config = Lfm2Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        block_multiple_of=16, layer_types=["conv", "full_attention", "conv", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    shutil.copytree(tiny_model, tmp_path / "lfm2", ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny_model / "tokenizer_config.json", tmp_path / "lfm2")
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "lfm2")
    with TransformersEngine(models.resolve(str(tmp_path / "lfm2"))) as engine:
        batch = [Request(CHAT, max_new_tokens=limit) for limit in (1, 2, 3, 5, 8, 13)]
        together = engine.generate(batch, batch_size=6)
        for request, found in zip(batch, together, strict=True):
            assert found.token_ids == engine.generate([request])[0].token_ids
        assert engine.cached_tokens(Request(CHAT)) == 0


def test_the_tokenizers_own_end_token_ends_an_answer(engine, monkeypatch):
    anew = Request(CHAT, max_new_tokens=12, reuse_prompt=False)
    tokens = engine.generate([anew])[0].token_ids
    at = next(i for i in range(2, len(tokens)) if tokens[i] not in tokens[:i])
    monkeypatch.setitem(vars(engine), "_stop_ids", frozenset({*engine._stop_ids, tokens[at]}))
    pieces = list(engine.stream(anew))
    assert pieces[-1].completion.token_ids == tokens[:at]
    assert pieces[-1].completion.finish_reason == "stop"
    assert "".join(piece.text for piece in pieces) == pieces[-1].completion.text
    seen = []
    hook = engine.base.register_forward_hook(lambda *_: seen.append(1))
    engine.generate([anew])
    hook.remove()
    assert len(seen) == at + 1
