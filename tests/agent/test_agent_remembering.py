"""What is kept of a talk, and that forgetting reaches it: turns that were shown, notes of the agent, a lost session."""

import pytest
from helpers import Scripted, agent_of, call
from memory.helpers import everything, open_memory

from agentlab.agent.recalling import Recall
from agentlab.agent.tools import builtin, execute

LOCK = "The code of my bike lock is zebra4711."
NOTE = "Cycling to the office in Oslo every morning begins with typing zebra4711."
ANSWER = "Type zebra4711, then ride carefully through the rainy streets."


def told_and_noted(memory):
    """Two turns, the second of which answers and notes from the first; the agent and the results."""
    engine = Scripted("Good to know!", call("remember", text=NOTE), ANSWER)
    agent = agent_of(engine=engine, memory=memory, builtin_tools=True)
    return agent, agent.ask(LOCK, session_id="s1"), agent.ask("How do I open it?", session_id="s1")


def id_of(memory, content):
    return next(item.memory_id for item in memory.items() if item.content == content)


def test_turns_that_were_shown_count_as_used(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        _, first, second = told_and_noted(memory)
        assert first.context_used == []
        assert {id_of(memory, LOCK), id_of(memory, "Good to know!")} <= set(second.context_used)
        assert memory.get(id_of(memory, NOTE)).derived_from == [id_of(memory, LOCK)]
        assert id_of(memory, NOTE) not in second.context_used


def test_a_forgotten_turn_is_gone_from_later_answers_and_notes(tmp_path):
    path = tmp_path / "memory.db"
    with open_memory(path) as memory:
        agent, *_ = told_and_noted(memory)
        note = id_of(memory, NOTE)
        gone = memory.forget(id_of(memory, LOCK))
        assert note in gone
        assert memory.conversation("s1").turns() == []
        agent.close()
    assert not any(b"zebra4711" in held for held in everything(path).values())


def test_a_secret_that_the_agent_itself_repeated_is_gone_from_later_answers(tmp_path):
    path = tmp_path / "memory.db"
    engine = Scripted("Noted, zebra4711 stays between the two of us.", ANSWER)
    with open_memory(path) as memory, agent_of(engine=engine, memory=memory) as agent:
        agent.ask(LOCK, session_id="s1")
        agent.ask("How do I open it?", session_id="s1")
        memory.forget(id_of(memory, LOCK))
    assert not any(b"zebra4711" in held for held in everything(path).values())


def test_undo_takes_the_notes_of_the_turn_along(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        told_and_noted(memory)
        memory.conversation("s1").undo()
        assert {item.content for item in memory.items()} == {LOCK, "Good to know!"}


@pytest.mark.parametrize("ending", ["deadline", "cancelled", "failed"])
def test_a_turn_that_noted_something_is_taken_back_with_its_note_however_it_ended(tmp_path, ending):
    with open_memory(tmp_path / "memory.db") as memory:
        agent_of("Hello there.", memory=memory).ask("Good morning!", session_id="s1")
        end = RuntimeError("the model broke") if ending == "failed" else "Noted, it is noted, " * 90
        engine = Scripted(call("remember", text="The dentist is Dr. Lee."), end, token_s=0.02)
        agent = agent_of(engine=engine, memory=memory, builtin_tools=True)

        def stop(step):
            if ending == "cancelled" and step.kind == "observed":
                agent.cancel()

        deadline_s = 3 if ending == "deadline" else None
        result = agent.ask("Note who treats my teeth.", session_id="s1", deadline_s=deadline_s, on_step=stop)
        assert result.state == ending
        agent.stored()
        talk = memory.conversation("s1")
        assert [(turn.user_input, turn.agent_response) for turn in talk.turns()] == [
            ("Good morning!", "Hello there."), ("Note who treats my teeth.", "…"),
        ]  # fmt: skip
        assert "The dentist is Dr. Lee." in {item.content for item in memory.items()}
        assert "…" not in {item.content for item in memory.items()}
        assert talk.undo().user_input == "Note who treats my teeth."
        assert {item.content for item in memory.items()} == {"Good morning!", "Hello there."}


def test_undo_leaves_a_memory_that_the_note_only_repeats(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        known = memory.remember("Aiko prefers tea.", memory_type="knowledge")
        engine = Scripted(call("remember", text="Aiko prefers tea."), "I keep that in mind for the visit.")
        agent_of(engine=engine, memory=memory, builtin_tools=True).ask("What about our guest?", session_id="s1")
        memory.conversation("s1").undo()
        assert [item.memory_id for item in memory.items()] == [known]


def test_the_turns_of_a_summary_count_as_used(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        talk = memory.conversation("s1", summariser=lambda turns: turns[0].user_input)
        talk.add(LOCK, "Good to know!")
        talk.add("word " * 5000, "That was long.")
        assert LOCK in [part.text for part in talk.summary()]
        recall = Recall(memory, "s1", count=0)
        assert LOCK in recall.look_up("How do I open it?").text
        assert id_of(memory, LOCK) in recall.used


def test_what_is_not_shown_a_second_time_was_shown_all_the_same(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        known = memory.remember(LOCK)
        recall = Recall(memory, history=[{"role": "user", "content": LOCK}])
        assert recall.look_up("What is the code of my bike lock?") is None
        assert recall.used == [known]


def test_a_note_says_what_it_was_made_from(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        source, noted = memory.remember(LOCK), []
        made = builtin.remember(memory, "s1", derived_from=lambda: [source], on_remembered=noted.append)
        execute(made, {"text": NOTE}, timeout_s=20)
        execute(made, {"text": NOTE}, timeout_s=20)  # told again, it is no new one
        assert [memory.get(one).derived_from for one in noted] == [[source]]


def test_a_note_about_something_else_outlives_what_was_shown_beside_it(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        shown, noted = [memory.remember(LOCK), memory.remember("Aiko prefers tea.")], []
        made = builtin.remember(memory, derived_from=lambda: [*shown, "m-gone"], on_remembered=noted.append)
        execute(made, {"text": "The guest Aiko arrives on Tuesday."}, timeout_s=20)
        assert memory.get(noted[0]).derived_from == shown[1:]
        memory.forget(shown[0])
        assert memory.get(noted[0]).content == "The guest Aiko arrives on Tuesday."


def test_a_memory_that_is_too_long_is_shortened_and_not_left_out(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        filler = "Nothing about it is written in this sentence here. " * 12
        memory.remember(f"{filler}The code of the garage door is {'9 ' * 3}tiger. {filler}")
        memory.remember("The code of the front door is 4711.")
        recall = Recall(memory, context_tokens=160)
        found = recall.look_up("What is the code of the garage door and the front door?")
        assert "The code of the garage door is" in found.text
        assert "The code of the front door is 4711." in found.text
        assert len(found.text) < 400
        assert set(found.memory_ids) == set(recall.used) == {item.memory_id for item in memory.items()}


def test_a_talk_goes_on_after_its_session_was_forgotten(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        talk = memory.conversation("s1", user_id="tomas")
        talk.add("My cat is called Miezi.", "Hello Miezi.")
        memory.forget(session_id="s1")
        assert talk.summary() == []
        talk.add("My dog is called Rex.", "Hello Rex.")
        assert [turn.user_input for turn in talk.turns()] == ["My dog is called Rex."]
        (session,) = memory.sessions()
        assert (session.session_id, session.user_id, session.conversation_count) == ("s1", "tomas", 1)
        memory.forget(session_id="s1")
        empty = talk.session()  # as before its first turn
        assert (empty.conversation_count, empty.summary, empty.active_memories) == (0, "", [])
        assert memory.sessions() == []
        talk.prefer(language="de")
        assert talk.session().preferences == {"language": "de"}


def test_a_turn_is_kept_whatever_characters_the_model_wrote(tmp_path):
    engine = Scripted("Hello \x00 there, \ud83d it is me.", "\x00")
    with open_memory(tmp_path / "memory.db") as memory, agent_of(engine=engine, memory=memory) as agent:
        results = [agent.ask(f"Who is there, {number}?", session_id="s1") for number in range(2)]
        assert [result.warnings for result in results] == [[], []]
        kept = [turn.agent_response for turn in memory.conversation("s1").turns()]
    assert kept == ["Hello \ufffd there, \ufffd it is me.", "\ufffd"]
