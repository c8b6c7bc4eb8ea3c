"""Remembering and recalling on a real file: merging, echoes, filters, explanations, uses, many hands at once."""

import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from agentlab import Memory
from agentlab.errors import MemoryStoreError
from agentlab.memory import MemoryItem, Weights

from .helpers import HashingEmbedder, contents, open_memory

REPORT = "The report is due on Friday."
CAT = "My cat Zorblax sleeps on the piano."
OSLO = "I moved to Oslo for the new job."


def test_what_was_remembered_is_recalled_after_reopening(path):
    with open_memory(path) as memory:
        report = memory.remember(REPORT, memory_type="knowledge", session_id="s1", tags=["work"], metadata={"page": 3})
        memory.remember(CAT)
        hit = memory.recall("when is the report due?", k=5)[0]
        assert (hit.memory_id, hit.content) == (report, REPORT)
        assert 0 < hit.score <= 1
    with open_memory(path) as memory:
        item = memory.get(report)
        assert item.content == REPORT
        assert (item.memory_type, item.session_id, item.tags) == ("knowledge", "s1", ["work"])
        assert item.metadata == {"page": 3}
        assert item.source == "person"
        assert item.embedding.shape == (1, 64)
        assert item.access_count == 1
        assert memory.recall("Zorblax", k=1)[0].content == CAT


def test_the_empty_memory_finds_nothing(memory):
    assert memory.recall("anything") == []
    assert memory.search("anything") == []
    assert len(memory) == 0
    assert memory.consolidate() == memory.knowledge() == memory.sessions() == memory.tombstones() == []


def test_the_same_words_merge_and_count(memory):
    first = memory.remember(REPORT, memory_type="knowledge", tags=["work"])
    again = memory.remember("report is DUE on Friday", memory_type="knowledge", tags=["plan"])
    assert again == first
    assert len(memory) == 1
    item = memory.get(first)
    assert item.validation_count == 2
    assert item.tags == ["work", "plan"]
    assert contents(memory.recall("report", tags=["plan"])) == [REPORT]
    assert memory.remember("The report is due on Monday.", memory_type="knowledge") != first
    assert memory.remember("The report is not due on Friday.", memory_type="knowledge") != first


def test_turns_of_two_sessions_stay_two_memories(memory):
    one = memory.remember("Yes, please.", session_id="a")
    assert memory.remember("Yes, please.", session_id="a") == one
    other = memory.remember("Yes, please.", session_id="b")
    assert other != one
    assert [hit.memory_id for hit in memory.recall("yes please", session_id="b")] == [other]


def test_what_an_agent_repeats_is_no_news(memory):
    report = memory.remember(REPORT)
    cat = memory.remember(CAT)
    assert memory.remember("You told me that the report is due on Friday.", source="agent") == report
    assert memory.remember("Sure. The report is due on Friday!", source="agent") == report
    assert memory.remember("Your cat Zorblax sleeps on the piano!", source="tool", source_name="memory_search") == cat
    assert len(memory) == 2
    assert memory.get(report).validation_count == 1, "an echo is no confirmation"
    mixed = memory.remember("The report is due on Friday. Your dentist is called Yilmaz.", source="agent")
    assert memory.get(mixed).content == "Your dentist is called Yilmaz."


@pytest.mark.parametrize(
    "news",
    ["The report is due on 7 March.", "The report is not due on Friday.", "The report on Kenya is due on Friday."],
)
def test_a_new_number_name_or_denial_is_news(memory, news):
    report = memory.remember(REPORT)
    assert memory.remember(news, source="agent") != report
    assert memory.search(news)[0].content == news


def test_recalled_text_does_not_come_back_through_the_person(memory):
    whole = memory.remember(f"{REPORT} Bring the slides too.", memory_type="knowledge")
    assert memory.recall("report")[0].memory_id == whole
    assert memory.remember(REPORT) == whole
    mixed = memory.remember(f"{REPORT} Who else is coming along?")
    assert memory.get(mixed).content == "Who else is coming along?"


