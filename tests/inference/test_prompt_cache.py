"""What an engine has read is not read again, and the answer is the same."""

import pytest
import torch
from conformance import CHAT, OTHER, TOOLS
from engine_adapters import two_adapters
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PretrainedConfig

from agentlab import models
from agentlab.hardware.ledger import KV_ROOM_TOKENS
from agentlab.inference import OutOfMemoryError, Request
from agentlab.inference.cache import growing_cache, room_of
from agentlab.inference.prompt_cache import LEAST_TOKENS, MOST_TALKS, PromptCache
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.toolformat import TAGS, structure


def _cache():
    config = PretrainedConfig(num_hidden_layers=2)
    return growing_cache(config)


def _read(cache, tokens):
    """Read tokens into a cache whose keys and values are the tokens themselves."""
    values = torch.tensor(tokens, dtype=torch.float32).reshape(1, 1, -1, 1)
    for number in range(2):
        cache.update(values + number, -values - number, number)


def _holds(cache):
    found = cache.layers[0].keys.flatten().tolist()
    for number, layer in enumerate(cache.layers):
        assert [key - number for key in layer.keys.flatten().tolist()] == found
        assert [-value - number for value in layer.values.flatten().tolist()] == found
    return [int(token) for token in found]


talk = st.tuples(
    st.sampled_from(["a", None]), st.sampled_from([0, 5, 20, 60]), st.lists(st.integers(0, 2), max_size=70)
)


@settings(max_examples=150, deadline=None)
@given(talks=st.lists(talk, max_size=9), room=st.integers(0, 300))
def test_what_is_taken_is_the_prompts_own_beginning(talks, room):
    prompts = PromptCache()
    for adapter, begin, rest in talks:
        prompt = [*range(100, 100 + begin), *rest, 7]
        known = prompts.known(adapter, prompt)
        cache = prompts.take(adapter, prompt)
        assert known == (0 if cache is None else cache.get_seq_length())
        assert known == 0 or LEAST_TOKENS <= known < len(prompt)
        if cache is None:
            cache = _cache()
        elif known:
            assert _holds(cache) == prompt[:known]
        _read(cache, prompt[known:])
        _read(cache, [8, 9])  # an answer
        prompts.keep(adapter, [*prompt, 8, 9, 2], cache)  # the last token is never read
        assert len(prompts) <= MOST_TALKS
        for kept in prompts._talks:  # a beginning that was copied does not change when its talk goes on
            assert _holds(kept.cache) == kept.tokens
    prompts.make_room(room)
    assert prompts.tokens <= room


def test_a_cache_that_cannot_be_cut_is_not_kept():
    prompts = PromptCache()
    cache = DynamicCache()
    _read(cache, list(range(40)))
    prompts.keep(None, list(range(40)), cache)
    assert len(prompts) == 0


@pytest.fixture(scope="module")
def engine(tiny_model):
    with TransformersEngine(models.resolve(str(tiny_model))) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapters(engine, tmp_path_factory):
    return two_adapters(engine.model_files.folder, tmp_path_factory.mktemp("adapters"), scale=0.3)


@pytest.fixture(autouse=True)
def _forget(engine):
    engine._prompts.clear()
    yield
    for adapter in list(engine.adapters()):
        engine.unload_adapter(adapter)


def _ask(engine, messages, **options):
    return engine.generate([Request(messages, max_new_tokens=8, logprobs=True, **options)])[0]


def _same(one, two):
    assert one.token_ids == two.token_ids
    torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(two.logprobs), atol=1e-4, rtol=1e-4)


def _bytes(cache):
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))


def _talk(text="And lakes?"):
    return [*CHAT, {"role": "assistant", "content": "Rivers run."}, {"role": "user", "content": text}]


def test_a_talk_that_goes_on_is_answered_as_if_it_were_read_anew(engine):
    assert _ask(engine, CHAT).cached_tokens == 0
    for messages in (CHAT, _talk(), _talk("And seas?"), OTHER, _talk()):
        expected = engine.cached_tokens(Request(messages))
        again = _ask(engine, messages)
        assert again.cached_tokens == expected
        assert again.prompt_tokens == engine.count_tokens(messages)
        anew = _ask(engine, messages, reuse_prompt=False)
        assert anew.cached_tokens == 0
        _same(again, anew)
    assert expected > LEAST_TOKENS


