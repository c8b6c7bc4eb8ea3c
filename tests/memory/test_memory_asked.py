"""What a memory is asked with: anything it cannot take is refused in a sentence of its own, and changes nothing."""

import datetime
import os

import numpy as np
import pytest

from agentlab.errors import AgentlabError, MemoryStoreError
from agentlab.memory import Memory, MemoryItem

from .helpers import HashingEmbedder, everything, open_memory

HALF = "\ud800"
_, PIPE = os.pipe()
CALLS = [
    (lambda m: m.recall("fact", since="2024-01-01"), "since: '2024-01-01'"),
    (lambda m: m.recall("fact", until=datetime.datetime(2024, 1, 1)), "until: datetime"),
    (lambda m: m.recall("fact", vector=[[1.0], [1.0, 2.0]]), "the vector is no list of numbers"),
    (lambda m: m.recall("fact", vector="abc"), "the vector is no list of numbers"),
    (lambda m: m.recall("fact", vector=np.zeros((2, 32))), "the vector has the shape (2, 32)"),
    (lambda m: m.recall("fact", session_id=5), "session_id: 5"),
    (lambda m: m.recall("fact", tags=5), "tags: 5"),
    (lambda m: m.recall(5), "the query: 5"),
    (lambda m: m.recall("fact", memory_type=["knowledge"]), "memory_type: "),
    (lambda m: m.search("fact", k="x"), "k: 'x'"),
    (lambda m: m.search("fact", k=0), "k: 0"),
    (lambda m: m.remember("news", vector="abc"), "the vector is no list of numbers"),
    (lambda m: m.remember(b"news"), "content: b'news'"),
    (lambda m: m.remember("news", derived_from=5), "derived_from: 5"),
    (lambda m: m.remember_many([None]), "items: None; allowed: MemoryItem or text"),
    (lambda m: m.remember_many("abc"), "items: 'abc'; allowed: a list"),
    (lambda m: m.remember_many(5), "items: 5; allowed: a list"),
    (lambda m: m.remember_many(["a b"], vectors=[[1.0], [1.0, 2.0]]), "vectors are no list of lists of numbers"),
    (lambda m: m.remember_many(["a b"], vectors="abc"), "vectors are no list of lists of numbers"),
    (lambda m: m.remember_many([MemoryItem(memory_id=5, content="a b")]), "memory_id: 5"),
    (lambda m: m.get(5), "memory_id: 5"),
    (lambda m: m.get(HALF), "memory_id contains half a surrogate"),
    (lambda m: m.peek(HALF), "memory_id contains half a surrogate"),
    (lambda m: m.peek(None), "memory_id: None"),
    (lambda m: list(m.items(session_id=HALF)), "session_id contains half a surrogate"),
    (lambda m: list(m.items(memory_type="fact")), "memory_type: 'fact'"),
    (lambda m: m.forget(["m-1"]), "memory_id: "),
    (lambda m: m.forget(""), "memory_id is empty"),
    (lambda m: m.forget("m-1", reason=None), "reason: None"),
    (lambda m: m.forget(session_id=5), "session_id: 5"),
    (lambda m: m.forget(session_id=""), "session_id is empty"),
    (lambda m: m.reembed(""), "model is empty"),
    (lambda m: m.export(5), "5 is no path"),
    (lambda m: m.import_(None), "None is no path"),
    (lambda m: m.export("a\x00b"), "no path"),
    (lambda m: m.conversation(5), "session_id: 5"),
    (lambda m: m.conversation("s", user_id=5), "user_id: 5"),
    (lambda m: m.conversation("s").add("a b", "c d", timestamp="x"), "timestamp: 'x'"),
    (lambda m: m.conversation("s").add("a b", "c d", timestamp=datetime.datetime.now()), "timestamp: datetime"),
    (lambda m: m.conversation("s").add("a b", "c d", context_used=5), "context_used: 5"),
    (lambda m: m.conversation("s").add("a b", "c d", context_used="m-1"), "context_used: 'm-1'"),
    (lambda m: m.conversation("s").add("a b", "c d", notes=None), "notes: None"),
    (lambda m: m.conversation("s").add("a b", "c d", metadata=[1]), "metadata: "),
    (lambda m: m.conversation("s").add("a b", "c d", agent=5), "agent: 5"),
    (lambda m: m.conversation("s").turns("x"), "last: 'x'"),
    (lambda m: m.conversation("s").context("fact", "x"), "budget_tokens: 'x'"),
    (lambda m: m.conversation("s").memories_of("c-1"), "conversation_ids: 'c-1'"),
    (lambda m: m.search("fact", k=2**63), "k: 9223372036854775808"),
    (lambda m: m.conversation("s").turns(10**30), "last: 1000"),
    (lambda m: m.conversation("s", tokens=5), "tokens: 5"),
    (lambda m: m.conversation("s", summariser=5), "summariser: 5"),
    (lambda m: m.reembed(embedder=5), "embedder: 5 has no model_id"),
    (lambda m: m.export(f"/dev/fd/{PIPE}"), f"/dev/fd/{PIPE} is no file"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message for _, message in CALLS])
def test_what_it_cannot_take_is_refused_in_a_sentence_and_changes_nothing(memory, call, message):
    memory.remember("a fact of the house")
    before = [(item.memory_id, item.content) for item in memory.items()]
    with pytest.raises(MemoryStoreError) as refused:
        call(memory)
    said = str(refused.value)
    assert message in said
    assert "\n" not in said
    assert [(item.memory_id, item.content) for item in memory.items()] == before
    assert memory.sessions() == []


