"""What says the same and what does not: echoes of an agent, facts that two tellings confirm, corrections."""

import gzip
import json
from pathlib import Path

import pytest

from agentlab.memory.saying import repeats, same_fact
from agentlab.memory.schema import VERSION
from agentlab.memory.words import signature

from .helpers import open_memory


@pytest.mark.parametrize(
    ("news", "known"),
    [
        ("Bob works at Siemens in Munich as an engineer.", "Anna works at Siemens in Munich as an engineer."),
        ("My brother has three cats in his house near Berlin.", "My brother has two cats in his house near Berlin."),
        ("Your rent is twelve hundred euros a month.", "My rent is fourteen hundred euros a month."),
        ("Your grandmother was a nurse in the town hospital.", "My grandfather was a nurse in the town hospital."),
        ("The flight to Rome on Friday at noon is cancelled.", "The flight to Rome is on Friday at noon."),
        ("It is -5 degrees outside in Oslo.", "It is 5 degrees outside in Oslo."),
        ("It takes 3.4 hours by train to Oslo.", "It takes 3-4 hours by train to Oslo."),
        ("Your favourite language is C++.", "My favourite language is C."),
        ("Your favourite language is C.", "My favourite language is C++."),
        ("The budget is €500.", "The budget is $500."),
        ("You like dogs more than cats.", "I like cats more than dogs."),
        ("anna is older than ben", "ben is older than anna"),
        ("明日の朝9時に東京駅で鈴木さんと会議があります", "明日の朝9時に東京駅で田中さんと会議があります"),
        ("会議は来週の月曜日の午後にあります", "会議は来週の火曜日の午後にあります"),
        ("太郎は花子より背が高い", "花子は太郎より背が高い"),
        ("The invoice was paid.", "Has the invoice been paid?"),
        ("Your flight to Oslo is cancelled.", "Please cancel my flight to Oslo."),
        ("Your flight to Oslo is cancelled.", "Cancel my flight to Oslo."),
        ("The table at Luigi's is booked.", "The user wants to book a table at Luigi's."),
        ("The flight is cancelled.", "We should cancel the flight."),
        ("The parcel arrived on Friday.", "The parcel may arrive on Friday."),
        ("The picnic is cancelled.", "If it rains, the picnic is cancelled."),
        ("The disk is full.", "The server is down if the disk is full."),
        ("Backup completed.", "Remind me when the backup is completed."),
        ("飛行機を予約しました。", "飛行機を予約してください。"),
        ("花子が太郎に本をあげた。", "太郎が花子に本をあげた。"),
        ("The cat chased the dog.", "The dog chased the cat."),
        ("My sister visited my mother.", "My mother visited my sister."),
        ("The user has two cats and three dogs.", "The user has three cats and two dogs."),
        ("Anna lives in Paris.", "Anna lives in Rome and Tom lives in Paris."),
        ("The budget is 200.", "The budget is 500 and the deposit 200."),
        ("The user works at Google.", "The user's brother works at Google."),
        ("The key is under the mat.", "The key is on the mat."),
        ("He lives in Rome.", "I live in Rome."),
        ("Her dentist is Dr. Lee.", "My dentist is Dr. Lee."),
        ("The server crashed again.", "The server crashed."),
        ("You moved to Berlin in June.", "I will move to Berlin in June."),
        ("You might move to Berlin in June.", "I will move to Berlin in June."),
        ("The hotel is booked.", "I doubt the flight is late and the hotel is booked."),
        ("The dog was dead.", "I dreamed the house was on fire and the dog was dead."),
        ("The museum is open.", "On Mondays the zoo is closed and the museum is open."),
        ("The parcel arrived.", "It seems that the parcel arrived."),
        ("You will water the plants.", "If I remember, I will water the plants."),
        ("[RESOLVED] Disk sda is full.", "[ERROR] Disk sda is full."),
        ("You like the name of the band.", "I like the band."),
    ],
)  # fmt: skip
def test_one_other_word_is_news(path, news, known):
    assert not repeats(news, known)
    with open_memory(path) as memory:
        first = memory.remember(known, memory_type="knowledge")
        assert memory.remember(news, memory_type="knowledge", source="agent") != first
        assert {item.content for item in memory.items()} == {news, known}


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("You told me that the report was due on Friday.", "The report is due on Friday."),
        ("Zorblax is your cat.", "My cat is called Zorblax."),
        ("The name of your cat is Zorblax.", "My cat is called Zorblax."),
        ("You drink green tea every morning.", "Every morning I drink green tea"),
        ("I have saved that your rent is due on Monday.", "My rent is due on Monday."),
        ("Yes, your rent is due on Monday.", "My rent is due on Monday."),
        ("Okay, so just a reminder: your rent is due on Monday.", "My rent is due on Monday."),
        ("Noted – your rent is due on Monday.", "My rent is due on Monday."),
        ("Don't forget that your rent is due Monday!", "My rent is due on Monday."),
        ("From what you told me, your rent is due on Monday.", "My rent is due on Monday."),
        ("Your cat's called Zorblax.", "My cat is called Zorblax."),
        ("Fact: your rent is due on Monday.", "My rent is due on Monday."),
        ("It's –5 °C in Oslo", "It is -5°C in Oslo."),
        ("あなたの猫の名前はタマです", "私の猫の名前はタマです"),
        ("猫を飼っている", "猫を飼っています"),
        ("You have a cat called Momo.", "My cat is called Momo."),
        ("The user drinks green tea every morning.", "Every morning I drink green tea"),
        ("The user's dentist is Dr. Lee.", "My dentist is Dr. Lee."),
        ("Your rent is due on **Monday**.", "My rent is due on Monday."),
        ("Did you know that your rent is due on Monday?", "My rent is due on Monday."),
        ("The deposit is 200.", "The budget is 500 and the deposit is 200."),
        ("担当者は田中だ。", "担当者は田中です。"),
    ],
)  # fmt: skip
def test_the_same_in_other_words_is_an_echo(said, known):
    assert repeats(said, known)