@pytest.mark.parametrize("rung", ["fp32", "nf4"])
def test_each_adapter_reads_for_itself(adapters, tiny_model, rung):
    with TransformersEngine(models.resolve(str(tiny_model)), rung=rung) as mine:
        for adapter, folder in adapters.items():
            mine.load_adapter(adapter, folder)
        anew = {name: _ask(mine, _talk(), adapter=name, reuse_prompt=False) for name in (None, *adapters)}
        mine._prompts.clear()
        for name in (None, *adapters, None, *adapters):
            known = mine.cached_tokens(Request(_talk(), adapter=name))
            _same(_ask(mine, _talk(), adapter=name), anew[name])
        assert known
        first, second = adapters
        mine.load_adapter(first, adapters[second])  # another one under its name
        assert mine.cached_tokens(Request(_talk(), adapter=first)) == 0
        _same(_ask(mine, _talk(), adapter=first), anew[second])


def test_streams_structures_and_cancelled_answers_share_it(engine):
    tools = structure(TOOLS, TAGS, "required")
    anew = engine.generate([Request(_talk(), max_new_tokens=128, structure=tools, reuse_prompt=False)])[0]
    for piece in engine.stream(Request(CHAT, max_new_tokens=30), should_stop=lambda: True):
        last = piece.completion
    assert last.finish_reason == "cancelled"
    again = engine.generate([Request(_talk(), max_new_tokens=128, structure=tools)])[0]
    assert again.cached_tokens > LEAST_TOKENS
    assert (again.text, again.finish_reason) == (anew.text, anew.finish_reason)


def test_it_never_takes_more_than_one_context_and_gives_way(engine, adapters):
    name, folder = next(iter(adapters.items()))
    engine.load_adapter(name, folder)
    _ask(engine, CHAT)
    (talk,) = engine._prompts._talks
    per_token = _bytes(talk.cache) / room_of(talk.cache)
    for number in range(12):
        long = [{"role": "user", "content": f"{number} " * (8 * number)}]
        limit = 8
        room = engine.context_length() - engine.count_tokens(long) - limit
        kept = []
        taken = engine._prompts.make_room
        engine._prompts.make_room = lambda tokens: kept.append((tokens, taken(tokens), engine._prompts.tokens))  # noqa: B023
        _ask(engine, long, adapter=name if number % 2 else None)
        del engine._prompts.make_room
        assert kept[0][0] == room
        assert kept[0][2] <= room
        held = sum(_bytes(talk.cache) for talk in engine._prompts._talks)
        assert held <= (engine.context_length() + KV_ROOM_TOKENS) * per_token
    assert len(engine._prompts)
    engine.generate([Request(CHAT, max_new_tokens=2), Request(OTHER, max_new_tokens=2)])
    assert len(engine._prompts) == 0  # a batch gets the memory
    _ask(engine, CHAT)
    engine._collect()
    assert len(engine._prompts) == 0


def test_a_long_talk_that_goes_on_is_not_dropped_for_its_own_sake(engine):
    long = [{"role": "user", "content": "river " * 55}]
    assert engine.count_tokens(long) > engine.context_length() / 2
    _ask(engine, long)
    assert _ask(engine, [*long, {"role": "assistant", "content": "."}, *CHAT]).cached_tokens > 300


def test_what_several_requests_are_answered_depends_on_no_earlier_one(engine):
    _ask(engine, CHAT)
    found = dict(engine.answers([Request(CHAT, max_new_tokens=2)] * 2, batch_size=1))
    assert [found[row].cached_tokens for row in range(2)] == [0, 0]
    _ask(engine, OTHER, reuse_prompt=False)
    assert len(engine._prompts) == 1  # and nothing is left of them
    assert engine.cached_tokens(Request(OTHER)) == 0


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_lack_of_memory_is_met_with_what_is_kept_first(engine, monkeypatch, way):
    def answer():
        request = Request(OTHER, max_new_tokens=3)
        return engine.generate([request])[0] if way == "generate" else list(engine.stream(request))[-1].completion

    _ask(engine, CHAT)
    batch, held = engine._batch, []

    def full(*args):
        held.append(len(engine._prompts))
        if held[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch(*args)

    monkeypatch.setattr(engine, "_batch", full)
    assert answer().completion_tokens > 0
    assert held == [1, 0]
    monkeypatch.setattr(engine, "_batch", lambda *args: full(*args) if len(engine._prompts) else _fail())
    with pytest.raises((torch.OutOfMemoryError, OutOfMemoryError)):
        answer()


def _fail():
    raise torch.OutOfMemoryError("CUDA out of memory")
