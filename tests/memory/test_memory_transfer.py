"""Export and import: everything goes round, all or nothing, and what was forgotten stays forgotten."""

import base64
import json
import os

import numpy as np
import pytest

from agentlab.errors import MemoryStoreError

from .helpers import HashingEmbedder, Memory, contents, everything, open_memory

SECRET = "Zebrafinch7731"


@pytest.fixture
def rich(path):
    """A memory with something of every kind."""
    with open_memory(path) as memory:
        memory.remember(
            "The lease ends in June.", memory_type="knowledge", tags=["家", "home"], metadata={"n": [1, None]}
        )
        memory.remember(
            "改行\nとタブ\t「引用」", memory_type="pattern", source="tool", source_name="clock", created_at=12.25
        )
        memory.remember(" ".join(f"word{i}." for i in range(300)), importance=1 / 3)
        talk = memory.conversation("s", user_id="ana")
        talk.prefer(tone="short", depth={"a": 1})
        for number in range(60):
            talk.add(f"Ship {number} arrived in the harbour.", f"I saw ship {number}.", context_used=["m-1"])
        for session in "ab":
            memory.remember("I work on Mondays only", session_id=session)
        memory.consolidate()
        memory.recall("ship 3", k=3)
        memory.forget(memory.remember("forget this one"), reason="asked")
        yield memory