SAYINGS = json.loads(Path(__file__).with_name("sayings.json").read_text(encoding="utf-8"))


def test_other_facts_in_nearly_the_same_words_are_news():
    """Pairs that were collected by somebody who wanted to see facts taken for one another."""
    assert len(SAYINGS["news"]) > 400
    assert [pair for pair in SAYINGS["news"] if repeats(*reversed(pair)) or same_fact(*pair)] == []
    assert [pair for pair in SAYINGS["news"] if signature(pair[0]) == signature(pair[1])] == []


def test_ways_in_which_agents_repeat_what_they_were_told_are_known(path):
    with open_memory(path) as memory:
        known = {memory.remember(fact) for fact in SAYINGS["facts"]}
        told = {said: memory.remember(said, source="agent", memory_type="knowledge") for said in SAYINGS["echoes"]}
        assert [said for said, memory_id in told.items() if memory_id not in known] == []
        assert len(memory) == len(known)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("I like coffee, not tea.", "I like tea, not coffee."),
        ("I voted for the strike", "I voted against the strike"),
        ("I write C.", "I write C++."),
        ("It costs $500", "It costs €500"),
        ("I will move to Berlin in June", "I moved to Berlin in June"),
        ("I walk from home to work", "I walk from work to home"),
        ("I met your sister in Rome", "I met my sister in Rome"),
        ("My sister is older than my brother.", "My brother is older than my sister."),
        ("My sister called my brother", "My brother called my sister"),
        ("Our dogs chase cats", "Our dogs are chased by cats"),
        ("Never mix A and B, not ever", "Mix A and B, not ever"),
        ("I work until 5.", "I work after 5."),
        ("I am free until Monday.", "I am free after Monday."),
        ("The key is under the mat.", "The key is on the mat."),
        ("I was vegetarian.", "I am vegetarian."),
        ("I had a dog.", "I have a dog."),
        ("I have to sell the car.", "I sell the car."),
        ("My mother is her doctor.", "Her mother is my doctor."),
        ("Your dog bit my cat.", "My dog bit your cat."),
        ("弟は結婚している。", "弟は結婚していた。"),
        ("Engineers are managers.", "Managers are engineers."),
        ("Anna is free on Monday, Ben on Tuesday.", "Anna is free on Tuesday, Ben on Monday."),
        ("[ ] Call the bank", "[x] Call the bank"),
        ("2024-03-02: weight 71 kg.", "2024-03-09: weight 71 kg."),
        ("The file is too long.", "The file name is too long."),
        ("Ann is in the report.", "Ann is named in the report."),
        ("彼は来ると言った。", "彼は来ると言わなかった。"),
        ("私の名前はハナです。", "あなたの名前はハナです。"),
        ("1、2号室です。", "12号室です。"),
        ("The job takes args.", "The job takes *args."),
        ("The password is blue-otter-77.", "The password is blue-Otter-77."),
        ("It is down.", "IT is down."),
        ("The disk holds 25 MB.", "The disk holds 25 Mb."),
    ],
)
def test_the_opposite_confirms_nothing(path, one, other):
    assert not same_fact(one, other)
    assert not same_fact(other, one)
    with open_memory(path) as memory:
        memory.remember(one, session_id="a")
        memory.remember(other, session_id="b")
        assert memory.consolidate() == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("My cat is called Momo.", "Momo is my cat"),
        ("The name of my dog is Rex", "My dog is named Rex"),
        ("I'm allergic to nuts.", "I am allergic to nuts!"),
        ("My rent is due on Monday.", "On Monday my rent is due."),
        ("I have a cat called Momo.", "My cat's name is Momo."),
        ("I have two kids.", "I've got two kids"),
        ("My dog's a beagle.", "My dog is a beagle."),
        ("The office closes at six.", "My office closes at six"),
    ],
)
def test_two_ways_of_telling_a_fact_confirm_it(one, other):
    assert same_fact(one, other)
    assert same_fact(other, one)