def test_filters_hold_all_at_once(memory):
    def add(text, **fields):
        return memory.remember(f"apple {text}", **fields)

    wanted = add("one", memory_type="preference", session_id="s", tags=["x", "y"], created_at=1000.0, source="agent")
    add("two", memory_type="knowledge", session_id="s", tags=["x", "y"], created_at=1000.0)
    add("three", memory_type="preference", session_id="t", tags=["x", "y"], created_at=1000.0)
    add("four", memory_type="preference", session_id="s", tags=["x"], created_at=1000.0)
    add("five", memory_type="preference", session_id="s", tags=["x", "y"], created_at=3000.0)
    every = {"memory_type": "preference", "session_id": "s", "tags": ["x", "y"], "until": 2000.0, "source": "agent"}
    assert [hit.memory_id for hit in memory.recall("apple", **every)] == [wanted]
    assert len(memory.recall("apple", 10)) == 5
    assert len(memory.recall("apple", 10, tags=["y"])) == 4
    assert len(memory.recall("apple", 10, since=2000.0)) == 1
    assert memory.recall("apple", session_id="nowhere") == memory.recall("apple", tags=["none"]) == []


def test_explain_adds_up_to_the_score(memory):
    memory.remember(REPORT, importance=0.9)
    memory.remember(CAT, importance=0.1)
    weights = memory.weights
    for hit in memory.recall("the report of the cat", explain=True):
        parts = hit.parts
        relevance = weights.vector * max(parts["vector"], 0) + (1 - weights.vector) * parts["text"]
        assert parts["relevance"] == pytest.approx(relevance, rel=1e-5)
        total = parts["relevance"] + parts["context"]
        total += weights.importance * parts["importance"] + weights.recency * parts["recency"]
        whole = 1 + weights.before + weights.after + weights.importance + weights.recency
        assert hit.score == pytest.approx(total / whole, rel=1e-5)
    assert memory.recall("report")[0].parts == {}


def test_importance_and_recency_decide_between_equals(memory):
    now = time.time()
    memory.remember("the tea is green", importance=0.2, session_id="a", created_at=now)
    memory.remember("the tea is green", importance=0.9, session_id="b", created_at=now)
    assert [hit.session_id for hit in memory.recall("tea")] == ["b", "a"]
    memory.remember("coffee is black", importance=0.5, session_id="a", created_at=now - 90 * 86400)
    memory.remember("coffee is black", importance=0.5, session_id="b", created_at=now)
    assert [hit.session_id for hit in memory.recall("coffee", k=2)] == ["b", "a"]


def test_use_and_retelling_raise_importance(memory):
    plain = memory.remember("a plum is blue", importance=0.5, created_at=1.0)
    used = memory.remember("a plum is sour", importance=0.5, created_at=1.0)
    for _ in range(3):
        memory.recall("sour", k=1)
    memory.remember("a plum is sour", created_at=1.0)
    parts = {hit.memory_id: hit.parts for hit in memory.recall("plum", explain=True)}
    assert parts[used]["importance"] > parts[plain]["importance"]
    assert parts[plain]["importance"] == pytest.approx(0.5, abs=0.06)


def test_novelty_is_judged_against_what_is_known(memory):
    first = memory.get(memory.remember("The violin hangs on the kitchen wall"))
    close = memory.get(memory.remember("The violin hangs on the kitchen wall again"))
    far = memory.get(memory.remember("Dentists recommend flossing daily"))
    assert first.importance == pytest.approx(0.7, abs=1e-3)
    assert close.importance < 0.45 < far.importance


def test_an_answer_is_found_beside_its_question(memory):
    for number in range(30):
        memory.remember(f"talk of nothing {number}", session_id="s")
    memory.remember("Which instrument did grandmother teach?", session_id="s")
    answer = memory.remember("The cello, every Sunday.", session_id="s")
    hits = memory.recall("instrument that grandmother taught", k=2, explain=True)
    assert answer in [hit.memory_id for hit in hits]
    assert next(hit for hit in hits if hit.memory_id == answer).parts["context"] > 0