@pytest.mark.parametrize("path", ["a\x00b", 5, "", HALF])
def test_an_impossible_path_is_refused(path):
    with pytest.raises(AgentlabError, match="no path"):
        Memory.open(path)
    with pytest.raises(AgentlabError, match="no path"):
        Memory.repair(path)


def test_an_empty_name_of_a_model_is_no_default(path):
    with pytest.raises(MemoryStoreError, match="embedding_model is empty"):
        Memory.open(path, embedding_model="")
    assert not path.exists()


def test_odd_but_right_values_are_taken(memory):
    kept = memory.remember("a fact", importance=np.float32(0.5))
    assert memory.get(kept).importance == 0.5
    talk = memory.conversation("s")
    talk.prefer(self=1)
    assert talk.session().preferences == {"self": 1}


@pytest.mark.parametrize(("options", "words"), [({"embedder": 5}, "embedder: 5"), ({"weights": "x"}, "weights: 'x'")])
def test_what_a_memory_is_opened_with_is_checked(path, options, words):
    with pytest.raises(MemoryStoreError, match=words):
        Memory.open(path, **options)
    assert not path.exists()


def test_a_memory_named_like_sqlites_own_in_ram_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_memory(":memory:") as memory:
        memory.remember("remember this please")
    with open_memory(tmp_path / ":memory:") as memory:
        assert len(memory) == 1


def test_a_relative_path_is_the_one_it_was(tmp_path, monkeypatch):
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path)
    with open_memory("m.db") as memory:
        monkeypatch.chdir(tmp_path / "deeper")
        memory.remember("still the same file")
        assert memory.path == tmp_path / "m.db"


def test_a_device_is_no_memory():
    with pytest.raises(MemoryStoreError, match="/dev/null is no file"):
        Memory.open("/dev/null", embedder=HashingEmbedder())


def test_forgetting_takes_preferences_that_name_what_only_it_named(path):
    with open_memory(path) as memory:
        talk, other = memory.conversation("s"), memory.conversation("t")
        talk.add("My nickname is Zebrafinch7731.", "Noted.")
        talk.prefer(name="Zebrafinch7731", deep={"of": ["Zebrafinch7731"]}, length="short", Zebrafinch7731=True)
        other.prefer(name="Zebrafinch7731")
        memory.forget(next(item.memory_id for item in memory.items() if "nickname" in item.content))
        assert talk.session().preferences == {"length": "short"}
        assert other.session().preferences == {"name": "Zebrafinch7731"}, "of another session, and set on its own"
        assert memory.doctor().clean


def test_forgetting_leaves_no_byte_of_a_name_in_preferences(path):
    """However it is written: at the beginning of a sentence, in small letters, in a script without capitals."""
    told = ("Rosalind is my partner.", "私の妻は花子です。", "the codename is zebrafish")
    with open_memory(path) as memory:
        ids = [memory.remember(text, session_id="s") for text in told]
        talk = memory.conversation("s")
        talk.prefer(partner="Rosalind", wife="花子", code="zebrafish", Rosalind=True, 花子=1, deep={"Rosalind": ["x"]},
                    language="ja", limit=5)  # fmt: skip
        memory.forget(*ids)
        assert talk.session().preferences == {"language": "ja", "limit": 5}
    for data in everything(path).values():
        assert not any(name.encode() in data.lower() for name in ("rosalind", "花子", "zebrafish"))


def test_preferences_keep_a_word_that_another_memory_has(memory):
    talk = memory.conversation("s")
    ids = [memory.remember(text, session_id="s") for text in ("I speak German.", "My books are in German.")]
    talk.prefer(language="German", child="子供")
    memory.forget(ids[0], memory.remember("私の妻は花子です。", session_id="s"))
    assert talk.session().preferences == {"language": "German", "child": "子供"}
    memory.forget(ids[1])
    assert talk.session().preferences == {"child": "子供"}


def test_a_month_in_which_others_were_told_is_no_word_of_theirs(memory):
    talk = memory.conversation("s")
    talk.prefer(partner="April")
    memory.remember("The kettle is broken.", session_id="s", created_at=1_776_000_000)  # 2026-04-12
    memory.forget(memory.remember("April is my partner.", session_id="s"))
    assert talk.session().preferences == {}


@pytest.mark.parametrize("where", [["a"], ["a", "b"], [None]])
def test_preferences_go_wherever_it_was_told(memory, where):
    talks = {session: memory.conversation(session) for session in "abc"}
    for talk in talks.values():
        talk.prefer(partner="Rosalind")
    for session in where:
        told = memory.remember("Rosalind is my partner.", memory_type="knowledge", session_id=session)
    memory.forget(told)
    left = [session for session, talk in talks.items() if talk.session().preferences]
    assert left == [session for session in "abc" if session not in where and where != [None]]


@pytest.mark.parametrize(
    ("told", "preferences"),
    [
        ("It is true that cats sleep.", {"verbose": True, "emoji": True}),
        ("We saw false teeth.", {"verbose": False}),
        ("I have 5 cats.", {"max_results": 5, "limit": "5"}),
        ("I bought 2 books.", {"temperature": 0.2}),
        ("My shoe size is 43", {"font_size": "large"}),
        ("The tone of the meeting was angry.", {"tone": "short"}),
        ("The answer was long.", {"answers": "brief"}),
        ("It is true, it was never on.", {"verbose": "true", "sound": "on", "ask": "never"}),
        ("It is on.", {"sound": "on"}),
    ],
)
def test_preferences_that_share_an_ordinary_word_stay(memory, told, preferences):
    talk = memory.conversation("s")
    talk.prefer(**preferences)
    memory.forget(memory.remember(told, session_id="s"))
    assert talk.session().preferences == preferences