@pytest.mark.parametrize(
    "correction",
    [
        "Cancelled!", "False.", "Forget it.", "中止。", "No longer true.", "That changed last week.",
        "Wrong, sorry, cancelled.", "He retired in June after thirty long years of practice.", "これはもう間違いです。",
    ],
)  # fmt: skip
def test_a_persons_correction_keeps_what_it_is_about(memory, correction):
    known = memory.remember("The meeting with Anna is on Friday.")
    assert memory.recall("meeting")[0].memory_id == known
    told = memory.remember(f"The meeting with Anna is on Friday. {correction}")
    assert memory.get(told).content == f"The meeting with Anna is on Friday. {correction}"
    turn = memory.conversation("later").add(f"The meeting with Anna is on Friday. {correction}", "I see.")
    assert turn.user_input in {item.content for item in memory.items(session_id="later")}


@pytest.mark.parametrize(
    ("known", "correction"),
    [
        ("The flight leaves at 9:40.", "It was cancelled."), ("The flight leaves at 9:40.", "No."),
        ("The museum is free of charge.", "Except on public holidays in Bavaria."),
        ("The dentist moved to 8 p.m. on Friday.", "No."), ("The report is due on Friday.", "This is false."),
        ("The report is due on Friday.", "That has been cancelled."), ("The parcel 12 was shipped.", "Delivered."),
        ("Anna lives in Rome.", "She died."), ("会議は金曜日です。", "それは中止です。"),
    ],
)  # fmt: skip
def test_an_agents_correction_keeps_what_it_is_about(memory, known, correction):
    first = memory.remember(known)
    told = memory.remember(f"{known} {correction}", source="tool")
    assert told != first
    assert memory.get(told).content == f"{known} {correction}"


def test_a_sentence_that_is_cut_at_an_abbreviation_stays_whole(memory):
    memory.remember("Dr. Weber moved the appointment to 8 p.m. on Friday.")
    memory.remember("The office moved to No. 9 Main Street.")
    for news in ("Dr. Weber moved the appointment to 8 a.m. on Friday.", "The office moved to No. 7 Main Street."):
        assert memory.get(memory.remember(news, source="agent")).content == news


def test_politeness_beside_an_echo_is_no_correction(memory):
    first = memory.remember("The flight leaves at 9:40.")
    assert memory.remember("The flight leaves at 9:40. Great! Glad I could help.", source="agent") == first
    assert memory.remember("Got it! The flight leaves at 9:40. Will do.", source="agent") == first


@pytest.mark.parametrize(
    "padding",
    [" " * 20_000, "\t" * 20_000, "; " * 10_000, "とおっしゃ" * 10_000, " and" * 5_000, "-" * 20_000, "'" * 20_000],
)
def test_a_long_run_of_anything_takes_no_time(memory, padding):
    memory.remember(f"col{padding}val and is here", source="tool")
    memory.remember(f"a{padding}b", source="tool")
    memory.remember(f"The col{padding}val and is here", source="tool")
    memory.remember(f"Is col{padding}val here?")


@pytest.mark.timeout(60)  # it took a minute
@pytest.mark.parametrize("source", ["person", "tool"])
def test_a_sentence_said_thousands_of_times_takes_no_time(memory, source):
    known = memory.remember("The rent is due on Monday.")
    memory.recall("rent")
    memory.remember("The rent is due on Monday. " * 4_000, source=source)
    memory.remember(" and ".join(f"item {number} is in box {number % 7}" for number in range(10_000)), source=source)
    assert memory.get(known).content == "The rent is due on Monday."


@pytest.mark.timeout(60)  # it took minutes
def test_a_long_text_beside_another_takes_seconds(memory):
    memory.remember(" ".join(f"Item {number} is in box {number % 7}." for number in range(2000)))
    told = memory.remember(" ".join(f"Item {number} is in room {number % 7}." for number in range(2000)), source="tool")
    assert "room 6" in memory.get(told).content


def test_thanks_beside_an_echo_is_no_correction(memory):
    known = memory.remember("The meeting with Anna is on Friday.", memory_type="knowledge")
    assert memory.recall("meeting")[0].memory_id == known
    assert memory.remember("The meeting with Anna is on Friday. Thanks!") == known


def test_a_file_of_the_third_schema_tells_more_apart(path):
    """`schema_3.db.gz` was written by the last version with that schema, whose signatures merged what these do not."""
    with gzip.open(Path(__file__).with_name("schema_3.db.gz")) as old:
        path.write_bytes(old.read())
    with open_memory(path) as memory:
        assert memory.stats()["schema_version"] == VERSION
        assert memory.doctor().clean
        before = {item.content: item.memory_id for item in memory.items(session_id="a")}
        assert "The code is schön." in before
        for told, again in (
            ("I will quit smoking.", "I'll quit smoking"), ("It is 3.4 degrees in Oslo.", "it is 3.4 degrees in Oslo"),
        ):  # fmt: skip
            assert memory.remember(again, session_id="a") == before[told]
        for other in ("I quit smoking.", "It is 3-4 degrees in Oslo.", "The code is schon."):
            assert memory.remember(other, session_id="a") not in before.values()
        (fact,) = memory.knowledge()
        assert fact.validation_count == 2