def test_long_text_is_found_by_any_part_of_it(memory):
    filler = " ".join(f"filler{number} words." for number in range(200))
    text = f"{filler} The submarine surfaced near Reykjavik. {filler}"
    memory_id = memory.remember(text)
    memory.remember("something else entirely")
    hit = memory.recall("submarine Reykjavik", k=3)[0]
    assert hit.memory_id == memory_id
    assert hit.content == text
    assert "submarine surfaced" in text[hit.start : hit.end]
    assert hit.end - hit.start < len(text) / 4
    assert len(memory.recall("filler3", k=5)) == 2, "a memory comes back once, however many chunks match"
    vectors = memory.get(memory_id).embedding
    assert len(vectors) > 5


def test_text_of_too_many_windows_is_refused(path):
    with Memory.open(path, embedder=HashingEmbedder(window=2)) as memory:
        with pytest.raises(MemoryStoreError, match="4097 windows of the embedding model; allowed: 4096"):
            memory.remember(" ".join(["word"] * 8193))
        memory.remember(" ".join(["word"] * 8192))
        assert len(memory) == 1
        with pytest.raises(MemoryStoreError, match="4097 windows"):
            memory.remember_many([" ".join(["word"] * 8193)])
        with pytest.raises(MemoryStoreError, match="8192 windows"):
            memory.reembed(embedder=HashingEmbedder(window=1, model_id="narrow"))
        assert len(memory) == 1
        assert memory.doctor().clean


def test_search_by_words_needs_no_vectors(path):
    with open_memory(path) as memory:
        memory.remember(CAT)
        memory.remember(OSLO)

    class Broken(HashingEmbedder):
        def embed(self, texts):
            raise AssertionError("the embedding model was used")

    with Memory.open(path, embedder=Broken()) as memory:
        assert contents(memory.search("cats piano")) == [CAT]
        assert memory.search("cat Oslo") == []
        assert contents(memory.recall("moving to Oslo", words_only=True)) == [OSLO]


def test_many_at_once_are_all_or_none(memory):
    items = ["one fact", "another fact", "One fact!", MemoryItem(memory_id="", content="third", memory_type="pattern")]
    ids = memory.remember_many(items)
    assert len(ids) == 4
    assert ids[0] == ids[2]
    assert len(memory) == 3
    assert memory.get(ids[0]).validation_count == 2
    assert memory.remember_many(["one fact"]) == [ids[0]]
    assert memory.remember_many([]) == []
    taken = MemoryItem(memory_id=ids[3], content="the id is taken", memory_type="pattern")
    with pytest.raises(MemoryStoreError, match="already"):
        memory.remember_many(["never seen", taken])
    assert len(memory) == 3
    assert memory.recall("never seen", words_only=True) == []
    vectors = np.eye(64)[:2]
    given = memory.remember_many(["by vector one", "by vector two"], vectors=vectors)
    assert memory.recall("zzz", k=1, vector=vectors[1])[0].memory_id == given[1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.remember("  "), "empty"),
        (lambda m: m.remember("a\x00b"), "NUL"),
        (lambda m: m.remember("a\ud800b"), "surrogate"),
        (lambda m: m.remember("x", memory_type="dream"), "allowed: conversation, knowledge, pattern, preference"),
        (lambda m: m.remember("x", source="dog"), "allowed: person, agent, tool"),
        (lambda m: m.remember("x", importance=2), "0 to 1"),
        (lambda m: m.remember("x", tags="work"), "list"),
        (lambda m: m.remember("x", created_at=float("nan")), "created_at"),
        (
            lambda m: m.remember("x", created_at=1_700_000_000_000),
            "created_at: 1700000000000; allowed: seconds since 1970",
        ),
        (lambda m: m.remember("x", created_at=10**400), "created_at"),
        (lambda m: m.remember("x", created_at="yesterday"), "created_at: 'yesterday'"),
        (lambda m: m.remember("x", metadata={"n": float("nan")}), "metadata: .*without NaN"),
        (lambda m: m.remember("x", metadata={"n": "a\ud800b"}), "metadata: half a surrogate pair"),
        (lambda m: m.remember("x", metadata={"n": {1}}), "metadata: .*JSON"),
        (lambda m: m.remember("x", metadata={1: 2, "a": 3}), "metadata: .*JSON"),
        (lambda m: m.remember("x", metadata="page 3"), "metadata: 'page 3'"),
        (lambda m: m.remember("x", tags=None), "tags: None"),
        (lambda m: m.remember("x", derived_from="m-1"), "derived_from: 'm-1'"),
        (lambda m: m.remember("x", source_name="a\ud800b"), "source_name"),
        (lambda m: m.remember_many([MemoryItem(memory_id="", content="x", validation_count="2")]), "validation_count"),
        (lambda m: m.remember("x", vector=[1.0, 2.0]), "2 dimensions; allowed: 64"),
        (lambda m: m.remember("x", vector=[0.0] * 64), "zero"),
        (lambda m: m.remember("x", vector=[float("nan")] * 64), "finite"),
        (lambda m: m.remember_many(["x"], vectors=np.ones((2, 64))), "one per item"),
        (lambda m: m.recall(""), "query"),
        (lambda m: m.recall("x", k=0), "k: 0"),
        (lambda m: m.recall("x", memory_type="dream"), "dream"),
        (lambda m: m.get("m-none"), "no memory m-none"),
        (lambda m: m.forget("m-none"), "no memory m-none"),
    ],
)
def test_what_does_not_fit_is_one_sentence(memory, call, words):
    memory.remember("something")
    with pytest.raises(MemoryStoreError, match=words):
        call(memory)
    assert len(memory) == 1


