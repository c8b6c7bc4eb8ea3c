"""What is forgotten is in no byte of any file; what derives from it goes along; a tombstone stays."""

import random

import pytest

from agentlab.errors import MemoryStoreError

from .helpers import contents, everything, open_memory

SECRET = "Xyloquent-7731-Zebrafinch"
MARKS = (b"xyloquent", b"7731", b"zebrafinch")


def left(path):
    return [(name, mark) for name, data in everything(path).items() for mark in MARKS if mark in data.lower()]


def fill(memory, count=300):
    for number in range(0, count, 50):
        memory.remember_many([f"ordinary note {i} about {['rain', 'sun', 'wind', 'snow'][i % 4]}" for i in
                              range(number, number + 50)])  # fmt: skip


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_no_byte_is_left(path, place):
    with open_memory(path) as memory:
        if place != "first":
            fill(memory)
        secret = memory.remember(f"My passphrase is {SECRET}.", tags=["private"], metadata={"hint": SECRET})
        if place != "last":
            fill(memory, 600)
        memory.recall("passphrase")
        assert left(path), "the test must be able to fail"
        assert memory.forget(secret, reason="asked") == [secret]
        assert left(path) == []
        assert memory.recall("passphrase zebrafinch", words_only=True) == [] or all(
            SECRET not in hit.content for hit in memory.recall("passphrase")
        )
        assert memory.search("zebrafinch") == []
        assert memory.peek(secret) is None
        (tombstone,) = memory.tombstones()
        assert (tombstone.memory_id, tombstone.kind, tombstone.reason) == (secret, "conversation", "asked")
        assert memory.doctor().clean
    assert left(path) == []


def test_long_memories_leave_nothing_in_overflow_pages(path):
    with open_memory(path) as memory:
        fill(memory)
        text = " ".join(f"{SECRET} paragraph {number}." for number in range(800))
        secret = memory.remember(text)
        fill(memory, 600)
        memory.forget(secret)
        assert left(path) == []
        assert memory.doctor().clean


def scatter(store, seed):
    """Rows of many sizes, inserted and grown in random places, those with the secret deleted again."""
    chance = random.Random(seed)
    store.db.execute(f"CREATE TABLE keyed{seed}(k TEXT PRIMARY KEY, v TEXT) WITHOUT ROWID")
    store.db.execute(f"CREATE TABLE indexed{seed}(id INTEGER PRIMARY KEY, v TEXT)")
    store.db.execute(f"CREATE INDEX by_v{seed} ON indexed{seed}(v)")
    with store.writing() as db:
        for number in range(1000):
            word = f"{SECRET if number % 37 == 5 else 'plain'}-" * chance.randint(1, 30)
            key = "".join(chance.choices("abcdefgh", k=12))
            db.execute(f"INSERT OR REPLACE INTO keyed{seed} VALUES (?, ?)", (key, word))
            db.execute(f"INSERT INTO indexed{seed}(v) VALUES (?)", (key + word,))
            if number % 3 == 0:
                place = chance.randint(1, number + 1)
                db.execute(f"UPDATE indexed{seed} SET v = v || 'more' WHERE id = ?", (place,))
    for table in ("keyed", "indexed"):
        store.db.execute(f"DELETE FROM {table}{seed} WHERE instr(v, ?)", (SECRET,))
    store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def test_purging_reaches_the_copies_that_secure_delete_leaves(path):
    """Rows that SQLite moves between pages leave copies in unused parts of pages, which secure_delete does not zero."""
    with open_memory(path) as memory:
        store = memory._core.store
        for seed in range(40):
            scatter(store, seed)
            if left(path):
                break
        assert left(path), "the test must be able to fail"
        assert store.purge()
        assert left(path) == []


