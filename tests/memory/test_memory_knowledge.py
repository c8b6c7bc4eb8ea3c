"""Knowledge that talk tells and that is told directly, too: counted right, and gone with the last who told it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentlab.memory import sealed
from agentlab.memory.consolidation import confidence

from .helpers import contents, everything, open_memory

TEXT = "My cat is called Momo."


def tell(memory, *sessions):
    return [memory.remember(TEXT, session_id=session) for session in sessions]


def directly(memory, session=None, **fields):
    return memory.remember(TEXT, memory_type="knowledge", session_id=session, **fields)


def counted(memory):
    """Of the only knowledge: how often it was told, how many sources it names, and how sure it is."""
    (fact,) = memory.knowledge()
    assert fact.confidence == pytest.approx(confidence(fact.validation_count))
    assert memory.get(fact.knowledge_id).derived_from == fact.source_conversations
    return fact.validation_count, len(fact.source_conversations)


def left(memory):
    """How many rows of memories and what belongs to them are left, and whether a byte of the text is."""
    count = "SELECT count(*) FROM {}"
    tables = ("memories", "knowledge", "tellings", "sources")
    rows = [memory._core.store.db.execute(count.format(table)).fetchone()[0] for table in tables]
    return rows, any(b"momo" in data.lower() for data in everything(memory.path).values())


def test_a_session_that_told_a_source_and_the_knowledge_itself_is_forgotten(path):
    with open_memory(path) as memory:
        tell(memory, "a", "b")
        memory.consolidate()
        directly(memory, "a")
        memory.forget(session_id="a")
        assert [(item.session_id, item.content) for item in memory.items()] == [("b", TEXT)]
        assert memory.doctor().clean
        memory.forget(session_id="b")
        assert left(memory) == ([0, 0, 0, 0], False)


def test_it_stays_where_another_session_told_it_directly_too(path):
    with open_memory(path) as memory:
        tell(memory, "a", "b")
        memory.consolidate()
        for session in "ac":
            directly(memory, session)
        memory.forget(session_id="a")
        assert sorted(item.session_id for item in memory.items()) == ["b", "c"]
        memory.forget(session_id="c")
        assert [item.session_id for item in memory.items()] == ["b"]
        memory.forget(session_id="b")
        assert left(memory) == ([0, 0, 0, 0], False)


def test_a_session_leaves_a_note_that_it_derived_and_another_told(path):
    with open_memory(path) as memory:
        source = memory.remember("Something long about the cat and its name.", session_id="a")
        other = memory.remember("Something else about the cat.", session_id="c")
        directly(memory, "a", source="agent", derived_from=[source, other])
        directly(memory, "b")
        memory.forget(session_id="a")
        (item,) = memory.items(session_id="b")
        assert (item.session_id, item.validation_count, item.derived_from) == ("b", 1, [])
        memory.forget(other)
        assert contents(memory.items()) == [TEXT], "what b told derives from nothing"
        assert memory.doctor().clean


def test_knowledge_keeps_the_sources_that_stay_where_they_suffice(path):
    with open_memory(path) as memory:
        first, *rest = tell(memory, "a", "b", "c")
        (fact,) = memory.consolidate()
        directly(memory, "d")
        memory.forget(first)
        assert memory.knowledge()[0].source_conversations == sorted(rest)
        assert (memory.knowledge()[0].knowledge_id, counted(memory)) == (fact.knowledge_id, (3, 2))
        assert memory.consolidate() == []
        tell(memory, "e")
        assert [one.knowledge_id for one in memory.consolidate()] == [fact.knowledge_id]
        assert counted(memory) == (4, 3)
        memory.forget(rest[0])
        memory.forget(rest[1])
        assert memory.knowledge() == []
        (item,) = memory.items(memory_type="knowledge")
        assert (item.session_id, item.validation_count, item.derived_from) == ("d", 1, [])
        assert memory.doctor().clean


def test_knowledge_loses_the_tags_of_a_source_that_goes(path):
    with open_memory(path) as memory:
        gone = memory.remember(TEXT, session_id="a", tags=["private"])
        tell(memory, "b", "c")
        (fact,) = memory.consolidate()
        directly(memory, tags=["kept"])
        memory.forget(gone)
        assert memory.get(fact.knowledge_id).tags == ["kept"]
        for view in (memory, open_memory(path)):
            assert view.recall("cat", tags=["private"], count=False) == []
            assert contents(view.recall("cat", tags=["kept"], count=False)) == [TEXT]


def test_what_was_told_directly_first_is_what_talk_makes_knowledge(path):
    with open_memory(path) as memory:
        known = directly(memory, "d", tags=["pets"])
        tell(memory, "a", "b")
        (fact,) = memory.consolidate()
        assert fact.knowledge_id == known
        assert counted(memory) == (3, 2)
        assert [item.memory_id for item in memory.items(session_id="d")] == [known]
        memory.forget(session_id="d")
        assert counted(memory) == (2, 2)
        assert list(memory.items(session_id="d")) == []
        assert (memory.get(known).session_id, memory.get(known).tags) == (None, [])
        assert memory.doctor().clean


def test_a_note_with_sources_of_its_own_is_not_taken_for_knowledge(path):
    with open_memory(path) as memory:
        source = memory.remember("Something long about the cat and its name.", session_id="n")
        note = directly(memory, "n", source="agent", derived_from=[source])
        tell(memory, "a", "b")
        (fact,) = memory.consolidate()
        assert fact.knowledge_id != note
        memory.forget(session_id="n")
        assert counted(memory) == (2, 2)


def test_knowledge_found_anew_counts_what_was_told_directly(path):
    with open_memory(path) as memory:
        first, _ = tell(memory, "a", "b")
        (fact,) = memory.consolidate()
        directly(memory, "d")
        memory.forget(first)
        assert memory.knowledge() == []
        tell(memory, "c")
        assert [one.knowledge_id for one in memory.consolidate()] == [fact.knowledge_id]
        assert counted(memory) == (3, 2)


def test_what_is_told_directly_outside_of_any_session_counts(path):
    with open_memory(path) as memory:
        first, second = tell(memory, "a", "b")
        (fact,) = memory.consolidate()
        assert directly(memory) == fact.knowledge_id
        third = tell(memory, "c")[0]
        memory.consolidate()
        assert counted(memory) == (4, 3)
        memory.forget(first, second, third)
        (item,) = memory.items()
        assert (item.memory_id, item.validation_count, item.source) == (fact.knowledge_id, 1, "person")
        assert memory.doctor().clean


@pytest.mark.parametrize("told", [None, "a", "d"])
def test_knowledge_follows_what_is_taken_back(path, told):
    with open_memory(path) as memory:
        talk = memory.conversation("a")
        talk.add(TEXT, "Noted.")
        talk.add(TEXT, "You said so.")
        (fact,) = memory.consolidate()
        assert counted(memory) == (2, 1)
        note = memory.remember("The cat of the house is Momo.", source="agent", memory_type="pattern",
                               derived_from=[fact.knowledge_id])  # fmt: skip
        if told:
            directly(memory, told)
        talk.undo()
        assert memory.knowledge() == [], "told once in talk is no knowledge"
        assert memory.consolidate() == []
        there = [(item.session_id, item.validation_count) for item in memory.items(memory_type="knowledge")]
        assert there == ([(told, 1)] if told else [])
        talk.undo()
        assert (memory.peek(note) is None) == (told is None)
        assert TEXT not in contents(memory.items()) or told
        assert memory.doctor().clean


def test_knowledge_of_others_counts_what_is_taken_back_once_less(path):
    with open_memory(path) as memory:
        tell(memory, "a", "b")
        talk = memory.conversation("c")
        talk.add(TEXT, "Noted.")
        talk.add(TEXT, "You said so.")
        memory.consolidate()
        assert counted(memory) == (4, 3)
        talk.undo()
        assert counted(memory) == (3, 3)
        talk.undo()
        assert counted(memory) == (2, 2)
        assert memory.doctor().clean


def test_an_export_carries_what_was_told_directly(path, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    with open_memory(path) as memory:
        tell(memory, "a", "b")
        memory.consolidate()
        directly(memory, "d")
        memory.export(one)
    with open_memory(tmp_path / "copy.db") as copy:
        copy.import_(one)
        copy.export(two)
        assert one.read_text() == two.read_text()
        assert counted(copy) == (3, 2)
        for session in "abd":
            copy.forget(session_id=session)
        assert left(copy) == ([0, 0, 0, 0], False)


def test_a_telling_as_the_third_schema_noted_it_is_read_right(path, tmp_path):
    """What consolidation had counted stood there as told outside of any session, where a session told it, too."""
    with open_memory(path) as memory:
        tell(memory, "a", "b")
        (fact,) = memory.consolidate()
        directly(memory, "d")
        memory._core.store.db.execute(
            "INSERT OR REPLACE INTO tellings SELECT memory_id, '', 2, '[]', 'agent', 'consolidation', 0 FROM tellings"
        )
        values = [fact.knowledge_id, "", 2, "[]", "agent", "consolidation"]
        memory._core.store.db.execute(
            "UPDATE tellings SET checksum = ? WHERE session_id = ''", (sealed.seal("tellings", values),)
        )
        memory.export(tmp_path / "old.jsonl")
        with open_memory(tmp_path / "copy.db") as copy:
            copy.import_(tmp_path / "old.jsonl")
            copy.forget(session_id="d")
            assert counted(copy) == (2, 2)
        tell(memory, "c")
        memory.consolidate()
        assert counted(memory) == (4, 3)
        directly(memory)
        tell(memory, "c")
        memory.consolidate()
        assert counted(memory) == (6, 3)
        memory.forget(session_id="a")
        memory.forget(session_id="b")
        memory.forget(session_id="c")
        (item,) = memory.items()
        assert (item.validation_count, item.source) == (2, "person")
        assert memory.doctor().clean


SESSIONS = st.sampled_from("abc")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("talk"), SESSIONS),
        st.tuples(st.just("turn"), SESSIONS),
        st.tuples(st.just("directly"), st.sampled_from(["a", "b", "c", None])),
        st.tuples(st.just("undo"), SESSIONS),
        st.tuples(st.just("forget"), SESSIONS),
        st.tuples(st.just("consolidate"), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_whatever_happens_it_is_there_as_often_as_it_was_told(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("known") / "memory.db"
    talked, turns, direct = [], [], []  # sessions, one for each telling
    with open_memory(path) as memory, open_memory(path) as onlooker:  # who recalls it and says it again would echo it
        for what, session in steps:
            if what == "talk":
                tell(memory, session)
                talked.append(session)
            elif what == "turn":
                memory.conversation(session).add(TEXT, "Hm.", cut_off=True)
                turns.append(session)
            elif what == "directly":
                directly(memory, session)
                direct.append(session)
            elif what == "undo":
                if memory.conversation(session).undo() is not None:
                    turns.remove(session)
            elif what == "forget":
                memory.forget(session_id=session)
                talked, turns, direct = ([one for one in told if one != session] for told in (talked, turns, direct))
            else:
                memory.consolidate()
                if len(talked + turns) > 1:
                    assert counted(memory) == (len(talked + turns + direct), len(set(talked + turns)))
                else:
                    assert memory.knowledge() == []
            for name in "abc":
                there = [item.memory_type for item in memory.items(session_id=name)]
                assert there.count("conversation") == (name in talked + turns)
                assert there.count("knowledge") == (name in direct)
                found = contents(onlooker.recall("cat Momo", session_id=name, count=False))
                assert found == [TEXT] * len(there)
            assert memory.doctor().problems == []
        for name in "abc":
            memory.forget(session_id=name)
        assert contents(memory.items()) == [TEXT][: direct.count(None)]
        memory.forget(*[item.memory_id for item in memory.items()])
        assert left(memory) == ([0, 0, 0, 0], False)
