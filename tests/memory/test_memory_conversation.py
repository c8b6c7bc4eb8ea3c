"""Talk over many turns and restarts: the window, the summary and its sources, contexts in few tokens."""

import pytest

from agentlab.errors import MemoryStoreError
from agentlab.memory.compression import Part, count_tokens, extract, fit
from agentlab.memory.conversation import SUMMARY_AT, SUMMARY_LIMIT, WINDOW

from .helpers import contents, open_memory


def talk_about(talk, count, start=0, words=6):
    for number in range(start, start + count):
        filler = " ".join(f"detail{number}x{i}" for i in range(words))
        talk.add(f"Visitor {number} came to the garden with {filler}.", f"The garden welcomed visitor {number}.")


def test_turns_and_what_they_tell_are_kept(memory):
    talk = memory.conversation("s1", user_id="ana")
    turn = talk.add("I am allergic to hazelnuts.", "I will remember that.", tags=["health"], metadata={"mood": "calm"})
    assert turn.session_id == "s1"
    (stored,) = talk.turns()
    assert stored == turn
    hit = memory.recall("allergic hazelnuts", k=1)[0]
    assert (hit.source, hit.session_id, hit.tags) == ("person", "s1", ["health"])
    assert "agent" in {item.source for item in memory.items(session_id="s1")}


def test_what_the_agent_repeats_is_in_the_turn_and_no_memory(memory):
    talk = memory.conversation("s")
    talk.add("The boiler was repaired in March.", "Understood, the boiler was repaired in March.")
    known = memory.recall("boiler", k=1)[0].memory_id
    talk.add("When was the boiler repaired?", "The boiler was repaired in March.", context_used=[known])
    assert [turn.agent_response for turn in talk.turns()][1] == "The boiler was repaired in March."
    assert len(memory.search("boiler", 10)) == 2, "the fact and the question"
    assert talk.session().active_memories == [known]


def test_a_session_survives_restarts(path):
    with open_memory(path) as memory:
        talk = memory.conversation("s1", user_id="ana")
        talk.prefer(language="ja", tone="short")
        talk.prefer(tone=None)
        talk_about(talk, 3)
        before = talk.session()
    with open_memory(path) as memory:
        talk = memory.conversation("s1")
        assert talk.session() == before
        assert before.user_id == "ana"
        assert before.preferences == {"language": "ja"}
        assert before.conversation_count == 3
        assert before.start_time <= before.last_activity
        talk_about(talk, 1, start=3)
        assert [session.session_id for session in memory.sessions()] == ["s1"]
        assert len(talk.window()) == 4


def test_the_window_is_fifty_turns_and_the_rest_is_summarised_with_sources(path):
    with open_memory(path) as memory:
        talk = memory.conversation("s")
        talk_about(talk, WINDOW + 10, words=1)
        window = talk.window()
        assert len(window) <= WINDOW
        assert window[-1].user_input.startswith(f"Visitor {WINDOW + 9} ")
        summary = talk.summary()
        older = {turn.conversation_id for turn in talk.turns(1000)} - {turn.conversation_id for turn in window}
        assert len(talk.turns(1000)) == WINDOW + 10, "nothing is deleted"
        assert summary
        assert {source for part in summary for source in part.sources} <= older
        said = {turn.conversation_id: turn.user_input + " " + turn.agent_response for turn in talk.turns(1000)}
        assert all(part.text in said[part.sources[0]] for part in summary)
        assert talk.session().summary == " ".join(part.text for part in summary)
    with open_memory(path) as memory:
        assert memory.conversation("s").summary() == summary


def test_summarising_begins_past_two_thousand_tokens(memory):
    talk = memory.conversation("s")
    number = 0

    def tokens(turns):
        return sum(count_tokens(turn.user_input) + count_tokens(turn.agent_response) for turn in turns)

    while True:
        before = tokens(talk.window())
        talk_about(talk, 1, start=number, words=40)
        number += 1
        if talk.summary():
            break
        assert tokens(talk.window()) <= SUMMARY_AT
    assert number < WINDOW
    assert before <= SUMMARY_AT
    assert tokens(talk.window()) <= SUMMARY_AT / 2
    assert sum(count_tokens(part.text) for part in talk.summary()) <= SUMMARY_LIMIT
    talk_about(talk, 60, start=number, words=40)
    assert sum(count_tokens(part.text) for part in talk.summary()) <= SUMMARY_LIMIT
    assert tokens(talk.window()) <= SUMMARY_AT


def test_an_injected_summariser_is_asked_and_its_sources_kept(memory):
    asked = []

    def summariser(turns):
        asked.append([turn.conversation_id for turn in turns])
        return f"{len(turns)} visitors came. " + "They saw roses. " * 20

    talk = memory.conversation("s", summariser=summariser)
    talk_about(talk, 120, words=1)
    assert len(asked) > 1
    covered = {source for part in talk.summary() for source in part.sources}
    assert covered == {turn.conversation_id for turn in talk.turns(1000)} - {
        turn.conversation_id for turn in talk.window()
    }
    assert sum(count_tokens(part.text) for part in talk.summary()) <= SUMMARY_LIMIT