def test_a_reader_elsewhere_delays_and_the_next_opening_finishes(path):
    memory = open_memory(path)
    secret = memory.remember(f"It is {SECRET}.")
    reader = open_memory(path)
    transaction = reader._core.store.reading()
    transaction.__enter__().execute("SELECT content FROM memories").fetchone()
    memory.forget(secret)
    assert left(path), "a reader still needs the log"
    transaction.__exit__(None, None, None)
    reader.close()
    memory.close()
    open_memory(path).close()
    assert left(path) == []


def test_forgetting_takes_what_derives_along(path):
    with open_memory(path) as memory:
        talk = memory.conversation("s1", user_id="ana")
        talk.add(f"My passphrase is {SECRET}.", "Noted.")
        talk.add("I like tea.", "So do I.")
        secret = memory.search("passphrase")[0].memory_id
        talk.add("What is my passphrase?", f"It is {SECRET}.", context_used=[secret])
        talk.add("What do I drink?", "Tea.", context_used=[secret])
        other = memory.conversation("s2")
        other.add("Tell me my passphrase again", f"Your passphrase is {SECRET}.", context_used=[])
        copied = memory.remember(f"Knows: {SECRET}", memory_type="knowledge", derived_from=[secret])
        gone = memory.forget(secret)
        assert {secret, copied} <= set(gone)
        assert left(path) == []
        assert [turn.user_input for turn in talk.turns()] == ["I like tea.", "What do I drink?"]
        assert other.turns() == []
        assert {session.session_id for session in memory.sessions()} == {"s1", "s2"}
        assert secret not in talk.session().active_memories
        assert memory.doctor().clean


def test_summaries_lose_the_sentences_of_forgotten_turns(path):
    with open_memory(path) as memory:
        talk = memory.conversation("s")
        talk.add(f"The vault code is {SECRET}, and the vault is old.", "I see, the vault is old.")
        for number in range(60):
            talk.add(f"The vault in town {number} was painted green.", f"A green vault in town {number} then.")
        assert any(SECRET in part.text for part in talk.summary()), "the test must be able to fail"
        memory.forget(memory.search("vault code")[0].memory_id)
        assert left(path) == []
        assert talk.summary()


def test_knowledge_goes_with_its_source_and_relations_with_it(path):
    with open_memory(path) as memory:
        one = memory.remember(f"My locker number is {SECRET}", session_id="a")
        memory.remember(f"My locker number is {SECRET}", session_id="b")
        (item,) = memory.consolidate()
        assert item.source_conversations[0] == one
        gone = memory.forget(one)
        assert item.knowledge_id in gone
        assert memory.knowledge() == []
        assert {stone.memory_id for stone in memory.tombstones()} == set(gone)
        assert left(path), "the second telling is a memory of its own and stays"
        memory.forget(*[hit.memory_id for hit in memory.search("locker")])
        assert left(path) == []


def test_forgetting_a_session_takes_all_of_it(path):
    with open_memory(path) as memory:
        talk = memory.conversation("private", user_id=SECRET)
        talk.add(f"I am {SECRET}", "Hello!")
        talk.prefer(name=SECRET)
        memory.remember("stays", session_id="other")
        assert len(memory.forget(session_id="private")) == 2
        assert left(path) == []
        assert memory.sessions() == []
        assert [item.content for item in memory.items()] == ["stays"]
        assert memory.forget(session_id="private") == []


def test_an_unknown_id_forgets_nothing(memory):
    known = memory.remember("keep me")
    with pytest.raises(MemoryStoreError, match="no memory m-x"):
        memory.forget(known, "m-x")
    assert len(memory) == 1
    assert memory.forget() == []


def test_forgetting_one_fact_keeps_what_merely_got_the_same_answer(memory):
    """Each answer merges into the first one, which the turn with the secret told."""
    same = "Okay, I will remember that."
    facts = ["Hi, my PIN is 4711.", "My cat is called Tom.", "I was born in Kyoto in 1980."]
    talk, other = memory.conversation("a"), memory.conversation("b")
    for fact in facts:
        talk.add(fact, same)
    other.add("My dentist is on Main Street.", same)
    pin = memory.search("PIN")[0].memory_id
    assert memory.forget(pin) == [pin]
    assert [turn.user_input for turn in talk.turns()] == facts[1:]
    assert len(other.turns()) == 1
    assert {*facts[1:], same, "My dentist is on Main Street."} == set(contents(memory.items()))