def test_round_trip_gives_the_same_lines(rich, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    count = rich.export(first)
    assert count == len(rich)
    with open_memory(tmp_path / "copy.db") as copy:
        assert copy.import_(first) == count
        assert copy.doctor().clean
        copy.export(second)
        assert second.read_bytes() == first.read_bytes()
        assert (
            copy.recall("ship 17 arrived", k=3, explain=True, count=False)[0].content
            == "Ship 17 arrived in the harbour."
        )
        assert copy.conversation("s").session() == rich.conversation("s").session()
        assert copy.conversation("s").window() == rich.conversation("s").window()
        assert copy.knowledge()[0].source_conversations == rich.knowledge()[0].source_conversations
        assert [hit.memory_id for hit in copy.recall("Monday work", k=3, count=False)] == [
            hit.memory_id for hit in rich.recall("Monday work", k=3, count=False)
        ]
        assert copy.import_(first) == 0, "the same again adds nothing"
        copy.export(second)
        assert second.read_bytes() == first.read_bytes()
    kinds = {json.loads(line)["record"] for line in first.read_text().splitlines()}
    assert kinds == {"header", "memory", "knowledge", "session", "turn", "tombstone"}


def test_what_was_forgotten_here_stays_forgotten(path, tmp_path):
    out = tmp_path / "out.jsonl"
    with open_memory(path) as memory:
        secret = memory.remember("the secret fact")
        memory.remember("the open fact")
        memory.export(out)
        memory.forget(secret)
        assert memory.import_(out) == 0
        assert contents(memory.items()) == ["the open fact"]


def test_the_same_words_merge_and_keep_their_relations(path, tmp_path):
    out = tmp_path / "out.jsonl"
    with open_memory(tmp_path / "other.db") as other:
        for session in "ab":
            other.remember("I work on Mondays only", session_id=session)
        other.consolidate()
        other.export(out)
    with open_memory(path) as memory:
        mine = memory.remember("I work on Mondays only", session_id="a", tags=["mine"])
        assert memory.import_(out) == 2
        assert memory.get(mine).validation_count == 2
        assert mine in memory.knowledge()[0].source_conversations
        assert memory.doctor().clean


def test_vectors_of_another_model_are_made_anew(rich, tmp_path):
    out = tmp_path / "out.jsonl"
    rich.export(out)
    other = HashingEmbedder(dimension=32, model_id="hashing-32")
    with Memory.open(tmp_path / "copy.db", embedder=other) as copy:
        assert copy.import_(out) == len(rich)
        assert copy.stats()["dimension"] == "32"
        assert copy.doctor().clean
        assert copy.recall("ship 17 arrived", k=1)[0].content == "Ship 17 arrived in the harbour."


def with_vector(line, change):
    value = json.loads(line)
    ((start, end, blob),) = value["chunks"]
    with np.errstate(all="ignore"):
        vector = change(np.frombuffer(base64.b64decode(blob), "<f2")).astype("<f2")
    return json.dumps({**value, "chunks": [[start, end, base64.b64encode(vector.tobytes()).decode()]]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [*lines, "{not json"], "line 4 is not a record"),
        (lambda lines: [*lines, '{"record": "dream"}'], "unknown record 'dream'"),
        (lambda lines: lines[1:], "first line is not its header"),
        (lambda lines: [lines[0].replace('"version": 1', '"version": 9'), *lines[1:]], "version 9; allowed: 1"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"importance": ', '"importance": 7')], "line 3: importance"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"content"', '"contents"')], "line 3 lacks or mistypes"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"access_count": 0', f'"access_count": {2**63 - 1}')],
         r"line 3: access_count: 9223372036854775807; allowed: .* to 2\*\*53"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"validation_count": 1', f'"validation_count": {2**63 - 1}')],
         "line 3: validation_count"),
        (lambda lines: [json.dumps({**json.loads(lines[0]), "embedding_model": ""}), *lines[1:]],
         "line 1: embedding_model is empty"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"chunks": [[0, ', '"chunks": [["x", ')], "line 3: its vectors"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"chunks": [[0, ', '"chunks": [[0.0, ')], "line 3: its vectors"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"chunks": [[0, ', '"chunks": [[2, ')],
         "line 3: chunks: characters 0 to 2 are in none"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"chunks": [[0, 9, ', '"chunks": [[0, 7, ')],
         "line 3: chunks: characters 7 to 9 are in none"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"chunks": [[0, 9, ', '"chunks": [[0, 90, ')],
         "line 3: chunk: characters 0 to 90"),
        (lambda lines: [*lines[:-1], with_vector(lines[-1], lambda vector: 2 * vector)], "of length 1 each"),
        (lambda lines: [*lines[:-1], with_vector(lines[-1], lambda vector: 0 * vector)], "of length 1 each"),
        (lambda lines: [*lines[:-1], with_vector(lines[-1], lambda vector: vector / 0)], "of length 1 each"),
        (lambda lines: [*lines, '{"record": "turn", "session_id": "s"}'], "nothing was imported"),
    ],
)  # fmt: skip
def test_a_wrong_line_imports_nothing(path, tmp_path, change, words):
    out = tmp_path / "out.jsonl"
    with open_memory(tmp_path / "other.db") as other:
        other.remember("one fact")
        other.remember("two facts")
        other.export(out)
    out.write_text("\n".join(change(out.read_text().splitlines())) + "\n")
    with open_memory(path) as memory:
        memory.remember("mine")
        with pytest.raises(MemoryStoreError, match=words):
            memory.import_(out)
        assert contents(memory.items()) == ["mine"]
        assert memory.recall("fact", words_only=True) == []
        with pytest.raises(MemoryStoreError, match="no file at"):
            memory.import_(tmp_path / "none")


def test_an_import_into_a_new_memory_takes_the_exports_model(rich, tmp_path):
    out = tmp_path / "out.jsonl"
    rich.export(out)
    with Memory.open(tmp_path / "copy.db") as copy:  # no model named: the default would be another one
        assert copy.import_(out) == len(rich)
        assert copy.embedding_model == copy.stats()["embedding_model"] == "hashing-64"
    with open_memory(tmp_path / "copy.db") as copy:
        item = next(iter(rich.items()))
        assert np.array_equal(copy.get(item.memory_id).embedding, rich.get(item.memory_id).embedding)


def test_an_import_with_vectors_that_disagree_with_the_model_is_refused(rich, path, tmp_path):
    out = tmp_path / "out.jsonl"
    rich.export(out)
    other = HashingEmbedder(dimension=32)
    with Memory.open(tmp_path / "copy.db", embedder=other) as copy:
        copy.remember("one of 32 dimensions")
        with pytest.raises(MemoryStoreError, match=r"out\.jsonl.*64 dimensions; allowed: 32"):
            copy.import_(out)
    with (
        Memory.open(tmp_path / "new.db", embedder=other) as copy,
        pytest.raises(MemoryStoreError, match="64 dimensions"),
    ):
        copy.import_(out)


def test_an_import_of_too_many_windows_is_refused(tmp_path, path):
    out = tmp_path / "out.jsonl"
    with open_memory(tmp_path / "other.db") as other:
        other.remember("one fact")
        other.export(out)
    header, line = out.read_text().splitlines()
    value = json.loads(line)
    out.write_text("\n".join([header, json.dumps({**value, "chunks": value["chunks"] * 4097})]))
    with (
        open_memory(path) as memory,
        pytest.raises(MemoryStoreError, match="line 2: 4097 vectors; allowed: up to 4096"),
    ):
        memory.import_(out)
    out.write_text("\n".join([header, json.dumps({**value, "content": "word " * 8193, "chunks": []})]))
    with (
        Memory.open(tmp_path / "narrow.db", embedder=HashingEmbedder(window=2)) as memory,
        pytest.raises(MemoryStoreError, match="4097 windows"),
    ):
        memory.import_(out)


def test_who_opened_before_the_model_changed_writes_nothing(path):
    with open_memory(path) as one:
        one.remember("the first fact")
        two = open_memory(path)  # has looked at nothing yet
        one.reembed(embedder=HashingEmbedder(model_id="other-64"))
        for call in (lambda: two.remember("with the old model"), lambda: two.recall("fact"), lambda: two.get("m-1")):
            with pytest.raises(MemoryStoreError, match="another model; open it again"):
                call()
        two.close()
        one.remember("the one who changed it goes on")
        assert len(one) == 2


def test_two_models_cannot_both_begin_a_memory(path):
    with open_memory(path) as one, Memory.open(path, embedder=HashingEmbedder(model_id="other-64")) as two:
        one.remember("the first fact")
        with pytest.raises(MemoryStoreError, match="another model; open it again"):
            two.remember("with another model")
        assert len(one) == 1


def test_reembedding_changes_every_vector_and_nothing_else(rich, path, tmp_path):
    before = [(item.memory_id, item.content) for item in rich.items()]
    elsewhere = open_memory(path)
    elsewhere.recall("ship")
    assert rich.reembed(embedder=HashingEmbedder(dimension=48, model_id="hashing-48")) == len(before)
    assert rich.embedding_model == "hashing-48"
    assert [(item.memory_id, item.content) for item in rich.items()] == before
    assert rich.recall("ship 17 arrived", k=1)[0].content == "Ship 17 arrived in the harbour."
    assert rich.get(before[0][0]).embedding.shape == (1, 48)
    assert rich.doctor().clean
    with pytest.raises(MemoryStoreError, match="another model; open it again"):
        elsewhere.recall("ship")
    with pytest.raises(MemoryStoreError, match=r"another model|dimensions"):
        elsewhere.remember("with the old model")
    elsewhere._core._uses.clear()
    elsewhere.close()
    with Memory.open(path, embedder=HashingEmbedder(dimension=48, model_id="hashing-48")) as again:
        assert again.recall("ship 17 arrived", k=1)[0].content == "Ship 17 arrived in the harbour."


def test_nothing_of_what_was_forgotten_comes_in_by_an_import(path, tmp_path):
    out = tmp_path / "out.jsonl"
    with open_memory(path) as memory:
        talk = memory.conversation("s")
        talk.add(f"My passphrase is {SECRET}.", "Noted.")
        talk.add("I like tea.", "So do I.")
        secret = memory.search("passphrase")[0].memory_id
        memory.conversation("t").add("What is my passphrase?", f"It is {SECRET}.", context_used=[secret])
        memory.remember(f"The user has {SECRET}", source="tool", derived_from=[secret])
        memory.export(out)
        memory.forget(secret)
        before = sorted(contents(memory.items()))
        assert memory.import_(out) == 0
        assert sorted(contents(memory.items())) == before
        assert [turn.user_input for turn in talk.turns()] == ["I like tea."]
        assert memory.conversation("t").turns() == []
        assert not any(SECRET.lower().encode() in data.lower() for data in everything(path).values())
        assert memory.doctor().clean


def test_what_derives_from_something_forgotten_stays_away_too(path, tmp_path):
    there, back = tmp_path / "there.jsonl", tmp_path / "back.jsonl"
    with open_memory(path) as memory, open_memory(tmp_path / "other.db") as other:
        for session in "xy":
            memory.remember(f"My passphrase is {SECRET}.", session_id=session)
        memory.export(there)
        other.import_(there)
        assert other.consolidate()
        talk = other.conversation("z")
        talk.add("What is it?", f"Your passphrase is {SECRET}.", context_used=[other.search("passphrase")[0].memory_id])
        talk.add("I like tea.", "So do I.")
        other.export(back)
        memory.forget(*[item.memory_id for item in memory.items()])
        memory.import_(back)
        assert [turn.user_input for turn in memory.conversation("z").turns()] == ["I like tea."]
        assert memory.knowledge() == []
        assert not any(SECRET.lower().encode() in data.lower() for data in everything(path).values())
        assert memory.doctor().clean


def test_a_forgotten_session_stays_forgotten(path, tmp_path):
    out = tmp_path / "out.jsonl"
    with open_memory(path) as memory:
        talk = memory.conversation("s", user_id="ana")
        talk.add("Hello there my friend", "Good day to you")
        talk.prefer(name=SECRET)
        memory.export(out)
        memory.forget(session_id="s")
        memory.import_(out)
        assert (memory.sessions(), talk.turns(), len(memory)) == ([], [], 0)
        talk.add("A new beginning", "Welcome back")
        memory.export(out)
        with open_memory(tmp_path / "other.db") as other:
            assert other.import_(out) == 2
            assert [turn.user_input for turn in other.conversation("s").turns()] == ["A new beginning"]


def test_another_talk_of_a_forgotten_sessions_name_comes_in_with_its_turns(path, tmp_path):
    out = tmp_path / "out.jsonl"
    with open_memory(tmp_path / "other.db") as other:
        other.conversation("chat").add("I like tea.", "So do I.")
        other.export(out)
    with open_memory(path) as memory:
        memory.conversation("chat", user_id="ana").add("I am allergic to hazelnuts.", "Noted.")
        memory.forget(session_id="chat")
        assert memory.import_(out) == 2
        talk = memory.conversation("chat")
        assert [turn.user_input for turn in talk.window()] == ["I like tea."]
        assert talk.session().user_id == ""


def test_a_turn_that_was_taken_back_stays_away(path, tmp_path):
    out = tmp_path / "out.jsonl"
    with open_memory(path) as memory:
        talk = memory.conversation("s")
        for _ in range(2):
            talk.add("Hello there my friend", "Good day to you")
        memory.export(out)
        talk.undo()
        memory.import_(out)
        assert len(talk.turns()) == 1


def test_the_same_import_again_is_no_further_telling(path, tmp_path):
    out = tmp_path / "out.jsonl"
    with open_memory(tmp_path / "other.db") as other:
        other.remember("I work on Mondays only", memory_type="knowledge")
        other.export(out)
    with open_memory(path) as memory:
        mine = memory.remember("I work on Mondays only", memory_type="knowledge")
        for _ in range(3):
            assert memory.import_(out) == 0
        assert memory.get(mine).validation_count == 2
        memory.forget(mine)
        assert memory.import_(out) == 0, "the same words under their other id"
        assert memory.doctor().clean


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("session", {"summary": 5}, "summary"),
        ("session", {"summary": [{"text": "x"}]}, "summary"),
        ("session", {"last_activity": "abc"}, "last_activity"),
        ("session", {"preferences": []}, "preferences"),
        ("turn", {"timestamp": "now"}, "timestamp"),
        ("turn", {"importance_score": "much"}, "importance_score"),
        ("turn", {"memory_ids": "m-1"}, "memory_ids"),
        ("turn", {"user_input": 7}, "user_input"),
        ("memory", {"chunks": [[900, -3, ""]]}, "characters 900 to -3"),
        ("knowledge", {"confidence": 7}, "confidence"),
        ("tombstone", {"forgotten_at": None}, "forgotten_at"),
    ],
)
def test_a_record_of_any_kind_is_checked(rich, path, tmp_path, kind, change, words):
    out = tmp_path / "out.jsonl"
    rich.export(out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    number = next(number for number, line in enumerate(lines, start=1) if line["record"] == kind)
    if "chunks" in change:
        change["chunks"][0][2] = lines[number - 1]["chunks"][0][2]
    lines[number - 1] |= change
    out.write_text("\n".join(json.dumps(line) for line in lines))
    with open_memory(tmp_path / "copy.db") as copy:
        with pytest.raises(MemoryStoreError, match=f"line {number}.*{words}.*nothing was imported"):
            copy.import_(out)
        assert (len(copy), copy.sessions()) == (0, [])


def test_an_export_takes_the_place_of_a_file_alone_and_never_of_the_memory(rich, path, tmp_path):
    words = contents(rich.items())
    for own in (path, path.with_name(path.name + "-wal"), tmp_path / "a" / ".." / path.name):
        (tmp_path / "a").mkdir(exist_ok=True)
        with pytest.raises(MemoryStoreError, match="is the memory itself; give another file"):
            rich.export(own)
    os.mkfifo(tmp_path / "pipe")
    for taken in (tmp_path / "a", tmp_path / "pipe"):
        with pytest.raises(MemoryStoreError, match="is no file; give the path of a file"):
            rich.export(taken)
    (tmp_path / "link").symlink_to(tmp_path / "target.jsonl")
    rich.export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target.jsonl").stat().st_size > 0
    assert contents(rich.items()) == words


@pytest.mark.parametrize("line", ["[" * 200_000, '{"record": "memory", "chunks": ' + "[" * 200_000])
def test_a_line_that_nests_without_end_imports_nothing(path, tmp_path, line):
    out = tmp_path / "deep.jsonl"
    out.write_text(line + "\n")
    with open_memory(path) as memory, pytest.raises(MemoryStoreError, match="line 1 is not a record of a memory"):
        memory.import_(out)


def test_a_header_without_a_dimension_is_said(rich, path, tmp_path):
    out = tmp_path / "all.jsonl"
    rich.export(out)
    header, *rest = out.read_text().splitlines()
    values = json.loads(header)
    del values["dimension"]
    out.write_text("\n".join([json.dumps(values), *rest]))
    with open_memory(tmp_path / "other.db") as other, pytest.raises(MemoryStoreError, match="are not None float16"):
        other.import_(out)
