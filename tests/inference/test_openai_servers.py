"""The OpenAI-compatible engine on servers that can do less than vLLM, each in its own way."""

import email.utils
import itertools
import random
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from chat_server import ChatServer
from conformance import CHAT, TOOLS

from agentlab.config import ModelSettings
from agentlab.errors import AdapterError, ConfigError, ModelError
from agentlab.inference import Capabilities, EngineError, Request
from agentlab.inference import openai_server as server_module
from agentlab.inference.openai_adapters import ServerAdapters
from agentlab.inference.openai_engine import CONCURRENT, DEFAULT_CONTEXT, UNKNOWN_TOKEN, open_server
from agentlab.inference.openai_reading import Reading
from agentlab.inference.openai_tokens import OpenAITokenEngine
from agentlab.models import ModelFiles
from agentlab.toolformat import TAGS, parse_calls, structure

WORDS = ["The ", "river ", "runs ", "to ", "the ", "sea."]


def until(true, seconds=30):
    """Wait for what another thread is about to do."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def words(body):
    return WORDS


def opened(server, name="m", **more):
    return open_server(ModelSettings(engine="openai", base_url=server.url, **more), name)


def test_ollama_answers_and_says_what_it_lacks(tmp_path):
    with ChatServer("ollama", words) as server, opened(server) as engine:
        (completion,) = engine.generate([Request(CHAT, max_new_tokens=16)])
        assert (completion.text, completion.finish_reason) == ("".join(WORDS), "stop")
        assert completion.prompt_tokens == 11
        assert completion.token_ids == [UNKNOWN_TOKEN] * len(WORDS)
        can = engine.capabilities()
        assert can == Capabilities(False, True, False, False, False, False)
        assert engine.context_length() == DEFAULT_CONTEXT
        assert engine.call_style() is None
        with pytest.raises(EngineError, match="gives no log-probabilities of m"):
            engine.generate([Request(CHAT, logprobs=True)])
        with pytest.raises(EngineError, match=r"keeps no structures here; allowed: .*model\.tokenizer"):
            engine.generate([Request(CHAT, structure=structure(TOOLS, TAGS, "required"))])
        with pytest.raises(EngineError, match="shows no tools to m"):
            engine.generate([Request(CHAT, tools=TOOLS)])
        with pytest.raises(AdapterError):
            engine.load_adapter("g000-c00", tmp_path)


def test_limits_and_stop_strings_are_kept():
    with ChatServer("ollama", words) as server, opened(server) as engine:
        (cut,) = engine.generate([Request(CHAT, max_new_tokens=3)])
        assert (cut.text, cut.finish_reason, cut.completion_tokens) == ("The river runs ", "length", 3)
        request = Request(CHAT, max_new_tokens=16, stop=("to the",))  # a server may not know stop strings
        assert "".join(chunk.text for chunk in engine.stream(request)) == "The river runs "
        assert server.posted[-1]["stop"] == ["to the"]
        assert engine.generate([request])[0].finish_reason == "stop"


def test_a_reasoning_models_thoughts_stand_between_tags():
    apart = [{"reasoning": "Water "}, {"reasoning": "flows."}, {"content": "To the sea."}]
    inline = ["<think>Water ", "flows.</think>", "To the sea."]
    for pieces in (apart, inline):
        with ChatServer("ollama", lambda body, pieces=pieces: pieces) as server, opened(server) as engine:
            chunks = list(engine.stream(Request(CHAT, max_new_tokens=16)))
            assert chunks[-1].completion.text == "<think>Water flows.</think>To the sea."
            assert "".join(chunk.text for chunk in chunks) == chunks[-1].completion.text


def test_a_server_whose_template_opens_the_thought_is_asked_for_its_prompt():
    for end, opened_by in (("<think>\n", True), ("", False)):
        prompt = f"…<assistant>{end}"
        with (
            ChatServer("llama.cpp", words, prompt=lambda body, prompt=prompt: prompt) as server,
            opened(server) as engine,
        ):
            assert engine.opens_thought(CHAT) is opened_by
            assert server.posted == []  # no answer is written for it


def test_a_server_that_shows_no_prompt_is_known_by_its_answers():
    said = [["Water ", "flows.</think>", "To the sea."], ["To ", "the sea."]]
    with ChatServer("other", lambda body: said[len(server.posted) - 1]) as server, opened(server) as engine:
        assert not engine.opens_thought(CHAT)
        engine.generate([Request(CHAT, max_new_tokens=16)])
        assert engine.opens_thought(CHAT)
        engine.generate([Request(CHAT, max_new_tokens=16)])  # whole, and without a thought
        assert not engine.opens_thought(CHAT)


@pytest.mark.parametrize("kind", ["ollama", "llama.cpp", "other"])
def test_calls_that_the_server_has_read_come_back_as_text(kind):
    calls = [("rivers.length", '{"river": "Rhine"}'), ("count", '{"numbers": [1], "words": [], "order": "up"}')]
    with ChatServer(kind, lambda body: [], calls=calls) as server, opened(server) as engine:
        assert engine.call_style() == TAGS
        earlier = {"function": {"name": "count", "arguments": {"order": "up"}}, "id": "1", "type": "function"}
        chat = [*CHAT, {"role": "assistant", "content": "", "tool_calls": [earlier]}]
        chunks = list(engine.stream(Request(chat, max_new_tokens=64, tools=TOOLS)))
        text = chunks[-1].completion.text
        assert "".join(chunk.text for chunk in chunks) == text
        assert [(c.name, c.arguments) for c in parse_calls(text)] == [
            ("rivers.length", {"river": "Rhine"}),
            ("count", {"numbers": [1], "words": [], "order": "up"}),
        ]
        sent = server.posted[-1]
        assert sent["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"order": "up"}'
        assert {tool["function"]["name"] for tool in sent["tools"]} == {"rivers.length", "count"}


def _call(index, key, name, arguments):
    return {"index": index, "id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "pieces",
    [
        [_call(0, "a", "add", '{"a": 1}'), _call(0, "b", "count", '{"b": 2}')],  # older Ollama
        [_call(None, "a", "add", '{"a": 1}'), _call(None, "b", "count", '{"b": 2}')],
        [_call(None, None, "add", '{"a": 1}'), _call(None, None, "count", '{"b": 2}')],
        [_call(None, "a", "add", '{"a"'), _call(None, "a", None, ": 1}"), _call(None, "b", "count", '{"b": 2}')],
        [_call(0, "a", "add", '{"a"'), _call(0, "a", "add", ": 1}"), _call(1, "b", "count", '{"b": 2}')],
        # every piece with an id of its own, as vLLM once made them
        [_call(0, "a", "add", '{"a"'), _call(0, "x", None, ": 1}"), _call(1, "b", "count", '{"b": 2}')],
        [_call(0, None, "add", ""), _call(0, "a", None, '{"a": 1}'), _call(1, "b", "count", '{"b": 2}')],
        [_call(0, "a", "add", {"a": 1}), _call(1, "b", "count", {"b": 2})],
    ],
)
def test_calls_in_pieces_are_told_apart(pieces):
    deltas = [{"tool_calls": [piece]} for piece in pieces]
    with ChatServer("other", lambda body: deltas) as server, opened(server) as engine:
        (completion,) = engine.generate([Request(CHAT, max_new_tokens=16)])
        calls = [(call.name, call.arguments) for call in parse_calls(completion.text)]
        assert calls == [("add", {"a": 1}), ("count", {"b": 2})]


def test_texts_in_parts_are_joined():
    parts = [{"type": "text", "text": "To the "}, {"type": "text", "text": "sea."}]
    pieces = [{"reasoning": [{"text": "Water "}, "flows."]}, {"content": parts}]
    with ChatServer("other", lambda body: pieces) as server, opened(server) as engine:
        (completion,) = engine.generate([Request(CHAT, max_new_tokens=16)])
        assert completion.text == "<think>Water flows.</think>To the sea."


@pytest.mark.parametrize(
    "piece",
    [
        {"content": 5}, {"content": [{"type": "image_url"}]}, {"reasoning": {"text": "a"}}, {"tool_calls": [7]},
        {"tool_calls": 7}, {"tool_calls": [_call(0, "a", "add", 5)]}, {"tool_calls": [_call(0, "a", 5, "{}")]},
    ],
)  # fmt: skip
def test_a_piece_that_nobody_can_read_costs_its_own_answer_alone(piece):
    said = [[piece], WORDS]
    with ChatServer("other", lambda body: said.pop(0)) as server, opened(server) as engine:
        with pytest.raises(EngineError, match=rf"the server at {server.url} answers in an unknown form: "):
            engine.generate([Request(CHAT, max_new_tokens=16)])
        assert engine.generate([Request(CHAT, max_new_tokens=16)])[0].text == "".join(WORDS)


def test_a_stream_of_something_else_is_one_sentence():
    with ChatServer("other", words, raw=b"data: {nope\n\n") as server, opened(server) as engine:
        with pytest.raises(server_module.UnknownForm, match="answers in an unknown form: "):
            engine.generate([Request(CHAT, max_new_tokens=16)])
        assert engine.call_style() is None


def test_log_probabilities_without_numbers_are_none():
    with ChatServer("other", words, logprobs={"token": "x"}) as server, opened(server) as engine:
        assert not engine.capabilities().logprobs


@pytest.mark.parametrize("usage", [{"prompt_tokens": "many", "completion_tokens": [2]}, {"prompt_tokens": None}, [3]])
def test_a_usage_that_says_nothing_is_guessed(usage):
    with ChatServer("other", words, usage=usage) as server, opened(server) as engine:
        (completion,) = engine.generate([Request(CHAT, max_new_tokens=16)])
        assert completion.prompt_tokens == engine.count_tokens(CHAT)
        assert completion.completion_tokens > 0


@pytest.mark.parametrize("kind", ["ollama", "llama.cpp", "other"])
def test_tools_that_a_server_refuses_or_ignores_are_refused(kind):
    with ChatServer(kind, words) as server, opened(server) as engine:
        assert not engine.capabilities().tools
        with pytest.raises(EngineError, match="shows no tools to m"):
            engine.generate([Request(CHAT, tools=TOOLS)])


@pytest.mark.parametrize("kind", ["ollama", "llama.cpp", "other"])
def test_a_busy_server_is_asked_again_what_it_can_do(kind, monkeypatch):
    monkeypatch.setattr(server_module, "_PAUSE_S", 0.01)
    calls = [("count", '{"numbers": [1], "words": [], "order": "up"}')]
    for status in (503, 429, 502):
        busy = [status] * server_module._TRIES
        with (
            ChatServer(kind, words, calls=calls, statuses=busy, busy=("/api/show",)) as server,
            opened(server) as engine,
        ):
            with pytest.raises(EngineError, match=f"status {status}"):
                engine.call_style()
            server.statuses = []
            assert engine.call_style() == TAGS


def test_a_busy_server_is_asked_again_whether_it_loads_adapters():
    errors = [server_module.Unavailable("status 503"), server_module.RefusedByServer("the adapter cannot be found")]

    class Server(server_module.Server):
        def post(self, path, body):
            raise errors.pop(0)

    adapters = ServerAdapters(Server("http://server/v1"), possible=True)
    with pytest.raises(EngineError, match="status 503"):
        _ = adapters.possible
    assert adapters.possible
    adapters.close()


def test_a_server_that_fails_at_tools_takes_none():
    with (
        ChatServer("llama.cpp", words, calls=[], statuses=[500]) as server,
        opened(server) as engine,
    ):  # without --jinja
        assert engine.call_style() is None
        assert engine.call_style() is None
        assert len(server.posted) == 1


def test_a_busy_server_is_asked_again_for_its_prompt(monkeypatch):
    monkeypatch.setattr(server_module, "_PAUSE_S", 0.01)
    with ChatServer("llama.cpp", words, prompt=lambda body: "…<think>", busy=("/apply-template",)) as server:
        server.statuses = [503] * server_module._TRIES
        with opened(server) as engine:
            assert not engine.opens_thought(CHAT)
            assert engine.opens_thought(CHAT)


@pytest.mark.parametrize("elsewhere", ["<html>a version</html>", {"error": "Unexpected endpoint"}, ["nothing"], 7])
def test_a_server_that_answers_at_every_address_is_none_of_those_that_are_known(elsewhere):
    with ChatServer("other", words, elsewhere=elsewhere) as server:
        assert server_module.Server(server.url).known("m") == server_module.Known("other")


def test_only_a_server_that_reads_chats_as_tokens_is_vllm(monkeypatch):
    monkeypatch.setattr(server_module, "_PAUSE_S", 0.01)
    with ChatServer("vllm", words) as server:
        assert server_module.Server(server.url).known("m") == server_module.Known("vllm", 512)
    with ChatServer("sglang", words) as server, opened(server) as engine:
        assert engine.known == server_module.Known("other", 512)
        assert engine.context_length() == 512
        assert engine.generate([Request(CHAT, max_new_tokens=16)])[0].text == "".join(WORDS)
    with ChatServer("vllm", words, statuses=[503] * server_module._TRIES, busy=("/tokenize",)) as server:
        with pytest.raises(EngineError, match="status 503"):  # who it is stays open
            server_module.Server(server.url).known("m")
        assert server_module.Server(server.url).known("m").kind == "vllm"


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (400, {"detail": "bad things"}, "refuses (status 400): bad things"),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "no number"}, {"msg": "no x"}]}, ": body.n: no number; no x"),
        (400, {"error": {"error": {"message": "deep"}}}, ": deep"),
        (400, {"error": {"message": {"text": "odd"}}}, ": {'text': 'odd'}"),
        (400, {"error": "as text"}, ": as text"),
        (500, {"detail": ["a", {"b": 1}]}, "failed (status 500): a; {'b': 1}"),
        (400, {"detail": []}, ": {'detail': []}"),
    ],
)
def test_what_a_server_says_is_told_in_whichever_form_it_says_it(status, body, told):
    with ChatServer("other", words) as server, opened(server) as engine:
        engine.generate([Request(CHAT)])
        server.statuses = [(status, body)]
        with pytest.raises(EngineError) as refused:
            engine.generate([Request(CHAT)])
        assert told in str(refused.value)


def test_an_error_in_the_middle_of_a_stream_is_told():
    def answer(body):
        yield "On"
        yield {"error": {"message": "out of cards"}}

    with (
        ChatServer("other", answer) as server,
        opened(server) as engine,
        pytest.raises(EngineError, match="failed: out of cards"),
    ):
        engine.generate([Request(CHAT)])


def test_a_server_that_refuses_stream_options_is_asked_without():
    with ChatServer("other", words, strict=True, usage=False) as server, opened(server) as engine:
        for _ in range(3):
            assert engine.generate([Request(CHAT, max_new_tokens=16)])[0].text == "".join(WORDS)
        assert len(server.posted) == 4  # once in vain
        server.statuses = [400]
        with pytest.raises(EngineError, match="status 400 on purpose"):
            engine.generate([Request(CHAT, max_new_tokens=16)])
        assert len(server.posted) == 5
    with ChatServer("other", words, statuses=[400, 400]) as server, opened(server) as engine:
        with pytest.raises(EngineError, match="status 400 on purpose"):
            engine.generate([Request(CHAT, max_new_tokens=16)])
        engine.generate([Request(CHAT, max_new_tokens=16)])
        assert "stream_options" in server.posted[-1]  # they were not what it refused


@pytest.mark.parametrize("elsewhere", [None, {"hello": "Ollama is running"}])
def test_an_address_without_v1_is_told(elsewhere):
    with ChatServer("other", words, elsewhere=elsewhere) as server:
        root = server.url.removesuffix("/v1")
        with pytest.raises(EngineError, match=rf"; is {root}/v1 meant\?$"):
            open_server(ModelSettings(engine="openai", base_url=root), "m")


def test_llama_cpp_says_its_context_and_missing_usage_is_guessed():
    with ChatServer("llama.cpp", words, usage=False) as server, opened(server) as engine:
        assert engine.context_length() == 640
        (completion,) = engine.generate([Request(CHAT, max_new_tokens=16)])
        assert 5 < completion.prompt_tokens < 60
        assert completion.completion_tokens > 0
        with pytest.raises(EngineError, match=r"exceed the model's context of 640 tokens \(model.context_length\)"):
            engine.generate([Request([{"role": "user", "content": "word " * 700}], max_new_tokens=4)])
    with ChatServer("llama.cpp", words) as server, opened(server, context_length=200) as engine:
        assert engine.context_length() == 200


def test_a_known_tokenizer_counts(tiny_model):
    with ChatServer("ollama", words, usage=False) as server:
        settings = ModelSettings(engine="openai", base_url=server.url)
        with open_server(settings, "m", tiny_model) as engine:
            (completion,) = engine.generate([Request(CHAT, max_new_tokens=16)])
            assert completion.completion_tokens == len("".join(WORDS))  # its tokens are bytes
            assert completion.prompt_tokens == engine.count_tokens(CHAT)
            assert min(completion.token_ids) >= 0


def test_logprobs_where_the_server_gives_them():
    with ChatServer("other", words, logprobs=True) as server, opened(server) as engine:
        (completion,) = engine.generate([Request(CHAT, max_new_tokens=16, logprobs=True)])
        assert completion.logprobs == [-0.5] * len(WORDS)
        assert len(completion.token_ids) == len(WORDS)


def test_a_server_that_ignores_seeds_is_found_out():
    draw = random.Random(1)
    with ChatServer("other", lambda body: [str(draw.random())]) as server, opened(server) as engine:
        assert not engine.capabilities().seeds
        with pytest.raises(EngineError, match="answers one seed in different ways; allowed: temperature 0"):
            engine.generate([Request(CHAT, temperature=0.7, seed=3)])
        assert engine.generate([Request(CHAT)])[0].text
    with ChatServer("other", lambda body: [str(body.get("seed"))]) as server, opened(server) as engine:
        assert engine.generate([Request(CHAT, temperature=0.7, seed=3)])[0].text == "3"


def test_an_unknown_model_is_named_with_those_there_are():
    with ChatServer("ollama", words, models=("deepseek-r1:7b", "qwen2.5:7b")) as server:
        with pytest.raises(ModelError, match=r"has no model deepseek; it has: deepseek-r1:7b, qwen2\.5:7b"):
            opened(server, "deepseek")
        with opened(server, "deepseek-r1:7b") as engine:
            server.models = ()
            with pytest.raises(EngineError, match=r"refuses \(status 404\): model 'deepseek-r1:7b' not found"):
                engine.generate([Request(CHAT)])


def test_only_what_may_pass_is_tried_again(monkeypatch):
    monkeypatch.setattr(server_module, "_PAUSE_S", 0.01)
    with ChatServer("other", words, statuses=[503, 429]) as server, opened(server) as engine:
        assert engine.generate([Request(CHAT, max_new_tokens=16)])[0].text == "".join(WORDS)
        assert len(server.posted) == 3
    with ChatServer("other", words, statuses=[500, 200]) as server, opened(server) as engine:
        with pytest.raises(EngineError, match=r"failed \(status 500\): status 500 on purpose"):
            engine.generate([Request(CHAT)])
        assert len(server.posted) == 1
    with ChatServer("other", words, statuses=[503] * 9) as server, opened(server) as engine:
        with pytest.raises(EngineError, match=r"status 503"):
            engine.generate([Request(CHAT)])
        assert len(server.posted) == server_module._TRIES


def test_a_server_says_how_long_to_wait(monkeypatch):
    monkeypatch.setattr(server_module, "_PAUSE_S", 0.01)

    def waited_s(**headers):
        with ChatServer("other", words, statuses=[429], headers=headers) as server, opened(server) as engine:
            engine.generate([Request(CHAT, max_new_tokens=16)])
            first_s, second_s = server.times_s
            return second_s - first_s

    assert waited_s(**{"Retry-After": "0.5"}) >= 0.5
    for text in ("-1", "soon", "nan", ""):
        assert waited_s(**{"Retry-After": text}) < 30
    monkeypatch.setattr(server_module, "_MOST_PAUSE_S", 0.1)
    assert waited_s(**{"Retry-After": "1000"}) < 30
    a_date = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=500), usegmt=True)
    error = SimpleNamespace(response=SimpleNamespace(headers={"retry-after": a_date}))
    assert 400 < server_module._retry_after_s(error) <= 500


def test_waiting_for_a_busy_server_ends_with_the_request(monkeypatch):
    monkeypatch.setattr(server_module, "_MOST_UNASKED_S", 0.1)
    with (
        ChatServer("other", words, statuses=[503] * 9, headers={"Retry-After": "50"}) as server,
        opened(server) as engine,
    ):
        before = threading.active_count()
        started_s = time.monotonic()
        stream = engine.stream(Request(CHAT, max_new_tokens=16), lambda: time.monotonic() - started_s > 0.5)
        assert [chunk.completion.finish_reason for chunk in stream] == ["cancelled"]
        until(lambda: threading.active_count() <= before)
        assert len(server.posted) == 1
        with pytest.raises(EngineError, match="status 503"):  # nobody could end this one's waiting
            _ = engine.capabilities()
        assert time.monotonic() - started_s < 30


def test_a_server_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(server_module, "_PAUSE_S", 0.01)
    with ChatServer("other", words) as server:
        url = server.url
    with pytest.raises(EngineError, match="cannot be reached"):
        open_server(ModelSettings(engine="openai", base_url=url), "m")


def test_the_key_comes_from_the_environment_and_stays_out_of_messages(monkeypatch):
    with ChatServer("other", words) as server:
        with pytest.raises(ConfigError, match=r"model\.api_key_env: the environment has no LAB_KEY"):
            opened(server, api_key_env="LAB_KEY")
        monkeypatch.setenv("LAB_KEY", "s3cret")
        with opened(server, api_key_env="LAB_KEY") as engine:
            assert set(server.keys) == {"Bearer s3cret"}
            server.statuses = [401]
            with pytest.raises(EngineError) as refused:
                engine.generate([Request(CHAT)])
            assert "s3cret" not in str(refused.value)


def test_so_many_at_once_and_no_more():
    with ChatServer("other", words, pause_s=0.01) as server, opened(server) as engine:
        requests = [Request(CHAT, max_new_tokens=16)] * (3 * CONCURRENT)
        assert [c.text for c in engine.generate(requests)] == ["".join(WORDS)] * len(requests)
        assert 1 < server.most <= CONCURRENT
        server.most = 0
        engine.generate(requests[:4], batch_size=1)
        assert server.most == 1


def test_an_answer_that_breaks_off_is_no_whole_one():
    with ChatServer("ollama", words, finish=False) as server, opened(server) as engine:
        with pytest.raises(EngineError, match=rf"the server at {server.url} broke off its answer"):
            engine.generate([Request(CHAT, max_new_tokens=16)])
        (cut,) = engine.generate([Request(CHAT, max_new_tokens=16, stop=("to the",))])  # all of it had come
        assert (cut.text, cut.finish_reason) == ("The river runs ", "stop")
        with pytest.raises(EngineError, match="broke off"):
            engine.capabilities()  # found out by half an answer, it would be believed for good
        server.finish = True
        assert engine.capabilities().seeds


def test_tokens_that_break_off_are_waited_for_no_longer(tiny_model):
    class Server(server_module.Server):
        def chunks(self, path, body, leash=None):
            yield {"choices": [{"text": "On", "token_ids": [70], "finish_reason": None}]}

    end = time.monotonic() + 30
    with (
        OpenAITokenEngine(Server("http://server/v1"), ModelFiles("m", tiny_model, ""), 512) as engine,
        pytest.raises(EngineError, match="the server at http://server/v1 broke off its answer"),
    ):
        list(engine.answers([Request(CHAT, max_new_tokens=16)], should_stop=lambda: time.monotonic() > end))


@pytest.mark.parametrize(
    "choice", [{"text": "On", "token_ids": 7}, {"text": "On", "token_ids": [70], "logprobs": [-0.5]}, "On"]
)
def test_tokens_that_nobody_can_read_are_one_sentence(tiny_model, choice):
    class Server(server_module.Server):
        def chunks(self, path, body, leash=None):
            yield {"choices": [choice]}

        def post(self, path, body):
            return {"choices": [{"prompt_logprobs": [None]}]}

    with OpenAITokenEngine(Server("http://server/v1"), ModelFiles("m", tiny_model, ""), 512) as engine:
        with pytest.raises(server_module.ServerError, match="the server at http://server/v1 answers in an unknown"):
            engine.generate([Request(CHAT, max_new_tokens=16)])
        with pytest.raises(server_module.ServerError, match="the server at http://server/v1 answers in an unknown"):
            engine._score([70, 71], 1, None)


def test_cancelling_closes_the_connection_and_keeps_what_there_is():
    with ChatServer("other", lambda body: itertools.repeat("on "), pause_s=0.01) as server, opened(server) as engine:
        asked = threading.Event()
        seen = []
        for chunk in engine.stream(Request(CHAT, max_new_tokens=10_000 - 6000), asked.is_set):
            seen.append(chunk)
            if len(seen) == 3:
                asked.set()
        assert seen[-1].completion.finish_reason == "cancelled"
        assert seen[-1].completion.text.startswith("on on on")
        assert server.broken_off.wait(30)
        polls = itertools.count()
        done = list(engine.answers([Request(CHAT, max_new_tokens=3000)] * 4, 2, lambda: next(polls) > 5))
        assert len(done) <= 2
        assert all(c.finish_reason == "cancelled" for _, c in done)


def test_a_server_that_says_nothing_can_be_left_waiting():
    """A server may load its model for minutes before the first word; a deadline does not wait for it."""
    silent = threading.Event()

    def answer(body):
        silent.wait(60)
        return WORDS

    with ChatServer("other", answer) as server, opened(server) as engine:
        polls = itertools.count()
        chunks = list(engine.stream(Request(CHAT, max_new_tokens=16), lambda: next(polls) > 3))
        assert [chunk.completion.finish_reason for chunk in chunks] == ["cancelled"]
        assert not silent.is_set()
        silent.set()


@pytest.mark.parametrize("silent", ["at once", "later"])
def test_a_silent_server_sees_the_connection_close(silent):
    with ChatServer("other", words, silent=silent) as server, opened(server) as engine:
        before = threading.active_count()
        polls = itertools.count()
        chunks = list(engine.stream(Request(CHAT, max_new_tokens=16), lambda: next(polls) > 9))
        assert [chunk.completion.finish_reason for chunk in chunks] == ["cancelled"]
        assert server.broken_off.wait(30)
        until(lambda: threading.active_count() <= before)
        assert len(server.posted) == 1  # what was given up is not tried again


def test_closing_the_engine_closes_its_connections():
    with ChatServer("other", words, silent="later") as server, opened(server) as engine:
        reading = Reading(lambda leash: engine.server.chunks("/chat/completions", engine._body(Request(CHAT)), leash))
        until(lambda: reading.take(0.1) is not None)
        engine.close()
        assert server.broken_off.wait(30)


def test_tokens_of_a_silent_server_are_given_up(tiny_model):
    with ChatServer("other", words, silent="at once") as server:
        chunks = server_module.Server.chunks

        class Server(server_module.Server):
            def chunks(self, path, body, leash=None):
                return chunks(self, "/chat/completions", {"model": "m", "messages": CHAT, "max_tokens": 9}, leash)

        with OpenAITokenEngine(Server(server.url), ModelFiles("m", tiny_model, ""), 512) as engine:
            polls = itertools.count()
            seen = list(engine.stream(Request(CHAT, max_new_tokens=16), lambda: next(polls) > 9))
            assert [chunk.completion.finish_reason for chunk in seen] == ["cancelled"]
            assert server.broken_off.wait(30)


def test_an_abandoned_stream_lets_the_server_go():
    with ChatServer("other", lambda body: itertools.repeat("on "), pause_s=0.01) as server, opened(server) as engine:
        stream = engine.stream(Request(CHAT, max_new_tokens=3000))
        next(stream)
        stream.close()
        assert server.broken_off.wait(30)


def test_a_server_that_takes_connections_and_says_nothing_is_not_waited_for_as_for_an_answer(monkeypatch):
    monkeypatch.setattr(server_module, "_KNOWN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = server_module.Server(f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
        with pytest.raises(server_module.Unavailable, match="has not answered in time"):
            server.known("m")


@pytest.mark.parametrize("raw", [b"<html><body>Hello</body></html>", b'data: {"choices": []}\n\ndata: [DONE]\n\n'])
def test_a_page_where_an_answer_was_expected_names_the_address(raw):
    with (
        ChatServer("other", words, raw=raw) as server,
        opened(server) as engine,
        pytest.raises(EngineError, match=r"ended its answer before there was one; is that the API's address"),
    ):
        engine.generate([Request(CHAT, max_new_tokens=2)])


def test_no_rung_is_changed_on_a_server():
    with (
        ChatServer("other", words) as server,
        opened(server) as engine,
        pytest.raises(EngineError, match="the engine openai keeps the rung that it was opened at"),
    ):
        engine.change_rung("nf4")


def test_a_closed_server_is_named():
    with ChatServer("other", words) as server, opened(server) as engine:
        engine.close()
        with pytest.raises(EngineError, match=r"the connection to the server at .* is closed; open the engine again"):
            engine.generate([Request(CHAT, max_new_tokens=2)])


@pytest.mark.parametrize("kind", ["llama.cpp", "ollama"])
def test_a_server_that_is_still_loading_is_not_taken_for_another(kind, monkeypatch):
    monkeypatch.setattr(server_module, "_PAUSE_S", 0.001)
    asked = {"llama.cpp": "/props", "ollama": "/api/version"}[kind]
    with ChatServer(kind, words, statuses=[503] * server_module._TRIES, busy=(asked,)) as server:
        with pytest.raises(server_module.Unavailable, match="status 503"):
            server_module.Server(server.url).known("m")
        assert server_module.Server(server.url).known("m").kind == kind
