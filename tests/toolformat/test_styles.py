"""Calls in the styles of chat templates and of ReAct, and what a structural tag is made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toolformat_templates import LLAMA, MISTRAL, NO_TOOLS, PYTHONIC, QWEN

from agentlab.toolformat import (
    REACT,
    TAGS,
    CallStyle,
    parse_calls,
    parse_thought,
    render_call,
    structure,
    style_of_template,
    system_prompt,
)

STYLES = {
    "tags": TAGS,
    "qwen": CallStyle("<tool_call>\n", "\n</tool_call>"),
    "llama": CallStyle("", "", "parameters"),
    "mistral": CallStyle("[TOOL_CALLS] [", "]", ignored_keys=("id",)),
    "react": REACT,
}
NAMES = st.text("abc_.-日", min_size=1, max_size=6)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=6)
    | st.sampled_from(['"', "</tool_call>", "[TOOL_CALLS]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def style_of(template):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template

    def render(messages, tools):
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)

    return style_of_template(render)


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (QWEN, STYLES["qwen"]),
        (LLAMA, STYLES["llama"]),
        (MISTRAL, STYLES["mistral"]),
        (PYTHONIC, None),
        (NO_TOOLS, None),
        ("{{ raise_exception('no') }}", None),
    ],
    ids=["qwen", "llama", "mistral", "pythonic", "no tools", "raises"],
)
def test_how_a_template_writes_calls(template, style):
    assert style_of(template) == style


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@given(
    name=NAMES,
    arguments=st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
    before=st.sampled_from(["", "So:\n"]),
)
def test_what_is_rendered_is_parsed_back_in_every_style(style, name, arguments, before):
    (call,) = parse_calls(before + render_call(name, arguments, style), style)
    assert (call.name, call.arguments, call.malformed) == (name, arguments, None)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@given(
    st.lists(
        st.sampled_from(["[TOOL_CALLS]", "<tool_call>", "Action: f\n", "Action Input: ", '{"name": "f"', "}", "["])
        | st.text(max_size=4)
    )
)
def test_parsing_never_raises_in_any_style(style, pieces):
    for call in parse_calls("".join(pieces), style):
        assert call.malformed or (call.name and isinstance(call.arguments, dict))


def test_mistrals_list_holds_several_calls_and_forgets_their_ids():
    text = '[TOOL_CALLS] [{"name": "a", "arguments": {}, "id": "x"}, {"name": "b", "arguments": {"n": 1}}]'
    assert [(call.name, call.arguments) for call in parse_calls(text, STYLES["mistral"])] == [
        ("a", {}),
        ("b", {"n": 1}),
    ]


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("llama", '{"name": "f", "parameters": {"a": 1}'),
        ("llama", '{"name": "f", "parameters": 1}'),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}'),
        ("mistral", '[TOOL_CALLS] {"name": "f", "arguments": {}}'),
        ("react", "Action: f\nI wait."),
        ("react", "Action: f\nAction Input: [1]"),
        ("react", "Action: f\nAction Input: {1}"),
    ],
)
def test_attempts_are_visible_in_every_style(style, text):
    (call,) = parse_calls(text, STYLES[style])
    assert call.malformed


def test_react_has_a_thought_before_its_action():
    text = render_call("f", {"a": 1}, REACT, thought="I need\nit.")
    assert text == 'Thought: I need it.\nAction: f\nAction Input: {"a": 1}'
    assert parse_thought(text) == "I need it."
    assert parse_thought("Just an answer.") == "Just an answer."
    with pytest.raises(ValueError, match="one line"):
        render_call("f\ng", {}, REACT)


def test_the_system_prompt_shows_the_style():
    assert "Action Input: {...}" in system_prompt([{"name": "now"}], REACT)
    assert '{"name": ..., "parameters": {...}}' in system_prompt([{"name": "now"}], STYLES["llama"])


def test_a_structure_has_one_tag_per_tool_with_its_name_at_the_beginning():
    body = structure([{"name": "a.b"}, {"name": 'c"'}], TAGS, "required")["format"]
    assert [tag["begin"] for tag in body["elements"]] == [
        '<tool_call>{"name": "a.b", "arguments": ',
        '<tool_call>{"name": "c\\"", "arguments": ',
    ]
    assert structure([], TAGS, "none")["format"]["excludes"] == ["<tool_call>", "</tool_call>"]
    with pytest.raises(ValueError, match="without tools"):
        structure([], TAGS, "required")
