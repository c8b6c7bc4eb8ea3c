"""The one rendering and parsing of tool calls."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlab.toolformat import CLOSE, NO_TOOL, OPEN, Call, check_tool, parse_calls, render_call, signature, validate
from agentlab.toolformat import system_prompt as prompt_for

WEATHER = {
    "name": "get_weather",
    "description": "Weather\n  forecast",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "default": 1},
            "unit": {"enum": ["C", "F"]},
            "hours": {"type": "array", "items": {"type": "number"}},
            "place": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
            "detailed": {"type": "boolean"},
        },
        "required": ["city", "detailed"],
    },
}
TRICKY = st.sampled_from(
    [CLOSE, OPEN, '"', '\\"', "\\", "{}", "</tool_call", "\u2028", "日本", '{"name": "x"}', "\x00"]
)
TEXTS = st.lists(st.one_of(TRICKY, st.text(max_size=8)), max_size=4).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(TEXTS, VALUES, max_size=4)


@given(TEXTS.filter(bool), ARGUMENTS)
def test_what_is_rendered_is_parsed_back(name, arguments):
    (call,) = parse_calls(render_call(name, arguments))
    assert (call.name, call.arguments, call.malformed) == (name, arguments, None)


@given(TEXTS.filter(bool), ARGUMENTS)
def test_a_rendered_call_holds_each_tag_once_so_that_stop_strings_work(name, arguments):
    text = render_call(name, arguments)
    assert text.count(OPEN) == text.count(CLOSE) == 1
    assert text.endswith(CLOSE)


@given(st.lists(st.tuples(st.sampled_from(["a", "b.c"]), ARGUMENTS), max_size=3), st.sampled_from(["", "\n", " and "]))
def test_several_calls_are_parsed_in_order(calls, between):
    text = between.join(render_call(name, arguments) for name, arguments in calls)
    assert [(call.name, call.arguments) for call in parse_calls(text)] == calls


@given(
    st.text() | st.lists(TRICKY | st.sampled_from(["[", "{", '"name":', '"arguments"', ":", ",", "1e999"])).map("".join)
)
def test_parsing_never_raises_and_every_opening_tag_is_visible(text):
    calls = parse_calls(text)
    assert all(call.malformed or (call.name and isinstance(call.arguments, dict)) for call in calls)
    if OPEN in text:
        assert calls


@given(TEXTS.filter(bool), ARGUMENTS, st.data())
def test_a_call_cut_short_is_never_a_different_call(name, arguments, data):
    text = render_call(name, arguments)
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    good = [call for call in parse_calls(cut) if not call.malformed]
    assert all((call.name, call.arguments) == (name, arguments) for call in good)


@pytest.mark.parametrize(
    "text",
    [
        ' Sure. <tool_call> {"name": "f", "arguments": {"a": 1}} </tool_call> Done.',
        '<tool_call>{"name": "f", "arguments": {"a": 1}}',
        '<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>\n',
    ],
)
def test_documented_tolerance(text):
    (call,) = parse_calls(text)
    assert (call.name, call.arguments, call.malformed) == ("f", {"a": 1}, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>", "not JSON"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "not JSON"),
        ("<tool_call>{'name': 'f', 'arguments': {}}</tool_call>", "not JSON"),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', "too large"),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', "surrogate"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>', "twice"),
        ('<tool_call>{"name": "f"}</tool_call>', "arguments must be"),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "arguments must be"),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', "name must be"),
        ('<tool_call>{"name": "f", "arguments": {}, "id": 1}</tool_call>', "unknown key id"),
        ('<tool_call>["f", {}]</tool_call>', "JSON object"),
        ('<tool_call>{"name": "f", "arguments": {}} {}</tool_call>', "follows"),
        ("<tool_call>" + "[" * 100_000, "deeply"),
        ('{"name": "f", "arguments": {"a": 1}}', "without <tool_call>"),
        ("f</tool_call>", "without <tool_call>"),
        ("I call <tool_cal", "cut short"),
    ],
)
def test_attempts_are_visible_as_malformed(text, reason):
    (call,) = parse_calls(text)
    assert reason in (call.malformed or "")


def test_a_broken_attempt_does_not_hide_the_call_after_it():
    first, second = parse_calls("<tool_call>{broken</tool_call>" + render_call("f", {}))
    assert first.malformed
    assert (second.name, second.malformed) == ("f", None)


@pytest.mark.parametrize("text", ["", "No tool applies.", 'A JSON object: {"a": 1}', "5 < 6", "the arguments of name"])
def test_plain_text_holds_no_call(text):
    assert parse_calls(text) == []


def test_nan_is_refused_when_rendering():
    with pytest.raises(ValueError, match="JSON"):
        render_call("f", {"a": float("nan")})


def test_signature_is_one_compact_line():
    assert signature(WEATHER) == (
        'get_weather(city: str, days: int = 1, unit?: "C"|"F", hours?: list[float], place?: {lat: float}, '
        "detailed: bool) - Weather forecast"
    )
    assert signature({"name": "now"}) == "now()"
    assert signature({"name": "f", "parameters": {"properties": {"x": {"type": ["string", "null"]}, "y": {}}}}) == (
        "f(x?: str|null, y?: any)"
    )


def test_system_prompt_shows_the_format_the_way_out_and_every_tool():
    prompt = prompt_for([WEATHER, {"name": "now"}])
    assert OPEN in prompt
    assert NO_TOOL in prompt
    assert prompt.splitlines()[1:] == [signature(WEATHER), "now()"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"city": "Rome", "detailed": True}, None),
        ({"city": "Rome", "detailed": False, "days": 3, "unit": "C", "hours": [1, 2.5], "place": {"lat": 1}}, None),
        ({"city": "Rome", "detailed": True, "days": 3.0}, None),
        ({"city": "Rome"}, "'detailed' is a required property"),
        ({"city": 5, "detailed": True}, "argument city: 5 is not of type 'string'"),
        ({"city": "Rome", "detailed": 1}, "argument detailed: 1 is not of type 'boolean'"),
        ({"city": "Rome", "detailed": True, "days": True}, "argument days: True is not of type 'integer'"),
        ({"city": "Rome", "detailed": True, "days": 2.5}, "argument days: 2.5 is not of type 'integer'"),
        ({"city": "Rome", "detailed": True, "unit": "K"}, "argument unit: 'K' is not one of"),
        ({"city": "Rome", "detailed": True, "hours": ["x"]}, "argument hours.0: 'x' is not of type 'number'"),
        ({"city": "Rome", "detailed": True, "place": {}}, "argument place: 'lat' is a required property"),
        ({"city": "Rome", "detailed": True, "town": "x"}, "'town' was unexpected"),
    ],
)
def test_validation_against_the_schema(arguments, problem):
    problems = validate(Call("get_weather", arguments), WEATHER)
    assert problems == [] if problem is None else any(problem in text for text in problems)


def test_validation_refuses_malformed_calls_and_other_names():
    assert validate(Call("", {}, "not JSON"), WEATHER) == ["not JSON"]
    assert validate(Call("other", {}), WEATHER) == ["unknown tool other; allowed: get_weather"]
    assert validate(Call("now", {"x": 1}), {"name": "now"}) != []


@pytest.mark.parametrize(
    ("tool", "problem"),
    [
        (WEATHER, None),
        ("weather", "needs a name"),
        ({"name": "f", "args": {}}, "unknown key args"),
        ({"name": "f", "parameters": {"type": "array"}}, "type object"),
        ({"name": "f", "parameters": {"properties": {"a": {"type": "float"}}}}, "not a JSON schema"),
        ({"name": "f", "parameters": {"required": ["a"]}}, "required argument a"),
    ],
)
def test_tool_definitions_are_checked(tool, problem):
    found = check_tool(tool)
    assert found is None if problem is None else problem in (found or "")


def test_importing_suites_and_tool_format_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'datasets', 'evaluate', 'jsonschema', 'mlflow'}"
    code = f"import sys, agentlab.tasks, agentlab.toolformat; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