@pytest.mark.parametrize("budget", [0, 5, 40, 120, 500, 5000])
def test_a_context_never_exceeds_its_budget(memory, budget):
    talk = memory.conversation("s")
    talk_about(talk, 60)
    long = memory.remember(
        " ".join(f"Paragraph {i} is about nothing." for i in range(100)) + " The greenhouse key hangs behind the clock."
        + " ".join(f" Paragraph {i} is about nothing." for i in range(100)), memory_type="knowledge",
    )  # fmt: skip
    context = talk.context("Where is the greenhouse key?", budget)
    assert context.tokens <= budget
    assert count_tokens(context.text) <= budget
    if budget >= 120:
        assert "greenhouse key hangs behind the clock" in context.text
        assert context.used[0] == long
        assert "Visitor 59" in context.text
    if budget == 5000:
        assert talk.summary()[0].text in context.text
        assert "Visitor 58" in context.text
    assert context.left_out > 0 or budget == 5000


def test_the_context_counts_with_the_given_tokenizer(memory):
    talk = memory.conversation("s", tokens=len)
    talk_about(talk, 5)
    assert len(talk.context("visitor", 300).text) <= 300


def test_extracting_prefers_what_comes_back_and_drops_repeats():
    parts = [
        Part("The bridge was closed. It rained.", ["a"]),
        Part("The bridge was closed again by the mayor.", ["b"]),
        Part("The bridge was closed.", ["c"]),
        Part("Hm.", ["d"]),
    ]
    chosen = extract(parts, 12, count_tokens)
    assert chosen[0].text.startswith("The bridge was closed")
    assert sum(count_tokens(part.text) for part in chosen) <= 12
    assert len({part.text for part in chosen}) == len(chosen)
    assert extract([], 100, count_tokens) == []
    everything = extract(parts, 1000, count_tokens)
    assert [part.sources for part in everything] == sorted(part.sources for part in everything), "in their order"


def test_an_empty_context_is_empty():
    context = fit("anything", 100, [], [], [], count_tokens)
    assert (context.text, context.tokens, context.used, context.left_out) == ("", 0, [], 0)


def test_tokens_of_japanese_are_counted_by_character():
    assert count_tokens("今日は晴れです") == 7
    assert count_tokens("12345678") == 2


def test_empty_turns_are_refused(memory):
    with pytest.raises(MemoryStoreError, match="session_id"):
        memory.conversation(" ")
    talk = memory.conversation("s")
    with pytest.raises(MemoryStoreError, match="user_input"):
        talk.add("", "x")
    with pytest.raises(MemoryStoreError, match="agent_response"):
        talk.add("x", "")
    assert talk.turns() == []
    assert contents(memory.recall("x", words_only=True)) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"metadata": {"a": float("nan")}}, "metadata"), ({"metadata": {"a": object()}}, "metadata"),
        ({"metadata": {"a": "\ud800"}}, "half a surrogate pair"), ({"context_used": [""]}, "context_used"),
        ({"context_used": [5]}, "context_used"), ({"notes": [""]}, "notes"), ({"tags": [" "]}, "tags"),
        ({"timestamp": "yesterday"}, "timestamp"),
    ],
)  # fmt: skip
def test_what_an_export_could_not_hold_is_refused_before_anything_is_stored(memory, values, words):
    talk = memory.conversation("s1")
    with pytest.raises(MemoryStoreError, match=words):
        talk.add("I live in Ghent.", "Noted, Ghent.", **values)
    assert (len(list(memory.items())), talk.turns()) == (0, [])


def test_who_talks_and_what_they_prefer_can_be_exported(memory, tmp_path):
    for user in (" ", "\x00"):
        with pytest.raises(MemoryStoreError, match="user_id"):
            memory.conversation("s1", user_id=user)
    talk = memory.conversation("s1", user_id="ana")
    talk.prefer(tone="short")
    with pytest.raises(MemoryStoreError, match="allowed: a dict of what JSON can hold"):
        talk.prefer(speed=float("nan"))
    assert talk.session().preferences == {"tone": "short"}
    assert memory.export(tmp_path / "out.jsonl") == 0


@pytest.mark.parametrize("said", ["", " ", "a\x00b", "\ud800", None])
def test_a_summariser_that_says_nothing_leaves_what_the_turns_say(path, tmp_path, said):
    with open_memory(path) as memory:
        talk = memory.conversation("s1", summariser=lambda turns: said)
        talk_about(talk, WINDOW + 3)
        assert talk.summary()
        assert all(part.text.strip() and part.sources for part in talk.summary())
        memory.export(tmp_path / "out.jsonl")
        with open_memory(tmp_path / "other.db") as other:
            other.import_(tmp_path / "out.jsonl")
            assert other.conversation("s1").summary() == talk.summary()