@pytest.mark.parametrize("number", [1_700_000_000, np.int64(1_700_000_000), np.float64(1.7e9), np.float32(1.7e9)])
def test_a_time_of_any_kind_of_number_is_read_back(path, number):
    items = [MemoryItem(memory_id="", content="told then", created_at=number, access_count=np.int64(2))]
    with open_memory(path) as memory:
        (memory_id,) = memory.remember_many(items)
        other = memory.remember("told then, too", created_at=number)
    with open_memory(path) as memory:
        for known in (memory_id, other):
            assert memory.get(known).created_at == pytest.approx(1.7e9)
        assert memory.doctor().clean


def test_searching_for_no_word_finds_nothing(memory):
    memory.remember(REPORT)
    for query in ("???", "。", "-"):
        assert memory.search(query) == []
        memory.recall(query)


def test_a_person_who_tells_what_the_agent_noted_is_its_source(path):
    with open_memory(path) as memory:
        noted = memory.remember(
            REPORT, source="agent", source_name="scribe", memory_type="knowledge", metadata={"p": 1}
        )
        assert memory.recall("report", source="person") == []
        assert memory.remember(REPORT, memory_type="knowledge") == noted
        assert [hit.memory_id for hit in memory.recall("report", source="person")] == [noted]
        batch = [
            MemoryItem(memory_id="", content=CAT, memory_type="knowledge", source="agent"),
            MemoryItem(memory_id="", content=CAT, memory_type="knowledge"),
        ]
        memory.remember_many(batch)
        assert memory.remember(CAT, memory_type="knowledge", source="tool")
    with open_memory(path) as memory:
        for query in ("report", "Zorblax"):
            (hit, *_) = memory.recall(query, source="person")
            item = memory.get(hit.memory_id)
            assert (item.source, item.source_name) == ("person", "")
        assert memory.doctor().clean


