"""An answer's steps as spans in MLflow: what was recalled, what the model wrote, what each tool did, and when."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from agent.helpers import Scripted, agent_of, call
from memory.helpers import open_memory

from agentlab.agent import Step
from agentlab.errors import StorageError
from agentlab.tracking import configure
from agentlab.tracking.traces import write_trace


def weigh(animal: str) -> str:
    """What an animal weighs."""
    if animal == "unicorn":
        raise LookupError("no such animal")
    return "4 kg"


def spans_of(root: Path, steps: Sequence[Step]) -> list[Any]:
    """The spans of the written trace, in their order in time."""
    trace = configure(root).get_trace(write_trace(root, "traced", steps))
    return sorted(trace.data.spans, key=lambda span: int(span.start_time_ns))


def test_what_was_recalled_and_what_tools_did_are_spans_of_their_own(root: Path) -> None:
    engine = Scripted(call("weigh", animal="unicorn"), call("weigh", animal="cat"), "Miezi weighs 4 kg.", token_s=0.002)
    with open_memory(root / "memory.db") as memory:
        told = memory.remember("My cat is called Miezi.")
        steps = list(agent_of(engine=engine, memory=memory, tools=[weigh]).run("What does my cat weigh?"))
    result = steps[-1].result  # type: ignore[attr-defined]
    agent, *parts = spans_of(root, steps)
    assert [span.span_type for span in parts] == ["RETRIEVER", *["CHAT_MODEL", "TOOL"] * 2, "CHAT_MODEL"]
    assert (agent.span_type, agent.inputs["task"]) == ("AGENT", "What does my cat weigh?")
    assert agent.outputs == {"final_answer": "Miezi weighs 4 kg.", "state": "answered", "error": ""}
    assert agent.attributes["confidence"] == result.confidence_score
    assert {span.parent_id for span in parts} == {agent.span_id}

    recall, first, failed, _, weighed, last = parts
    assert (recall.inputs, recall.outputs) == ({"query": "What does my cat weigh?"}, [told])
    assert (failed.name, failed.inputs, failed.attributes["problem"]) == ("weigh", {"animal": "unicorn"}, "error")
    assert "no such animal" in failed.outputs
    assert (weighed.inputs, weighed.outputs) == ({"animal": "cat"}, "4 kg")
    assert [span.status.status_code.name for span in (failed, weighed)] == ["ERROR", "OK"]
    assert "weigh" in first.outputs
    assert last.outputs == "Miezi weighs 4 kg."
    # one after another, within the answer's time; a clock is read to a microsecond or so
    slack_ns = 2_000_000
    for before, after in itertools.pairwise(parts):
        assert before.end_time_ns <= after.start_time_ns + slack_ns
    assert agent.start_time_ns <= recall.start_time_ns + slack_ns
    assert last.end_time_ns <= agent.end_time_ns + slack_ns


def test_an_unknown_confidence_is_traced_as_unknown(root: Path) -> None:
    steps = list(agent_of(engine=Scripted("Fine.", logprob=None)).run("How are you?"))
    assert [span.attributes.get("confidence") for span in spans_of(root, steps)] == [None, None]


def test_steps_without_their_end_are_no_trace(root: Path) -> None:
    steps = list(agent_of("Fine.").run("How are you?"))[:-1]
    with pytest.raises(StorageError, match="no answer at their end"):
        write_trace(root, "traced", steps)
