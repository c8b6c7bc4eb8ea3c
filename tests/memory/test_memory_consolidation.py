"""What the person told more than once becomes knowledge that names its sources."""

import pytest
from click.testing import CliRunner

from agentlab.cli import main
from agentlab.memory.consolidation import confidence

from .helpers import open_memory

TEA = "I drink green tea every morning."


def test_told_twice_becomes_knowledge(memory):
    one = memory.remember(TEA, session_id="monday", tags=["food"])
    memory.remember("Completely unrelated remark about turbines", session_id="monday")
    assert memory.consolidate() == []
    two = memory.remember("Every morning I drink green tea", session_id="tuesday", tags=["food", "habit"])
    (item,) = memory.consolidate()
    assert item.source_conversations == sorted([one, two])
    assert item.validation_count == 2
    assert item.confidence == 0.75 == confidence(2)
    assert item.domain == "food"
    assert item.content in (TEA, "Every morning I drink green tea")
    assert item.title == item.content
    assert item.embedding.shape == (64,)
    hit = memory.recall("green tea", memory_type="knowledge")[0]
    assert (hit.memory_id, hit.source) == (item.knowledge_id, "agent")
    assert memory.consolidate() == [], "nothing was told since"
    assert memory.peek(one) is not None


def test_more_tellings_strengthen_it(path):
    with open_memory(path) as memory:
        memory.remember(TEA, session_id="a")
        memory.remember(TEA, session_id="b")
        (first,) = memory.consolidate()
    with open_memory(path) as memory:
        third = memory.remember("Every morning, I drink green tea!", session_id="c")
        (again,) = memory.consolidate()
        assert again.knowledge_id == first.knowledge_id
        assert third in again.source_conversations
        assert (again.validation_count, again.confidence) == (3, confidence(3))
        assert again.last_updated >= first.last_updated
        memory.remember("Every morning, I drink green tea!", session_id="c")
        (merged,) = memory.consolidate()
        assert merged.validation_count == 4
        assert len(memory.knowledge()) == 1
        assert memory.doctor().clean


def test_told_twice_in_one_session_counts_too(memory):
    memory.remember(TEA, session_id="a")
    memory.remember(TEA, session_id="a")
    (item,) = memory.consolidate()
    assert item.validation_count == 2
    assert len(item.source_conversations) == 1


@pytest.mark.parametrize(
    "other",
    ["I do not drink green tea every morning.", "I drink green tea every evening in Kyoto.", "My train leaves at 8."],
)
def test_something_else_is_not_the_same_fact(memory, other):
    memory.remember("My train leaves at 9." if "train" in other else TEA, session_id="a")
    memory.remember(other, session_id="b")
    assert memory.consolidate() == []


def test_what_only_an_agent_said_is_no_fact(memory):
    memory.remember("The archive holds maps of Lisbon", session_id="a", source="agent")
    memory.remember("The archive holds maps of Lisbon", session_id="b", source="tool")
    assert memory.consolidate() == []


def test_close_knowledge_is_related(memory):
    for session in "ab":
        memory.remember("My sister Mila studies physics in Vienna", session_id=session)
        memory.remember("My sister Mila studies piano in Vienna", session_id=session)
    made = memory.consolidate()
    assert len(made) == 2
    assert made[1].relationships == [made[0].knowledge_id]


def test_what_a_talk_told_again_becomes_knowledge_when_it_leaves_the_window(memory):
    memory.conversation("monday").add(TEA, "I see.")
    talk = memory.conversation("tuesday")
    talk.add("Every morning I drink green tea", "So you do.")
    for number in range(60):
        talk.add(f"Visitor {number} came to the garden.", f"The garden welcomed visitor {number}.")
    assert talk.summary()
    (item,) = memory.knowledge()
    assert item.content in (TEA, "Every morning I drink green tea")
    assert item.validation_count == 2
    assert memory.consolidate() == []


def test_the_command_consolidates(path):
    with open_memory(path) as memory:
        for session in "ab":
            memory.remember(TEA, session_id=session)
    result = CliRunner().invoke(main, ["memory", "consolidate", "--file", str(path)])
    assert result.exit_code == 0, result.output
    assert f"0.75  {TEA}" in result.output
    assert result.output.endswith("1 facts that were told more than once\n")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The heating in the hall is on.", "The heating in the hall is off."),
        ("Anna owes Tom 50 euros.", "Tom owes Anna 50 euros."),
        ("The train goes from Rome to Paris.", "The train goes from Paris to Rome."),
        ("We need beds for 2 adults and 3 kids.", "We need beds for 3 adults and 2 kids."),
        ("My sister Anna lives in Rome.", "Does my sister Anna live in Rome?"),
        ("Call her before lunch.", "Call her after lunch."),
    ],
)
def test_what_says_the_opposite_or_asks_makes_no_knowledge_and_is_no_echo(path, one, other):
    with open_memory(path) as memory:
        for session, text in zip("ab", (one, other), strict=True):
            memory.remember(text, session_id=session)
        assert memory.consolidate() == []
        again = memory.remember(other, memory_type="knowledge", source="tool")
        memory.forget(*[item.memory_id for item in memory.items() if item.content == other])
        assert memory.remember(other, memory_type="knowledge", source="tool") != again or other.endswith("?")


def test_a_question_asked_twice_is_no_knowledge(path):
    with open_memory(path) as memory:
        for session in "abc":
            memory.remember("Where does my sister Anna live?", session_id=session)
        assert memory.consolidate() == []


def test_knowledge_that_was_forgotten_itself_is_not_made_anew_at_once(path):
    with open_memory(path) as memory:
        for session in "ab":
            memory.remember("My dog is called Rex.", session_id=session)
        (fact,) = memory.consolidate()
        assert memory.forget(fact.knowledge_id) == [fact.knowledge_id]
        assert memory.knowledge() == []
        assert len(memory) == 2


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ("The report is due on Friday.", "You told me that the report was due on Friday."),
        ("The heating is on.", "As you mentioned, the heating was on."),
        ("Anna pays Tom every Monday.", "You said that Anna pays Tom every Monday."),
    ],
)
def test_reported_speech_is_still_an_echo(path, known, said):
    with open_memory(path) as memory:
        first = memory.remember(known, memory_type="knowledge")
        assert memory.remember(said, memory_type="knowledge", source="agent") == first
        assert len(memory) == 1
