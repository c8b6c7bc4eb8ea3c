"""An agent whose models are on a server, and what takes over where the server fails."""

import pytest
from chat_server import ChatServer

from agentlab import inference, models
from agentlab.errors import AdapterError, ModelError
from agentlab.inference import EngineError
from agentlab.lab import Lab
from agentlab.records import BaseModelRecord


def river_length(river: str) -> str:
    """The length of a river."""
    return f"{river} is 1230 km long."


def opened(experiment, server, *more):
    settings = ["model.engine=openai", f"model.base_url={server.url}", "model.primary=m", *more]
    return Lab.open(experiment, settings)


def ask(lab, task, tools=()):
    with lab.agent(tools=tools, remember=False, builtin_tools=False, lease=False) as agent:
        return agent.ask(task)


def test_an_agent_calls_tools_through_a_server_that_reads_the_calls(tiny_experiment):
    def answer(body):
        return ["About 1230 km."] if body["messages"][-1]["role"] == "tool" else []

    with ChatServer("ollama", answer, calls=[("river_length", '{"river": "Rhine"}')]) as server:
        lab = opened(tiny_experiment, server)
        result = ask(lab, "How long is the Rhine?", [river_length])
    assert "1230" in result.final_answer
    assert [step.action for step in result.reasoning_steps if step.action]
    assert any("1230 km long" in (step.observation or "") for step in result.reasoning_steps)


def test_thoughts_of_a_reasoning_model_are_steps_and_no_answer(tiny_experiment):
    pieces = ["<think>It is ", "the capital.</think>", "Paris."]
    with ChatServer("ollama", lambda body: pieces, models=("m", "deepseek-r1:7b")) as server:
        result = ask(opened(tiny_experiment, server, "model.primary=deepseek-r1:7b"), "What is the capital of France?")
    assert result.final_answer == "Paris."
    assert result.model_info.model == "deepseek-r1:7b"


def test_where_the_server_fails_a_model_on_this_machine_answers(tiny_experiment, tiny_model):
    with ChatServer("ollama", lambda body: ["x"]) as server:
        lab = opened(tiny_experiment, server, "model.primary=not-there", f"model.emergency={tiny_model}")
        with lab.agent(remember=False, builtin_tools=False, lease=False) as agent:
            link, engine = agent.chain.current()
            assert (link.role, engine.name) == ("emergency", "transformers")
            (fall,) = agent.chain.take_news()
            assert "has no model not-there; it has: m" in fall.reason


def test_an_adapter_of_a_run_is_not_silently_left_out(tiny_experiment):
    with (
        ChatServer("ollama", lambda body: ["x"]) as server,
        pytest.raises(AdapterError, match=r"g000-c00: m answers on a server.*allowed: champion, base"),
    ):
        opened(tiny_experiment, server).agent("g000-c00", remember=False, lease=False)


@pytest.fixture
def begun(tiny_experiment, tiny_model, monkeypatch):
    """A function that opens an agent of a run whose scores come from an engine, and says what was opened for it."""

    def begin(engine, here, rung="fp32"):
        lab, opened = Lab.open(tiny_experiment), []
        model = models.resolve(str(tiny_model))
        lab.run.save_model(BaseModelRecord(name=model.name, sha256=model.sha256, engine=engine, rung=rung))

        def open_engine(settings, files, name, rung):
            opened.append((name, rung))
            found = inference.open_engine(settings, files, "transformers", rung)
            found.name = name
            return found

        monkeypatch.setattr("agentlab.answering.open_engine", open_engine)
        monkeypatch.setattr("agentlab.inference.opening.choose_engine", lambda settings, files: here)
        monkeypatch.setattr("agentlab.inference.opening.runs_vllm", lambda: here == "vllm")
        with lab.agent(remember=False, builtin_tools=False, lease=False) as agent:
            return opened, agent.ask("Who?").fallbacks, agent.chain.links[0].planned().rung

    return begin


def test_an_agent_answers_on_the_engine_that_its_run_was_scored_on(begun):
    assert begun("transformers", here="vllm")[:2] == ([("transformers", "fp32")], [])
    assert begun("vllm", here="vllm")[:2] == ([("vllm", "fp32")], [])


def test_where_the_engine_of_the_run_is_not_here_another_one_answers_and_says_so(begun):
    opened, (told,), _ = begun("vllm", here="transformers")
    assert opened == [("transformers", "fp32")]
    assert told.endswith("its scores are vllm's, and transformers answers")


@pytest.mark.parametrize("asked", ["auto", "vllm"])
def test_where_the_vllm_that_auto_chose_does_not_start_transformers_answers(tiny_experiment, monkeypatch, asked):
    def open_engine(settings, files, name, rung):
        if name == "vllm":
            raise EngineError("vLLM cannot load tiny: no kernel image")
        return inference.open_engine(settings, files, name, rung)

    monkeypatch.setattr("agentlab.answering.open_engine", open_engine)
    monkeypatch.setattr("agentlab.inference.opening.choose_engine", lambda settings, files: "vllm")
    lab = Lab.open(tiny_experiment, [f"model.engine={asked}"])
    if asked == "vllm":
        with pytest.raises(ModelError, match="no kernel image"):
            lab.agent(remember=False, builtin_tools=False, lease=False)
        return
    with lab.agent(remember=False, builtin_tools=False, lease=False) as agent:
        (told,) = agent.ask("Who?").fallbacks
        assert agent.chain.current()[1].name == "transformers"
    assert told.endswith("no kernel image; it is opened on another engine")


def test_what_vllm_holds_is_not_what_its_run_is_trained_at(begun):
    assert begun("vllm", here="vllm", rung="nf4")[2] == "fp32"  # on a CPU
    assert begun("transformers", here="vllm", rung="nf4")[2] == "nf4"
