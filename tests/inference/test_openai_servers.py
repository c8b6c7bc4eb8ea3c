"""The OpenAI-compatible engine on servers that can do less than vLLM, each in its own way."""

import itertools
import random
import threading
import time

import pytest
from chat_server import ChatServer
from conformance import CHAT, TOOLS

from agentlab.config import ModelSettings
from agentlab.errors import AdapterError, ConfigError, ModelError
from agentlab.inference import Capabilities, EngineError, Request
from agentlab.inference import openai_server as server_module
from agentlab.inference.openai_engine import CONCURRENT, DEFAULT_CONTEXT, UNKNOWN_TOKEN, open_server
from agentlab.inference.openai_tokens import OpenAITokenEngine
from agentlab.models import ModelFiles
from agentlab.toolformat import TAGS, parse_calls, structure

WORDS = ["The ", "river ", "runs ", "to ", "the ", "sea."]


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


@pytest.mark.parametrize("kind", ["ollama", "llama.cpp", "other"])
def test_tools_that_a_server_refuses_or_ignores_are_refused(kind):
    with ChatServer(kind, words) as server, opened(server) as engine:
        assert not engine.capabilities().tools
        with pytest.raises(EngineError, match="shows no tools to m"):
            engine.generate([Request(CHAT, tools=TOOLS)])


@pytest.mark.parametrize("elsewhere", ["<html>a version</html>", {"error": "Unexpected endpoint"}, ["nothing"], 7])
def test_a_server_that_answers_at_every_address_is_none_of_those_that_are_known(elsewhere):
    with ChatServer("other", words, elsewhere=elsewhere) as server:
        assert server_module.Server(server.url).known("m") == server_module.Known("other")


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
        def chunks(self, path, body):
            yield {"choices": [{"text": "On", "token_ids": [70], "finish_reason": None}]}

    end = time.monotonic() + 30
    with (
        OpenAITokenEngine(Server("http://server/v1"), ModelFiles("m", tiny_model, ""), 512) as engine,
        pytest.raises(EngineError, match="the server at http://server/v1 broke off its answer"),
    ):
        list(engine.answers([Request(CHAT, max_new_tokens=16)], should_stop=lambda: time.monotonic() > end))


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


def test_an_abandoned_stream_lets_the_server_go():
    with ChatServer("other", lambda body: itertools.repeat("on "), pause_s=0.01) as server, opened(server) as engine:
        stream = engine.stream(Request(CHAT, max_new_tokens=3000))
        next(stream)
        stream.close()
        assert server.broken_off.wait(30)