def test_what_is_told_twice_in_a_batch_is_what_it_is_when_told_one_by_one(path):
    told = [
        MemoryItem(memory_id="", content=CAT, memory_type="knowledge", source="agent", tags=["pets"], importance=0.2),
        MemoryItem(memory_id="", content=CAT, memory_type="knowledge", tags=["home", "pets"], importance=0.9),
    ]
    kept = []
    for name, batches in (("together.db", [told]), ("apart.db", [told[:1], told[1:]])):
        with open_memory(path.with_name(name)) as memory:
            for batch in batches:
                memory.remember_many(batch)
            (item,) = memory.items()
            kept.append((item.tags, item.importance, item.source, item.validation_count))
    assert kept[0] == kept[1] == (["pets", "home"], 0.9, "person", kept[0][3])


@pytest.mark.parametrize(
    "echo",
    [
        "Based on our conversation, the report is due on Friday.",
        "From our earlier chat, the report is due on Friday.",
        "You asked me to keep in mind that the report is due on Friday.",
    ],
)
def test_a_repeat_with_a_frame_around_it_is_no_news(memory, echo):
    report = memory.remember(REPORT)
    assert memory.remember(echo, source="agent") == report


def test_a_frame_that_names_something_is_news(memory):
    report = memory.remember(REPORT)
    assert (
        memory.remember("According to the contract with Kenya, the report is due on Friday.", source="agent") != report
    )


def test_a_japanese_repeat_with_a_frame_around_it_is_no_news(memory):
    known = memory.remember("報告書の締め切りは金曜日です。")
    for echo in ("あなたは報告書の締め切りは金曜日だと言いました。", "報告書の締め切りは金曜日ですね。"):
        assert memory.remember(echo, source="agent") == known


@pytest.mark.parametrize(
    ("known", "news"),
    [
        ("私は明日の午後の会議に出席します。", "私は明日の午後の会議に出席しません。"),
        ("会議室は本館の三階の奥にあります。", "会議室は本館の四階の奥にあります。"),
    ],
)
def test_a_japanese_denial_or_number_is_news(memory, known, news):
    old = memory.remember(known)
    assert memory.remember(news, source="agent") != old


def test_a_closed_memory_says_so(path):
    memory = open_memory(path)
    memory.remember("x y")
    memory.close()
    memory.close()
    for call in (lambda: memory.remember("z"), lambda: memory.recall("x"), lambda: len(memory), memory.stats):
        with pytest.raises(MemoryStoreError, match="closed"):
            call()


def test_two_openings_see_each_other(path):
    with open_memory(path) as one, open_memory(path) as two:
        first = one.remember("the lamp is red")
        assert contents(two.recall("lamp")) == ["the lamp is red"]
        second = two.remember("the lamp is broken")
        assert two.remember("the lamp is red") == first
        assert {hit.memory_id for hit in one.recall("lamp")} == {first, second}
        assert one.get(first).validation_count == 2
        one.forget(second)
        assert [hit.memory_id for hit in two.recall("lamp")] == [first]
        third = two.remember("the lamp is new")
        assert {hit.memory_id for hit in one.recall("lamp")} == {first, third}


@pytest.mark.parametrize("seed", range(4))
def test_a_view_that_was_caught_up_is_the_one_that_is_loaded_anew(path, seed):
    """Random steps through three openings; then each of them ranks as a fourth does that has just been opened."""
    chance = random.Random(seed)
    words = [f"topic{i}" for i in range(30)]
    openings = [open_memory(path, weights=Weights(recency=0.0)) for _ in range(3)]
    ids = []
    for _ in range(150):
        memory = chance.choice(openings)
        step = chance.random()
        text = " ".join(chance.choices(words, k=chance.randint(2, 90)))
        session = chance.choice([None, "a", "b"])
        if step < 0.6 or not ids:
            ids.append(memory.remember(text, session_id=session, tags=chance.sample(["x", "y", "z"], 2)))
        elif step < 0.7:
            again = memory.peek(chance.choice(ids))
            assert memory.remember(again.content, session_id=again.session_id, tags=["told"]) == again.memory_id
        elif step < 0.8:
            gone = memory.forget(chance.choice(ids))
            ids = [memory_id for memory_id in ids if memory_id not in gone]
        elif step < 0.9:
            ids += memory.remember_many([f"{text} {number}" for number in range(3)])
        else:
            memory.recall(text, k=3)
    for memory in openings:
        memory._core.write_uses_now()
    with open_memory(path, weights=Weights(recency=0.0)) as fresh:
        assert fresh.doctor().clean
        for query in [" ".join(chance.choices(words, k=3)) for _ in range(12)]:
            for filters in ({}, {"session_id": "a"}, {"tags": ["x"]}, {"tags": ["told"]}):
                hits = fresh.recall(query, count=False, **filters)
                expected = [(hit.memory_id, pytest.approx(hit.score, rel=1e-4)) for hit in hits]
                for memory in openings:
                    hits = memory.recall(query, count=False, **filters)
                    assert [(hit.memory_id, hit.score) for hit in hits] == expected
    for memory in openings:
        memory.close()


