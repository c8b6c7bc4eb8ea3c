"""Thoughts apart from what is said, whole and streamed in pieces of any size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlab.agent.reading import Reader, Said, split_thought


@pytest.mark.parametrize(
    ("output", "thought", "text"),
    [
        ("Paris.", "", "Paris."),
        ("<think>France has a capital.</think>Paris.", "France has a capital.", "Paris."),
        ("France has a capital.</think>\n\nParis.", "France has a capital.", "Paris."),
        ("<think>never closed", "never closed", ""),
        ("<think>one</think> A <think>two</think> B", "one\ntwo", "A  B"),
        ("<think></think>Paris.", "", "Paris."),
        ("", "", ""),
        ("a</think>b<think>c</think>d</think>e", "a\nc", "bde"),
    ],
)
def test_thoughts_are_never_part_of_what_is_said(output, thought, text):
    assert split_thought(output) == Said(thought, text)


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<tool_call>", "a", " b", "<", "</", "th", "{}"]), max_size=12
)


@given(PIECES, st.integers(1, 7))
def test_streaming_sorts_like_reading_at_once_whatever_the_pieces(pieces, size):
    text = "".join(pieces)
    whole, cut = Reader("<tool_call>"), Reader("<tool_call>")
    expected = whole.feed(text) + whole.finish()
    got = []
    for at in range(0, len(text), size):
        got += cut.feed(text[at : at + size])
    got += cut.finish()

    def joined(parts):
        return {part: "".join(text for kind, text in parts if kind == part) for part in ("thought", "call", "answer")}

    assert joined(got) == joined(expected)


@given(st.text(alphabet="ab<>/think \n", max_size=60))
def test_nothing_is_lost_but_tags(text):
    reader = Reader("")
    seen = "".join(piece for _, piece in reader.feed(text) + reader.finish())
    assert seen == text.replace("<think>", "").replace("</think>", "") or "<think>" in text or "</think>" in text
    assert sorted(split_thought(text).text) == sorted(split_thought(text).text.strip())


def test_a_call_is_handed_on_whole_and_a_half_tag_is_held_back():
    reader = Reader("<tool_call>")
    assert reader.feed("I look. <tool") == [("answer", "I look. ")]
    assert reader.feed('_call>{"name"') == [("call", '<tool_call>{"name"')]
    assert reader.feed(": 1}") == [("call", ": 1}")]
    assert reader.finish() == []
    late = Reader("<tool_call>")
    assert late.feed("a < b <tool") == [("answer", "a < b ")]
    assert late.finish() == [("answer", "<tool")]


def test_a_lone_end_of_a_thought_takes_back_what_seemed_an_answer():
    reader = Reader("<tool_call>")
    assert reader.feed("Two and two") == [("answer", "Two and two")]
    assert reader.feed(" are 4.</thi") == [("answer", " are 4.")]
    assert reader.feed("nk>Four.") == [("retracted", ""), ("answer", "Four.")]
    assert reader.feed("<think>Sure?</think>Yes</think>.") == [  # later ones are stray tags
        ("thought", "Sure?"), ("answer", "Yes"), ("answer", "."),
    ]  # fmt: skip
    assert Reader("").feed("a<think>b</think>c</think>d")[-1] == ("answer", "d")


def test_a_thought_that_both_the_prompt_and_the_server_have_opened():
    reader = Reader("<tool_call>", thinking=True)
    assert reader.feed("\n<think>hm</think>yes") == [("thought", "\n"), ("thought", "hm"), ("answer", "yes")]


def test_a_thought_that_the_prompt_has_opened():
    reader = Reader("<tool_call>", thinking=True)
    assert reader.feed("hm <tool_call>x</think>yes") == [("thought", "hm <tool_call>x"), ("answer", "yes")]
