"""What every engine must do; subclass `EngineConformance` and give it an `engine` fixture and two adapter folders.

The engine is loaded once per class. `adapters` maps two ids to PEFT folders that change the base model's answers.
What an engine says it cannot do, it has to refuse.
"""

import contextlib
import dataclasses
import threading

import pytest

from agentlab import adapters as adapter_room
from agentlab.errors import AdapterError
from agentlab.inference import EngineError, Request
from agentlab.inference.contract import LimitTooSmallError
from agentlab.toolformat import TAGS, parse_calls, structure, validate

CHAT = [{"role": "user", "content": "Say something about rivers."}]
OTHER = [{"role": "user", "content": "Count from one to ten, please, in words, and then stop."}]
TOOLS = [
    {
        "name": "rivers.length",
        "description": "Length of a river in km",
        "parameters": {"type": "object", "properties": {"river": {"type": "string"}}, "required": ["river"]},
    },
    {
        "name": "count",
        "description": "Count in steps",
        "parameters": {
            "type": "object",
            "properties": {
                "numbers": {"type": "array", "items": {"type": "integer"}},
                "words": {"type": "array", "items": {"type": "string"}},
                "order": {"enum": ["up", "down"]},
                "pace": {"type": "number"},
            },
            "required": ["numbers", "words", "order"],
        },
    },
]


def is_one_call(text, style, tools=TOOLS):
    calls = parse_calls(text, style)
    return len(calls) == 1 and any(not validate(calls[0], tool) for tool in tools)


def _long(words):
    return [{"role": "user", "content": "word " * words}]


def keeps_structure(engine):
    """Whether the engine answers under structures; one that does not must refuse them."""
    if engine.capabilities().structure:
        return True
    with pytest.raises(EngineError, match="structure"):
        engine.generate([Request(CHAT, max_new_tokens=128, structure=structure(TOOLS, TAGS, "required"))])
    return False


