"""Words told in several sessions: found from each of them, and forgotten only with the last."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentlab.errors import MemoryStoreError
from agentlab.memory import Memory, MemoryItem, sealed
from agentlab.memory.chunks import chunk_checksum
from agentlab.memory.columns import Filter
from agentlab.memory.schema import VERSION

from .helpers import HashingEmbedder, contents, everything, flip, open_memory

TEXT = "The boiler is in the cellar."


def tell(memory, session, tags=(), source="person"):
    return memory.remember(TEXT, memory_type="knowledge", session_id=session, tags=tags, source=source)


def found(memory, session):
    return contents(memory.recall("boiler cellar", session_id=session, count=False))


@pytest.fixture
def shared(path):
    """One memory that was told in session a, twice in b, and outside of any session."""
    with open_memory(path) as memory:
        memory.remember("The attic is empty.", memory_type="knowledge", session_id="a")
        ids = [tell(memory, session, tags) for session, tags in (("a", ["x"]), ("b", ["y"]), ("b", []), (None, []))]
        assert len(set(ids)) == 1
        yield memory


def test_every_session_finds_what_it_told(shared):
    memory_id = shared.search("boiler")[0].memory_id
    assert found(shared, "a")[0] == found(shared, "b")[0] == TEXT
    assert found(shared, "c") == []
    assert [item.memory_id for item in shared.items(session_id="b")] == [memory_id]
    whole = shared.get(memory_id)
    assert (whole.session_id, whole.told_in, whole.validation_count) == ("a", ["a", "b"], 4)
    assert shared.peek(shared.search("attic")[0].memory_id).told_in == []
    with open_memory(shared.path) as anew:
        assert found(anew, "b")[0] == TEXT


def test_forgetting_a_session_leaves_what_another_told_too(shared):
    (attic,) = (item for item in shared.items() if "attic" in item.content)
    assert shared.forget(session_id="a") == [attic.memory_id]
    (item,) = shared.items()
    assert (item.content, item.validation_count, item.tags) == (TEXT, 3, ["y"])
    assert found(shared, "a") == []
    assert found(shared, "b") == [TEXT]
    assert shared.forget(session_id="b") == []
    (item,) = shared.items()
    assert (item.session_id, item.validation_count, item.tags) == (None, 1, [])
    assert contents(shared.recall("boiler", tags=["y"])) == []
    assert shared.doctor().clean


def test_the_last_session_takes_it_along(path):
    with open_memory(path) as memory:
        memory_id = tell(memory, "a")
        tell(memory, "b")
        assert memory.forget(session_id="b") == []
        assert memory.forget(session_id="a") == [memory_id]
        assert len(memory) == 0
        assert memory.doctor().clean


def test_a_session_that_is_forgotten_leaves_no_byte_of_its_name_and_tags(path):
    with open_memory(path) as memory:
        tell(memory, "b")
        tell(memory, "Zebrafinch7731", ["Quokka9"])
        memory.forget(session_id="Zebrafinch7731")
        left = b"".join(everything(path).values()).lower()
        assert b"zebrafinch7731" not in left
        assert b"quokka9" not in left
        assert found(memory, "b") == [TEXT]


def test_forgetting_it_by_its_id_forgets_it_everywhere(shared):
    memory_id = shared.search("boiler")[0].memory_id
    assert shared.forget(memory_id) == [memory_id]
    assert shared._core.store.db.execute("SELECT count(*) FROM tellings").fetchone() == (0,)
    assert shared.doctor().clean


def test_what_only_a_tool_still_says_is_no_longer_the_persons(path):
    with open_memory(path) as memory:
        tell(memory, "a", source="tool")
        tell(memory, "b")
        assert next(memory.items()).source == "person"
        memory.forget(session_id="b")
        assert next(memory.items()).source == "tool"


def test_knowledge_that_was_told_directly_too_stays_there_when_its_sources_go(path):
    with open_memory(path) as memory:
        for session in "ac":
            memory.remember("My dog is called Rex.", session_id=session)
        (fact,) = memory.consolidate()
        told = memory.remember("My dog is called Rex.", session_id="b", memory_type="knowledge")
        assert told == fact.knowledge_id
        memory.forget(session_id="a")
        assert "My dog is called Rex." in contents(memory.recall("dog", session_id="b"))
        item = memory.get(told)
        assert (item.session_id, item.source, item.validation_count, item.derived_from) == ("b", "person", 1, [])
        assert memory.knowledge() == []
        assert memory.doctor().clean


def test_consolidation_keeps_count_of_what_was_told_directly(path):
    text = "My dog is called Rex."
    with open_memory(path) as memory:
        for session in "ac":
            memory.remember(text, session_id=session)
        (fact,) = memory.consolidate()
        for _ in range(2):
            memory.remember(text, session_id="b", memory_type="knowledge")
        memory.remember(text, session_id="a")
        memory.consolidate()
        assert memory.get(fact.knowledge_id).validation_count == 5
        assert memory.knowledge()[0].confidence == pytest.approx(1 - 0.5**5)
        assert memory.consolidate() == []
        memory.forget(session_id="b")
        left = memory.get(fact.knowledge_id)
        assert (left.validation_count, left.source, left.session_id) == (3, "agent", None)
        assert memory.doctor().clean


def test_a_note_that_the_person_told_elsewhere_outlives_its_source(path):
    note = "Boiler in cellar needs new valve 77."
    with open_memory(path) as memory:
        source = memory.remember("Long source about the boiler and the cellar.", session_id="a")
        memory.remember(
            note, session_id="a", memory_type="knowledge", source="agent", derived_from=[source], tags=["agents"]
        )
        memory.remember(note, session_id="b", memory_type="knowledge")
        memory.forget(source)
        assert contents(memory.items()) == [note]
        (item,) = memory.items()
        assert (item.session_id, item.source, item.tags) == ("b", "person", [])
        assert memory.doctor().clean


def test_undo_leaves_what_was_told_outside_the_turn(path):
    with open_memory(path) as memory:
        talk = memory.conversation("s")
        talk.add("My cat is called Momo", "Nice name there")
        memory.remember("My cat is called Momo", session_id="s")
        talk.undo()
        (item,) = memory.items()
        assert (item.content, item.validation_count) == ("My cat is called Momo", 1)
        note = memory.remember("The alarm code is 4711.", session_id="s", source="agent", memory_type="knowledge")
        talk.add("Please note my alarm code", "Done and noted", notes=[note])
        memory.remember("The alarm code is 4711.", session_id="b", memory_type="knowledge")
        talk.undo()
        left = memory.get(note)
        assert (left.session_id, left.source, left.validation_count) == ("b", "person", 1)
        assert len(memory) == 2
        assert memory.doctor().clean


def test_one_batch_tells_it_in_two_sessions(path):
    with open_memory(path) as memory:
        items = [MemoryItem(memory_id="", content=TEXT, memory_type="knowledge", session_id=s) for s in "aba"]
        assert len(set(memory.remember_many(items))) == 1
        assert found(memory, "b") == [TEXT]
        assert next(memory.items()).validation_count == 3
        memory.forget(session_id="a")
        assert next(memory.items()).validation_count == 1


def test_telling_it_again_neither_reads_nor_writes_what_other_sessions_told(path, monkeypatch):
    """Else the time of each telling grows with their number, and that of all with its square."""
    with open_memory(path) as memory:
        for number in range(30):
            tell(memory, f"session {number}")
        read, written, opened, inserted = [], [], sealed.opened, sealed.insert

        def opening(table, values, checksum):
            read.append(table)
            return opened(table, values, checksum)

        def inserting(db, table, values, **options):
            written.append(table)
            inserted(db, table, values, **options)

        monkeypatch.setattr(sealed, "opened", opening)
        monkeypatch.setattr(sealed, "insert", inserting)
        tell(memory, "session 7", ["x"])
        tell(memory, "session 30")
        assert (read.count("tellings"), written.count("tellings")) == (1, 2)
        monkeypatch.undo()
        for view in (memory, open_memory(path)):
            assert found(view, "session 30") == found(view, "session 7") == [TEXT]
        assert next(memory.items()).validation_count == 32
        memory.forget(session_id="session 7")
        assert (next(memory.items()).validation_count, next(memory.items()).tags) == (30, [])
        assert memory.doctor().clean


def test_an_export_carries_the_tellings(shared, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    shared.export(one)
    with open_memory(tmp_path / "copy.db") as copy:
        copy.import_(one)
        copy.export(two)
        assert one.read_text() == two.read_text()
        copy.import_(one)
        assert copy.get(copy.search("boiler")[0].memory_id).validation_count == 4
        assert found(copy, "b") == [TEXT]
    with open_memory(tmp_path / "other.db") as other:  # where the same words were told in a session of their own
        tell(other, "c", ["z"])
        other.import_(one)
        item = other.get(other.search("boiler")[0].memory_id)
        assert (item.told_in, item.validation_count) == (["a", "b", "c"], 5)
        other.forget(session_id="c")
        assert (found(other, "b"), found(other, "c")) == ([TEXT], [])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ('"times": -1', "times"), ('"times": "2"', "times"), ('"tags": "x"', "tags"),
        ('"source": "nobody"', "source"), ('"session_id": 5', "session_id"), (None, "session_id"),
    ],
)  # fmt: skip
def test_a_wrong_telling_in_an_export_is_refused_with_its_line(shared, tmp_path, wrong, said):
    out = tmp_path / "out.jsonl"
    shared.export(out)
    text = out.read_text()
    head, tail = text.split('"tellings": [{', 1)
    if wrong is None:
        tail = tail.replace('"session_id": "a", ', "", 1)
    else:
        name, first = wrong.split(":")[0], tail.index(wrong.split(":")[0])
        end = tail.index(", " if name != '"tags"' else "], ", first) + (name == '"tags"')
        tail = tail[:first] + wrong + tail[end:]
    out.write_text(f'{head}"tellings": [{{{tail}')
    with open_memory(tmp_path / "new.db") as new:
        with pytest.raises(MemoryStoreError, match=rf"line \d+.*{said}"):
            new.import_(out)
        assert len(new) == 0


def test_a_damaged_telling_is_found_and_repaired(shared, path):
    shared.close()
    raw = path.read_bytes()
    place = raw.index(b'ab["y"]person') if b'ab["y"]person' in raw else raw.index(b'["y"]person')
    flip(path, place + 2)
    with open_memory(path) as memory:
        problems = memory.doctor().problems
        assert any("telling" in problem for problem in problems), problems
    report = Memory.repair(path, embedder=HashingEmbedder())
    assert any("telling" in problem for problem in report.problems)
    with open_memory(path) as memory:
        assert memory.doctor().clean
        assert found(memory, "a")[0] == TEXT
        memory.forget(session_id="a")
        assert memory.doctor().clean


def test_a_file_of_the_second_schema_is_migrated(path):
    """`schema_2.db.gz` was written by the last version with that schema."""
    with gzip.open(Path(__file__).with_name("schema_2.db.gz")) as old:
        path.write_bytes(old.read())
    with open_memory(path) as memory:
        assert memory.stats()["schema_version"] == VERSION
        assert (memory.doctor().clean, len(memory)) == (True, 44)
        assert memory.conversation("s").session().preferences == {"tone": "short"}
        assert found(memory, "b") == ["My dog is called Rex"], "what merged before names its first session only"
        tell(memory, "c")
        assert found(memory, "c") == [TEXT]


def test_signatures_and_terms_of_an_older_schema_are_made_anew(path):
    with open_memory(path) as memory:
        kept = [memory.remember(text, **{"memory_type": "knowledge"}) for text in ("वह दिन है", "I write C++.")]
        store = memory._core.store
        for row in (1, 2):
            key = row << 12
            start, end, old, vector, _ = store.db.execute(
                'SELECT start, "end", terms, vector, checksum FROM chunks WHERE id = ?', (key,)
            ).fetchone()
            store.db.execute("INSERT INTO text_index(text_index, rowid, terms) VALUES ('delete', ?, ?)", (key, old))
            store.db.execute("INSERT INTO text_index(rowid, terms) VALUES (?, 'old words')", (key,))
            store.db.execute("UPDATE chunks SET terms = 'old words', checksum = ? WHERE id = ?",
                             (chunk_checksum(start, end, "old words", vector), key))  # fmt: skip
        store.db.execute("UPDATE memories SET signature = x'00'")
        store.db.execute("DROP TABLE tellings")
        store.db.execute("PRAGMA user_version = 2")
    with open_memory(path) as memory:
        assert memory.doctor().clean
        assert memory.remember("वह दिन है", memory_type="knowledge") == kept[0]
        assert memory.search("दिन")[0].memory_id == kept[0]
        assert memory.search("old words") == []


SESSIONS = st.sampled_from(["a", "b", "c", None])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("tell"), SESSIONS, st.integers(0, 2), st.booleans()),
        st.tuples(st.just("forget"), st.sampled_from("abc"), st.none(), st.booleans()),
    )
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_sessions_hold_what_was_told_in_them_and_nothing_else(tmp_path_factory, steps):
    """Against a plain multiset, in the view that did it, in one that looks on at times, and in one loaded anew."""
    path = tmp_path_factory.mktemp("told") / "memory.db"
    told = []
    with open_memory(path) as memory, open_memory(path) as onlooker:
        for step in steps:
            if step[0] == "tell":
                told.append((step[1], f"fact{step[2]} is here"))
                memory.remember(told[-1][1], memory_type="knowledge", session_id=step[1])
            else:
                told = [one for one in told if one[0] != step[1]]
                memory.forget(session_id=step[1])
            with open_memory(path) as anew:
                for view in (memory, anew, *[onlooker][: step[3]]):
                    for session in "abc":
                        theirs = {text for where, text in told if where == session}
                        assert set(contents(view.recall("fact here", k=9, session_id=session, count=False))) == theirs
                    counts = {item.content: item.validation_count for item in view.items()}
                    assert counts == {text: sum(text == one for _, one in told) for _, text in told}
                if told:
                    assert_same_links(anew, memory, *[onlooker][: step[3]])
        assert memory.doctor().clean


def assert_same_links(*memories):
    """Neighbours in a session are those of a view loaded anew, told by their rows."""
    seen = []
    for memory in memories:
        with memory._core.view() as index:
            columns = index.columns
            alive = [slot for slot in range(columns.size) if columns.alive[slot]]
            row = {slot: int(columns.row[slot]) for slot in alive} | {-1: -1}
            seen.append([(row[s], row[int(columns.previous[s])], row[int(columns.next[s])]) for s in alive])
            assert columns.allowed(Filter(session_id="a")) is not None
    assert all(links == seen[0] for links in seen)
