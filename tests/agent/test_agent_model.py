"""The agent on the real SmolLM2: calls under a grammar, recall into the answer, deadlines, confidence."""

from typing import Literal

import pytest

from agentlab.agent import Agent, Options
from agentlab.config import Settings
from agentlab.inference import open_engine
from agentlab.inference.chain import Chain, Link
from agentlab.memory import Memory
from agentlab.toolformat import Call, validate

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def chain(embedded):
    with Chain([Link("primary", embedded.name, lambda: open_engine(Settings(name="test"), embedded))]) as opened:
        yield opened


def book(city: str, nights: int, stars: Literal[3, 4, 5] = 3, extras: list[str] | None = None) -> str:
    """Book a hotel."""
    return f"booked {city}"


def area(width: float, height: float) -> float:
    """The area of a rectangle."""
    return width * height


@pytest.mark.parametrize(
    "task",
    ["Book 3 nights in Rome, please.", "How large is a rectangle of 2.5 by 4?", "Tell me a joke.", "全部予約して"],
)
def test_a_demanded_call_parses_and_fits_and_is_executed(chain, task):
    agent = Agent(chain, [book, area], builtin_tools=False, options=Options(tool_choice="required", max_new_tokens=64))
    steps = list(agent.run(task))
    assert not [step for step in steps if step.kind == "rejected"]
    called = next(step for step in steps if step.kind == "tool_called")
    tool = next(tool for tool in agent.tools if tool.name == called.name)
    assert validate(Call(called.name, called.arguments), tool.definition) == []
    result = steps[-1].result
    assert result.reasoning_steps[0].observation
    assert result.state == "answered"
    assert result.model_info.model_sha256 == "" or len(result.model_info.model_sha256) == 64


def test_a_limit_without_room_for_a_demanded_call_is_the_requests_fault_and_opens_no_other_model(chain):
    options = Options(tool_choice="required", max_new_tokens=8)
    _, engine = chain.current()
    second = Link("fallback", "second", lambda: pytest.fail("it was opened"))
    both = Chain([Link("primary", "first", lambda: engine), second])
    result = Agent(both, [book], builtin_tools=False, options=options).ask("Book 3 nights in Rome, please.")
    assert (result.state, result.refused, result.fallbacks) == ("failed", "limit", [])
    assert "max_new_tokens 8 is too small for any call; the shortest needs" in result.error


def test_what_is_remembered_is_in_the_answer(chain, tmp_path):
    with Memory.open(tmp_path / "memory.db") as memory:
        wanted = memory.remember("Anna lives in Lisbon and works as a nurse.", memory_type="knowledge")
        memory.remember("The backup runs at 2 am.", memory_type="knowledge")
        agent = Agent(chain, memory=memory, builtin_tools=False, options=Options(max_new_tokens=24))
        result = agent.ask("Where does Anna live?")
        assert "Lisbon" in result.final_answer
        assert result.context_used == [wanted]
        assert agent.ask("What is the capital of France?").context_used == []


def test_a_talk_goes_on_after_a_restart(chain, tmp_path):
    for _ in range(2):
        with Memory.open(tmp_path / "memory.db") as memory:
            agent = Agent(chain, memory=memory, builtin_tools=False, options=Options(max_new_tokens=16, recall=0))
            agent.ask("My name is Tomas.", session_id="s1")
    with Memory.open(tmp_path / "memory.db") as memory:
        assert len(memory.conversation("s1").turns()) == 2
        agent = Agent(chain, memory=memory, builtin_tools=False, options=Options(max_new_tokens=16, recall=0))
        steps = list(agent.run("What is my name?", session_id="s1"))
        shown = next(step for step in steps if step.kind == "generated").messages
        assert [m["content"] for m in shown if m["role"] == "user"] == ["My name is Tomas."] * 2 + ["What is my name?"]


def test_pieces_are_the_answer_and_confidence_is_the_models_own(chain):
    agent = Agent(chain, builtin_tools=False, options=Options(max_new_tokens=12))
    steps = list(agent.run("What is the capital of France?"))
    result = steps[-1].result
    assert "".join(step.text for step in steps if step.kind == "delta").strip() == result.final_answer
    assert "Paris" in result.final_answer
    assert 0.5 < result.confidence_score <= 1
    assert result.confidence_score == next(step for step in steps if step.kind == "generated").confidence


def test_a_deadline_cuts_a_long_answer_with_what_there_is(chain):
    agent = Agent(chain, builtin_tools=False, options=Options(max_new_tokens=400))
    agent.load()
    result = agent.ask("Tell a long story about a river.", deadline_s=2.0)
    assert result.state == "deadline"
    assert len(result.final_answer) > 10
    assert result.processing_time < 6  # a busy machine's single token can take long; the whole story takes a minute
