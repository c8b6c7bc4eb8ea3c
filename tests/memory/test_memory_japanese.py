"""Japanese is found by its words: 60 facts and 60 questions written for the purpose (japanese.jsonl)."""

import json
from pathlib import Path

import pytest

from agentlab import Memory

from .helpers import contents, open_memory

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "japanese.jsonl").read_text("utf-8").splitlines()]


def found(memory, **options):
    return sum(pair["fact"] in contents(memory.recall(pair["question"], k=5, count=False, **options)) for pair in PAIRS)


def test_by_text_index_alone(path):
    assert len(PAIRS) == len({pair["fact"] for pair in PAIRS}) == 60
    with open_memory(path) as memory:
        memory.remember_many([pair["fact"] for pair in PAIRS])
        right = found(memory, words_only=True)
    print(f"text index alone: {right} of 60")
    assert right >= 50


@pytest.mark.model
def test_fused_with_an_english_model(path, minilm):
    with Memory.open(path, embedder=minilm) as memory:
        memory.remember_many([pair["fact"] for pair in PAIRS])
        right = found(memory)
    print(f"fused: {right} of 60")
    assert right >= 50


def test_fts5_finds_words_of_two_characters_inside_sentences(path):
    with open_memory(path) as memory:
        memory.remember_many([pair["fact"] for pair in PAIRS])
        assert contents(memory.search("祖母")) == ["祖母の誕生日は三月九日です。"]
        assert contents(memory.search("血液型")) == ["血液型はＡＢ型です。"]
        assert contents(memory.search("ab型")) == ["血液型はＡＢ型です。"]
        assert contents(memory.search("妹")) == ["妹は札幌で看護師をしています。"]
        assert memory.search("存在しない語") == []
        assert memory.doctor().clean
