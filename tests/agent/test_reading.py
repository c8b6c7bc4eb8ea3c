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
        ("<think>a<think>b</think>secret</think>answer", "absecret", "answer"),
        ("<think>a<think>b</think>c<think>d</think>e</think>f", "abcde", "f"),
        ("<think>It asks for a <think> tag.</think>There it is.", "It asks for a  tag.", "There it is."),
    ],
)
def test_thoughts_are_never_part_of_what_is_said(output, thought, text):
    assert split_thought(output) == Said(thought, text)


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<tool_call>", "a", " b", "<", "</", "th", "{}"]), max_size=12
)


REACT_PIECES = st.lists(
    st.sampled_from(["Thought: ", "Action:", "Final Answer:", "\n", " a", "Thou", "Fin", "<think>"]), max_size=8
)


@given(st.tuples(PIECES, st.just("")) | st.tuples(REACT_PIECES, st.just("Final Answer:")), st.integers(1, 7))
def test_streaming_sorts_like_reading_at_once_whatever_the_pieces(given_text, size):
    pieces, open_answer = given_text
    text = "".join(pieces)
    whole, cut = (Reader("Action:" if open_answer else "<tool_call>", False, open_answer) for _ in range(2))
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


def test_a_thought_inside_a_thought_does_not_end_it():
    reader = Reader("<tool_call>")
    assert reader.feed("<think>a<think>b</think>secret") == [("thought", "a"), ("thought", "b"), ("answer", "secret")]
    assert reader.feed("</think>answer") == [("retracted", ""), ("answer", "answer")]  # only now it is known
    assert reader.feed("</think>.") == [("answer", ".")]


def react(*pieces):
    """(part, text) of pieces written in ReAct's lines, neighbours of one part joined."""
    reader = Reader("Action:", False, "Final Answer:")
    found = [one for piece in pieces for one in reader.feed(piece)] + reader.finish()
    joined = []
    for part, text in found:
        if joined and joined[-1][0] == part:
            joined[-1] = (part, joined[-1][1] + text)
        else:
            joined.append((part, text))
    return joined


def test_words_without_a_label_are_an_answer_until_one_comes():
    assert react("Rain ", "in Oslo.") == [("answer", "Rain in Oslo.")]
    assert react("Th", "ought: I know.\nFinal", " Answer: Rain.") == [
        ("thought", "Thought: I know.\n"),
        ("answer", " Rain."),
    ]
    assert react("I know.\nFinal Answer: Rain.") == [("answer", "I know.\n"), ("retracted", ""), ("answer", " Rain.")]
    assert react("I look.\nAct", "ion: f") == [("answer", "I look.\n"), ("call", "Action: f")]
    assert react("<think>hm</think>\nFinal Answer: Rain.")[0] == ("thought", "<think>hm</think>\n")
    assert react("Thou") == [("answer", "Thou")]


def test_an_action_in_the_middle_of_a_line_is_no_call():
    text = "My favourite is Action: it is fun."
    assert react(f"Thought: hm\nFinal Answer: {text}\nAction: go") == [
        ("thought", "Thought: hm\n"), ("answer", f" {text}\nAction: go"),
    ]  # fmt: skip
    assert react(text[:20], text[20:]) == [("answer", text)]


def test_a_thought_that_both_the_prompt_and_the_server_have_opened():
    reader = Reader("<tool_call>", thinking=True)
    assert reader.feed("\n<think>hm</think>yes") == [("thought", "\n"), ("thought", "hm"), ("answer", "yes")]


def test_a_thought_that_the_prompt_has_opened():
    reader = Reader("<tool_call>", thinking=True)
    assert reader.feed("hm <tool_call>x</think>yes") == [("thought", "hm <tool_call>x"), ("answer", "yes")]
