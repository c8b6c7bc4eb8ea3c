"""What is drafted and read along changes how long one answer takes, and nothing of the answer."""

import dataclasses
import shutil

import pytest
import torch
from conformance import CHAT, OTHER, TOOLS
from engine_adapters import two_adapters
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from agentlab import models
from agentlab.inference import Request
from agentlab.inference.drafts import LEAST_ALIKE, MOST, lookup
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.toolformat import TAGS, structure

LONG = [{"role": "user", "content": "abcabcabc, then abcabd and abcabe; " * 5}]
CALL = structure(TOOLS, TAGS, "required")
REQUESTS = {
    "free": Request(CHAT, max_new_tokens=60, logprobs=True),
    "repeating": Request(LONG, max_new_tokens=60, logprobs=True),
    "one token": Request(CHAT, max_new_tokens=1, logprobs=True),
    "sampled": Request(CHAT, max_new_tokens=60, temperature=1.0, seed=3, logprobs=True),
    "stopped": Request(CHAT, max_new_tokens=60, stop=("e", "a", "o"), logprobs=True),
    "a call": Request(CHAT, max_new_tokens=128, structure=CALL, logprobs=True),
    "a call, sampled": Request(CHAT, max_new_tokens=128, structure=CALL, temperature=1.5, seed=5, logprobs=True),
    "a call with hardly room": Request(CHAT, max_new_tokens=80, structure=CALL, logprobs=True),
    "a call or words": Request(OTHER, max_new_tokens=80, structure=structure(TOOLS, TAGS, "auto"), logprobs=True),
}


@given(st.lists(st.integers(0, 3), max_size=40))
def test_what_is_looked_up_followed_the_longest_same_ending(tokens):
    found = lookup(tokens)

    def alike(end):
        return next((n for n in range(4) if n >= end or tokens[end - 1 - n] != tokens[-1 - n]), 4)

    lengths = {end: alike(end) for end in range(1, len(tokens))}
    best = max(lengths.values(), default=0)
    if best < LEAST_ALIKE:
        assert found == []
    else:
        end = max(end for end, length in lengths.items() if length == best)
        assert found == tokens[end : end + MOST]


class TestOnTheTinyModel:
    @pytest.fixture(scope="class")
    def engine(self, tiny_model):
        with TransformersEngine(models.resolve(str(tiny_model))) as engine:
            yield engine

    @pytest.fixture
    def both_ways(self, engine):
        """A request answered with drafts and by transformers' own loop, both read from the beginning."""

        def answered(request):
            found = []
            for drafts in (True, False):
                engine.drafts = drafts
                found.append(engine.generate([request])[0])
            return found

        yield answered
        engine.drafts = True

    @pytest.mark.parametrize("name", REQUESTS)
    def test_an_answer_is_the_same(self, both_ways, name):
        drafted, plain = both_ways(REQUESTS[name])
        assert (drafted.token_ids, drafted.text, drafted.finish_reason) == (
            plain.token_ids, plain.text, plain.finish_reason
        )  # fmt: skip
        assert drafted.logprobs == pytest.approx(plain.logprobs, abs=1e-4)

    def test_with_an_adapter_it_is_the_same(self, engine, both_ways, tmp_path):
        for adapter, folder in two_adapters(engine.model_files.folder, tmp_path, scale=0.3).items():
            engine.load_adapter(adapter, folder)
            drafted, plain = both_ways(dataclasses.replace(REQUESTS["repeating"], adapter=adapter))
            assert drafted.token_ids == plain.token_ids
            engine.unload_adapter(adapter)

    def test_it_takes_fewer_passes(self, engine, both_ways, monkeypatch):
        passes = []
        forward = engine.base.forward
        monkeypatch.setattr(
            engine.base, "forward", lambda *args, **options: (passes.append(1), forward(*args, **options))[1]
        )
        drafted = both_ways(REQUESTS["a call"])[0]
        with_drafts = len(passes) - len(drafted.token_ids)  # one pass for each token without
        assert with_drafts < 0.8 * len(drafted.token_ids)

    def test_what_is_kept_of_it_is_what_was_said(self, engine):
        talk = [{"role": "user", "content": "abcabcabc"}]
        for _ in range(3):
            request = Request(talk, max_new_tokens=24, reuse_prompt=True)
            (kept,) = engine.generate([request])
            (anew,) = engine.generate([dataclasses.replace(request, reuse_prompt=False)])
            assert kept.token_ids == anew.token_ids
            talk += [{"role": "assistant", "content": kept.text}, {"role": "user", "content": "abcabc"}]
        assert kept.cached_tokens > 0

    @pytest.mark.parametrize("name", REQUESTS)
    def test_a_stream_says_the_same(self, engine, name):
        *_, last = engine.stream(REQUESTS[name])
        engine.drafts = False
        try:
            *_, plain = engine.stream(REQUESTS[name])
        finally:
            engine.drafts = True
        assert last.completion.token_ids == plain.completion.token_ids

    def test_it_stops_when_it_is_told_to(self, engine):
        asked = []

        def stop():
            asked.append(1)
            return len(asked) > 5

        *_, last = engine.stream(dataclasses.replace(REQUESTS["a call"], max_new_tokens=100), stop)
        assert last.completion.finish_reason == "cancelled"
        assert len(last.completion.token_ids) < 12


@pytest.mark.parametrize("room", [0, 1, 2, 5])
def test_nothing_is_drafted_beyond_what_the_model_has_positions_for(tiny_model, tmp_path, room):
    """GPT-2 looks its positions up in a table, which has no more of them than its context."""
    shutil.copytree(tiny_model, tmp_path / "gpt2")
    for file in (tmp_path / "gpt2").glob("*.safetensors"):
        file.unlink()
    config = GPT2Config(
        vocab_size=259, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with TransformersEngine(models.resolve(str(tmp_path / "gpt2"))) as engine:
        prompt = len(engine.encode(engine.render(CHAT)))
        found = []
        for engine.drafts in (True, False):
            for seed in range(10):
                request = Request(CHAT, max_new_tokens=128 - prompt - room, temperature=0.3, seed=seed)
                found.append(engine.generate([request])[0].token_ids)
    assert found[:10] == found[10:]
    assert max(map(len, found)) == 128 - prompt - room