def test_forgetting_an_answer_keeps_what_the_person_told_beside_it(memory):
    talk = memory.conversation("s")
    talk.add("I moved to Oslo for the new job.", "Congratulations! By the way, the garage opens at noon.")
    talk.add("My piano is out of tune.", "Hi! I see.")
    garage = memory.search("garage")[0].memory_id
    assert memory.forget(garage) == [garage]
    assert {"I moved to Oslo for the new job.", "My piano is out of tune."} <= set(contents(memory.items()))
    assert [turn.user_input for turn in talk.turns()] == ["My piano is out of tune."]


def test_a_greeting_is_no_echo_of_a_memory_that_begins_with_it(memory):
    talk = memory.conversation("s")
    pin = memory.remember("Hi, my PIN is 4711.")
    talk.add("My cat is called Tom.", "Hi!")
    memory.forget(pin)
    assert [turn.user_input for turn in talk.turns()] == ["My cat is called Tom."]


@pytest.mark.parametrize(
    ("said", "answered", "context"),
    [
        ("Log me in please", f"Use {SECRET} at the blue door.", True),
        (f"Is it {SECRET} or not?", f"It is {SECRET}.", True),
        (f"Is it {SECRET} or not?", f"It is {SECRET}.", False),
        ("Now what?", f"Your passphrase is {SECRET}. Your dentist is called Yilmaz.", True),
        ("Now what?", f"Your passphrase is {SECRET}. Your dentist is called Yilmaz.", False),
        ("Now what?", f"Based on our conversation, your passphrase is {SECRET}.", False),
        (f"My passphrase is {SECRET}. Who is my dentist?", "Yilmaz.", False),
    ],
)
def test_no_byte_is_left_in_what_later_turns_made_of_it(path, said, answered, context):
    with open_memory(path) as memory:
        talk = memory.conversation("s")
        talk.add(f"My passphrase is {SECRET}.", "Noted.")
        talk.add("I like tea.", "So do I.")
        secret = memory.recall("passphrase")[0].memory_id
        memory.conversation("t").add(said, answered, context_used=[secret] if context else [])
        memory.forget(secret)
        assert left(path) == []
        assert [turn.user_input for turn in talk.turns()] == ["I like tea."]
        assert memory.doctor().clean


def test_the_same_words_of_another_session_stay_with_their_turn(memory):
    for session in "ab":
        memory.conversation(session).add("Yes, please do it.", f"Done for {session}.")
    memory.forget(session_id="a")
    assert [turn.user_input for turn in memory.conversation("b").turns()] == ["Yes, please do it."]


def test_a_japanese_turn_without_the_secret_stays(memory):
    talk = memory.conversation("s")
    talk.add("合言葉はひまわりです。", "わかりました。")
    talk.add("猫の名前はトムです。", "わかりました。")
    secret = next(item.memory_id for item in memory.items() if "ひまわり" in item.content)
    talk.add("合言葉は何ですか。", "ひまわりです。", context_used=[secret])
    memory.forget(secret)
    assert [turn.user_input for turn in talk.turns()] == ["猫の名前はトムです。"]
    assert not any("ひまわり" in item.content for item in memory.items())


def test_the_log_is_cut_with_the_next_write_after_the_reader_closed(path):
    with open_memory(path) as memory:
        secret = memory.remember(f"It is {SECRET}.")
        with open_memory(path) as reader, reader._core.store.reading() as db:
            db.execute("SELECT content FROM memories").fetchone()
            memory.forget(secret)
            memory.remember("a write while somebody reads")
            assert left(path), "a reader still needs the log"
            reader._core.store.damage["as if killed"] = None  # so that the reader does not cut it when it closes
        assert left(path)
        memory.remember("a write after that")
        assert left(path) == []
        assert memory._core.store.meta("purge") == "0"