class EngineConformance:
    @pytest.fixture(autouse=True)
    def _clean(self, engine):
        yield
        for adapter in list(engine.adapters()):
            engine.unload_adapter(adapter)

    def test_answers_keep_the_requests_order_whatever_the_batches(self, engine):
        requests = [Request(chat, max_new_tokens=n) for n in (3, 5, 8) for chat in (CHAT, OTHER)]
        together = engine.generate(requests, batch_size=6)
        for size in (1, 4):
            for one, other in zip(engine.generate(requests, batch_size=size), together, strict=True):
                assert one.token_ids == other.token_ids
        assert [c.completion_tokens <= r.max_new_tokens for c, r in zip(together, requests, strict=True)] == [True] * 6

    def test_limit_is_exact_and_named(self, engine):
        (completion,) = engine.generate([Request(OTHER, max_new_tokens=4)])
        assert completion.completion_tokens <= 4
        assert completion.finish_reason == ("length" if completion.completion_tokens == 4 else "stop")
        assert completion.latency_s > 0
        assert completion.prompt_tokens == engine.count_tokens(OTHER)

    def test_no_requests_no_answers(self, engine):
        assert engine.generate([]) == []

    def test_greedy_is_repeatable(self, engine):
        first, second = (engine.generate([Request(CHAT, max_new_tokens=12)])[0] for _ in range(2))
        assert first.token_ids == second.token_ids

    def test_sampling_depends_on_the_seed_alone(self, engine):
        def sampled(seed, neighbours):
            requests = [Request(CHAT, max_new_tokens=12, temperature=1.5, seed=seed)]
            requests += [Request(OTHER, max_new_tokens=12, temperature=1.0, seed=99 + i) for i in range(neighbours)]
            return engine.generate(requests)[0].token_ids

        assert sampled(1, 0) == sampled(1, 3)
        assert len({tuple(sampled(seed, 0)) for seed in range(6)}) > 1

    def test_stop_string_ends_the_answer_before_it(self, engine):
        (whole,) = engine.generate([Request(CHAT, max_new_tokens=16)])
        stop = whole.text[5:7]
        (cut,) = engine.generate([Request(CHAT, max_new_tokens=16, stop=(stop,))])
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.finish_reason == "stop"
        assert cut.completion_tokens <= whole.completion_tokens

    def test_logprobs_one_per_token_and_negative(self, engine):
        (completion,) = engine.generate([Request(CHAT, max_new_tokens=6, logprobs=True)])
        assert completion.logprobs is not None
        assert len(completion.logprobs) == completion.completion_tokens
        assert all(value <= 1e-4 for value in completion.logprobs)
        (without,) = engine.generate([Request(CHAT, max_new_tokens=6)])
        assert without.logprobs is None
        assert without.token_ids == completion.token_ids

    def test_stream_is_the_completion_in_pieces(self, engine):
        request = Request(CHAT, max_new_tokens=12)
        chunks = list(engine.stream(request))
        (whole,) = engine.generate([request])
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert chunks[-1].completion is not None
        assert chunks[-1].completion.token_ids == whole.token_ids
        assert all(chunk.completion is None for chunk in chunks[:-1])

    def test_stream_with_stop_string_never_shows_it(self, engine):
        (whole,) = engine.generate([Request(CHAT, max_new_tokens=16)])
        stop = whole.text[6:9]
        text = "".join(chunk.text for chunk in engine.stream(Request(CHAT, max_new_tokens=16, stop=(stop,))))
        assert text == whole.text[: whole.text.index(stop)]

    def test_the_first_of_several_stop_strings_ends_the_answer(self, engine):
        (whole,) = engine.generate([Request(CHAT, max_new_tokens=16)])
        early, late = whole.text[4:6], whole.text[9:12]
        (cut,) = engine.generate([Request(CHAT, max_new_tokens=16, stop=(late, early))])
        assert cut.text == whole.text[: min(whole.text.index(early), whole.text.index(late))]

    def test_a_sampled_answer_streams_as_it_is_generated(self, engine, adapters):
        adapter, folder = next(iter(adapters.items()))
        engine.load_adapter(adapter, folder)
        for name in (None, adapter):
            request = Request(CHAT, adapter=name, max_new_tokens=10, temperature=1.0, seed=5, logprobs=True)
            *_, last = engine.stream(request)
            (whole,) = engine.generate([request])
            assert last.completion.token_ids == whole.token_ids
            assert last.completion.logprobs == pytest.approx(whole.logprobs, abs=1e-3)

    def test_a_stream_can_be_cancelled(self, engine):
        chunks = []
        for chunk in engine.stream(Request(CHAT, max_new_tokens=200), lambda: len(chunks) >= 2):
            chunks.append(chunk)
        assert chunks[-1].completion.finish_reason in ("cancelled", "stop")
        assert chunks[-1].completion.completion_tokens < 200
        assert "".join(chunk.text for chunk in chunks) == chunks[-1].completion.text

    def test_an_abandoned_batch_leaves_the_engine_usable(self, engine):
        (alone,) = engine.generate([Request(OTHER, max_new_tokens=4)])
        answers = engine.answers([Request(CHAT, max_new_tokens=n) for n in (2, 60, 60)], batch_size=1)
        next(answers)
        answers.close()
        assert engine.generate([Request(OTHER, max_new_tokens=4)])[0].token_ids == alone.token_ids

    def test_prompt_and_answer_may_fill_the_context_and_no_more(self, engine):
        room = engine.context_length() - engine.count_tokens(CHAT)
        with pytest.raises(EngineError, match="context"):
            engine.generate([Request(CHAT, max_new_tokens=room + 1)])
        stop = engine.generate([Request(CHAT, max_new_tokens=8)])[0].text[2:4]
        assert engine.generate([Request(CHAT, max_new_tokens=room, stop=(stop,))])[0].finish_reason == "stop"

    def test_an_answer_that_fills_the_context_keeps_its_log_probabilities(self, engine):
        if not keeps_structure(engine):
            return
        limit_context = getattr(engine, "limit_context", lambda tokens: None)
        limit_context(
            min(1024, engine.context_length())
        )  # where that is possible: a long prompt takes a minute to read
        try:
            self._fill(engine)
        finally:
            limit_context(None)

    def _fill(self, engine):
        tag = structure(TOOLS, engine.call_style() or TAGS, "required")
        empty, ten = (engine.count_tokens(_long(words)) for words in (0, 10))
        words, answers = 10 * (engine.context_length() - empty) // (ten - empty) + 1, []
        while not answers:  # down to a room in which the shortest call just fits, so that the answer ends at its limit
            words -= 1
            if (room := engine.context_length() - engine.count_tokens(_long(words))) > 0:
                with contextlib.suppress(LimitTooSmallError):
                    request = Request(_long(words), max_new_tokens=room, structure=tag, logprobs=True)
                    answers = engine.generate([request])
        assert answers[0].completion_tokens == room
        assert len(answers[0].logprobs) == room

    def test_what_it_says_it_can_do_agrees_with_what_it_does(self, engine):
        can = engine.capabilities()
        assert can.tools == (engine.call_style() is not None)
        assert can.adapters
        assert engine.parameters() >= 0
        assert engine.planned_vram_mib(4, 128) >= 0
        assert engine.vram_peak_mib() >= 0

    def test_abandoned_stream_leaves_the_engine_usable(self, engine):
        stream = engine.stream(Request(CHAT, max_new_tokens=64))
        next(stream)
        stream.close()
        assert engine.generate([Request(CHAT, max_new_tokens=2)])[0].prompt_tokens > 0

    def test_cancelling_ends_running_requests_and_leaves_out_the_rest(self, engine):
        asked = threading.Event()
        requests = [Request(CHAT, max_new_tokens=40)] * 4
        seen = 0

        def should_stop():
            nonlocal seen
            seen += 1
            if seen > 3:
                asked.set()
            return asked.is_set()

        done = list(engine.answers(requests, batch_size=2, should_stop=should_stop))
        assert len(done) <= 2
        assert all(c.finish_reason in ("cancelled", "stop") and c.completion_tokens < 40 for _, c in done)

    def test_adapters_per_request(self, engine, adapters):
        base = engine.generate([Request(CHAT, max_new_tokens=10)])[0].token_ids
        alone = {}
        for adapter, folder in adapters.items():
            engine.load_adapter(adapter, folder)
            alone[adapter] = engine.generate([Request(CHAT, adapter=adapter, max_new_tokens=10)])[0].token_ids
        first, second = adapters
        assert sorted(engine.adapters()) == sorted(adapters)
        mixed = engine.generate(
            [Request(CHAT, adapter=name, max_new_tokens=10) for name in (first, None, second, first)]
        )
        assert [c.token_ids for c in mixed] == [alone[first], base, alone[second], alone[first]]
        assert len({tuple(base), tuple(alone[first]), tuple(alone[second])}) == 3

    def test_unloading_gives_the_base_back(self, engine, adapters):
        base = engine.generate([Request(CHAT, max_new_tokens=10)])[0].token_ids
        first, second = adapters
        engine.load_adapter(first, adapters[first])
        engine.load_adapter(second, adapters[second])
        engine.unload_adapter(first)
        assert engine.adapters() == [second]
        engine.unload_adapter(second)
        engine.unload_adapter(second)
        assert engine.adapters() == []
        assert engine.generate([Request(CHAT, max_new_tokens=10)])[0].token_ids == base

    def test_loading_an_id_again_replaces_it(self, engine, adapters):
        first, second = adapters
        engine.load_adapter(first, adapters[second])
        wrong = engine.generate([Request(CHAT, adapter=first, max_new_tokens=10)])[0].token_ids
        engine.load_adapter(first, adapters[first])
        right = engine.generate([Request(CHAT, adapter=first, max_new_tokens=10)])[0].token_ids
        assert wrong != right

    def test_a_reload_that_is_refused_leaves_the_old_one(self, engine, adapters, tmp_path):
        name, folder = next(iter(adapters.items()))
        engine.load_adapter(name, folder)
        request = Request(CHAT, adapter=name, max_new_tokens=10)
        before = engine.generate([request])[0].token_ids
        whole = adapter_room.load(folder)
        modules = {module.replace("q_proj", "x_proj"): factors for module, factors in whole.modules.items()}
        adapter_room.save(dataclasses.replace(whole, modules=modules, target_modules=["x_proj", "v_proj"]), tmp_path)
        with pytest.raises(AdapterError, match=name):
            engine.load_adapter(name, tmp_path)
        assert engine.adapters() == [name]
        assert engine.generate([request])[0].token_ids == before

    def test_unknown_adapter_is_refused_by_name(self, engine):
        with pytest.raises(AdapterError, match="g999-c99"):
            engine.generate([Request(CHAT, adapter="g999-c99", max_new_tokens=2)])

    def test_only_a_loaded_adapter_can_be_pinned_and_it_answers_as_before(self, engine, adapters):
        name, folder = next(iter(adapters.items()))
        with pytest.raises(AdapterError, match=f"{name} is not loaded"):
            engine.pin(name)
        engine.load_adapter(name, folder)
        requests = [Request(CHAT, adapter=adapter, max_new_tokens=6) for adapter in (None, name)]
        before = [c.token_ids for c in engine.generate(requests)]
        engine.pin(name)
        engine.pin(name)
        assert [c.token_ids for c in engine.generate(requests)] == before

    def test_missing_adapter_folder_is_refused(self, engine, tmp_path):
        with pytest.raises(AdapterError):
            engine.load_adapter("g000-c00", tmp_path / "nowhere")
        assert engine.adapters() == []

    def test_prompt_beyond_the_context_is_refused(self, engine):
        long = [{"role": "user", "content": "word " * (engine.context_length() + 1)}]
        with pytest.raises(EngineError, match="context"):
            engine.generate([Request(long, max_new_tokens=4)])

    def test_a_required_call_is_whole_and_fits_its_tool(self, engine):
        if not keeps_structure(engine):
            return
        style = engine.call_style() or TAGS
        for tools in (TOOLS[:1], TOOLS[1:], TOOLS):
            tag = structure(tools, style, "required")
            requests = [
                Request(chat, max_new_tokens=limit, temperature=temperature, seed=limit, structure=tag)
                for chat in (CHAT, OTHER)
                for limit, temperature in ((128, 0.0), (128, 1.5), (144, 1.0))
            ]
            for completion in engine.generate(requests):
                assert is_one_call(completion.text, style, tools), completion.text
                assert completion.finish_reason == "stop"

    def test_free_text_may_be_kept_from_calling(self, engine):
        if not keeps_structure(engine):
            return
        style = engine.call_style() or TAGS
        tag = structure(TOOLS, style, "none")
        for completion in engine.generate([Request(chat, max_new_tokens=24, structure=tag) for chat in (CHAT, OTHER)]):
            assert parse_calls(completion.text, style) == []

    def test_a_call_in_free_text_fits_its_tool(self, engine):
        if not keeps_structure(engine):
            return
        style = engine.call_style() or TAGS
        tag = structure(TOOLS, style, "auto")
        requests = [Request(CHAT, max_new_tokens=128, temperature=1.0, seed=seed, structure=tag) for seed in range(4)]
        for completion in engine.generate(requests):
            assert parse_calls(completion.text, style) == [] or is_one_call(completion.text, style)

    def test_structured_and_free_requests_in_one_batch(self, engine):
        if not keeps_structure(engine):
            return
        tag = structure(TOOLS, TAGS, "required")
        requests = [
            Request(CHAT, max_new_tokens=10),
            Request(CHAT, max_new_tokens=128, structure=tag, logprobs=True),
            Request(OTHER, max_new_tokens=6, temperature=1.0, seed=3),
            Request(OTHER, max_new_tokens=140, structure=tag, temperature=1.0, seed=4),
        ]
        together = engine.generate(requests)
        assert [c.token_ids for c in together] == [engine.generate([r])[0].token_ids for r in requests]
        assert len(together[1].logprobs) == together[1].completion_tokens
        assert is_one_call(together[1].text, TAGS)
        assert is_one_call(together[3].text, TAGS)

    def test_logprobs_of_a_structured_answer_are_the_free_models(self, engine):
        if not keeps_structure(engine):
            return
        tag = structure(TOOLS, TAGS, "required")
        (free,) = engine.generate([Request(CHAT, max_new_tokens=4, logprobs=True)])
        (bound,) = engine.generate([Request(CHAT, max_new_tokens=128, structure=tag, logprobs=True)])
        if bound.token_ids[0] != free.token_ids[0]:
            assert bound.logprobs[0] < free.logprobs[0] <= 1e-4  # what the model would not have said

    def test_a_structured_answer_streams(self, engine):
        if not keeps_structure(engine):
            return
        request = Request(OTHER, max_new_tokens=128, structure=structure(TOOLS, TAGS, "required"))
        chunks = list(engine.stream(request))
        assert "".join(chunk.text for chunk in chunks) == engine.generate([request])[0].text
        assert is_one_call(chunks[-1].completion.text, TAGS)

    def test_a_structured_answer_with_an_adapter(self, engine, adapters):
        if not keeps_structure(engine):
            return
        tag = structure(TOOLS, TAGS, "required")
        adapter, folder = next(iter(adapters.items()))
        engine.load_adapter(adapter, folder)
        (completion,) = engine.generate([Request(CHAT, adapter=adapter, max_new_tokens=128, structure=tag)])
        assert is_one_call(completion.text, TAGS)

    def test_a_limit_too_small_for_a_call_is_refused(self, engine):
        if not keeps_structure(engine):
            return
        with pytest.raises(LimitTooSmallError, match=r"too small for any call; the shortest needs \d+"):
            engine.generate([Request(CHAT, max_new_tokens=3, structure=structure(TOOLS, TAGS, "required"))])

    def test_tools_are_shown_by_the_template_or_refused(self, engine):
        if engine.call_style() is None:
            with pytest.raises(EngineError, match="shows no tools"):
                engine.generate([Request(CHAT, max_new_tokens=2, tools=TOOLS)])
        else:
            (completion,) = engine.generate([Request(CHAT, max_new_tokens=2, tools=TOOLS)])
            assert completion.prompt_tokens == engine.count_tokens(CHAT, TOOLS) > engine.count_tokens(CHAT)