def test_threads_share_one_memory(memory):
    errors = []

    def work(name):
        try:
            for number in range(25):
                memory.remember(f"thread {name} wrote note {number}", session_id=name)
                memory.recall(f"note {number}", k=3)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(memory) == 100
    assert len(memory.recall("thread a wrote note", 100, session_id="a")) == 25
    assert memory.doctor().clean


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.memory.helpers import open_memory
with open_memory(__import__("pathlib").Path(sys.argv[2])) as memory:
    for number in range(20):
        memory.remember(f"process {sys.argv[3]} wrote note {number}", session_id=sys.argv[3])
"""


def test_processes_write_at_once_even_while_the_file_is_made(path, request):
    root = str(request.config.rootpath)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, root, str(path), name], cwd=root) for name in "abc"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    with open_memory(path) as memory:
        assert len(memory) == 60
        assert sorted(item.content for item in memory.items(session_id="b")) == sorted(
            f"process b wrote note {number}" for number in range(20)
        )
        assert memory.doctor().clean


def test_one_long_memory_does_not_hide_the_others(memory):
    said = " ".join(f"The quarterly report number {i} says the report on income is fine." for i in range(900))
    long = memory.remember(said, memory_type="knowledge")
    short = [
        memory.remember(f"Report {colour} is due in room {colour}", memory_type="knowledge")
        for colour in ("red", "blue", "green", "pink", "grey", "gold", "lime", "teal")
    ]
    for options in ({}, {"words_only": True}, {"memory_type": "knowledge"}):
        hits = memory.recall("report", k=9, count=False, **options)
        assert {hit.memory_id for hit in hits} == {long, *short}
        assert len(memory.recall("report", k=5, count=False, **options)) == 5
    assert len(memory.recall("report", k=50, count=False)) == 9
    echo = memory.remember("The report red is due in room red.", source="agent")
    assert echo == short[0], "the echo guard sees past the long one, too"


@pytest.mark.parametrize(
    ("said", "news"),
    [
        ("Your cat is called Momo and your dentist is on Main Street.", False),
        ("Your dentist is on Main Street; your cat's name is Momo.", False),
        ("Momo is the name of your cat.", False),
        ("As you know, your cat is named Momo.", False),
        ("Your cat is called Momo and your dentist is on Second Street.", True),
        ("Your cat is called Momo and your dog is called Rex.", True),
        ("Your cat is not called Momo and your dentist is on Main Street.", True),
        ("Rex is the name of your cat.", True),
        ("Momo and Rex are on Main Street.", True),
        ("As you know, your cat likes Main Street.", True),
    ],
)
def test_several_memories_in_one_sentence_are_no_news(memory, said, news):
    memory.remember("My cat is called Momo.", memory_type="knowledge")
    memory.remember("My dentist is on Main Street.", memory_type="knowledge")
    memory.remember(said, source="agent")
    assert len(memory) == 2 + news
    again = MemoryItem(memory_id="", content=said, source="tool", memory_type="pattern")
    ids = memory.remember_many([again, "A ship.", again])
    assert len(memory) == 3 + news, "told by a tool, what is there is an echo"
    assert ids[0] == ids[2] != ids[1]