def test_a_purge_that_was_cut_off_stays_due(path):
    with open_memory(path) as memory:
        secret = memory.remember(f"It is {SECRET}.")
        with open_memory(path) as reader, reader._core.store.reading() as db:
            db.execute("SELECT content FROM memories").fetchone()
            memory.forget(secret)
            assert memory._core.store.purge_due
            seen = []
            memory._core.store.db.set_trace_callback(seen.append)
            assert not memory._core.store.purge()
            memory._core.store.db.set_trace_callback(None)
            assert not any("VACUUM" in statement or "UPDATE" in statement for statement in seen)


def test_taking_back_and_forgetting_spare_older_turns_that_say_the_same_known_thing(memory):
    known = memory.remember("My cat is called Momo.", memory_type="knowledge")
    talk = memory.conversation("s")
    talk.add("Tell me everything about the cat please", "Your cat is called Momo.", context_used=[known])
    talk.add("What is the weather in Oslo?", "I cannot know that.")
    before = [turn.user_input for turn in talk.turns()]
    for again in ("undo", "forget"):
        talk.add("By the way, my cat is called Momo.", "Understood, that is a nice name.")
        if again == "undo":
            talk.undo()
        else:
            memory.forget(next(item.memory_id for item in memory.items() if item.content.startswith("By the way")))
        assert [turn.user_input for turn in talk.turns()] == before
    assert memory.doctor().clean


def test_a_turn_that_told_nothing_new_is_taken_back_with_every_byte(path):
    with open_memory(path) as memory:
        talk = memory.conversation("s")
        talk.add("Hello there my friend", "Good day to you")
        talk.add("Hello there my friend", f"partial {SECRET} wor", cut_off=True)
        assert left(path), "the test must be able to fail"
        assert talk.undo().user_input == "Hello there my friend"
        assert left(path) == []
        assert len(talk.turns()) == 1


def test_what_a_turn_told_again_counts_once_less_when_it_is_taken_back(memory):
    talk = memory.conversation("s")
    talk.add("My cat is called Momo.", "Noted.")
    told = memory.search("cat")[0].memory_id
    talk.add("My cat is called Momo.", "You said so before.")
    assert memory.get(told).validation_count == 2
    talk.undo()
    assert memory.get(told).validation_count == 1
    assert memory.consolidate() == [], "told once"


def test_knowledge_is_made_anew_of_the_sources_that_stay(memory):
    tellings = ("The office closes at six.", "My office closes at six.", "At six the office closes.")
    ids = [memory.remember(text, session_id=session) for session, text in zip("abc", tellings, strict=True)]
    (item,) = memory.consolidate()
    assert item.source_conversations == sorted(ids)
    assert item.knowledge_id in memory.forget(ids[0])
    (anew,) = memory.knowledge()
    assert anew.source_conversations == sorted(ids[1:])
    assert (anew.validation_count, memory.consolidate()) == (2, [])
    memory.forget(ids[1])
    assert memory.knowledge() == [], "told once is no knowledge"
    assert memory.doctor().clean


def test_a_reason_keeps_no_word_of_what_is_forgotten(path):
    with open_memory(path) as memory:
        memory.forget(memory.remember(f"My passphrase is {SECRET}."), reason=f"asked: {SECRET} leaked")
        assert left(path) == []
        assert memory.tombstones()[0].reason == "asked: … leaked"
        named = memory.remember("The build is green.", session_id=f"project {SECRET}x", tags=[f"tag-{SECRET}y"])
        memory.forget(named, reason=f"project {SECRET}x is over, and tag-{SECRET}y with it")
        assert not any(SECRET in tombstone.reason for tombstone in memory.tombstones())
