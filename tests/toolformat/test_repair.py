"""Repair is pure: it never raises, never changes a valid call, and what it returns is valid."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlab.toolformat import REACT, TAGS, CallStyle, parse_calls, render_call, repair, validate

LLAMA = CallStyle("", "", "parameters")
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "lat": {"type": "number"},
            "detailed": {"type": "boolean"},
            "unit": {"enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "until": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "place": {
                "type": "object",
                "properties": {"zip_code": {"type": "integer"}},
                "additionalProperties": False,
            },
        },
        "required": ["city"],
    },
}
TOOLS = [WEATHER, {"name": "now"}]
ROME = {"city": "Rome"}


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<tool_call>{'name': 'get_weather', 'arguments': {'city': 'Rome'}}</tool_call>", ROME),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Rome",},}</tool_call>', ROME),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}', ROME),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": 3</tool_call>', ROME | {"days": 3}),
        ('{"name": "get_weather", "arguments": {"city": "Rome"}}', ROME),
        ('```json\n{"name": "get_weather", "parameters": {"city": "Rome"}}\n```', ROME),
        ('<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>', ROME),
        ('<tool_call>{"name": "GetWeather", "arguments": {"city": "Rome"}}</tool_call>', ROME),
        ('<tool_call>{"name": "get-weather", "arguments": {"City": "Rome"}}</tool_call>', ROME),
        ('<tool_call>[{"name": "get_weather", "arguments": {"city": "Rome"}}]</tool_call>', ROME),
        ('<tool_call>{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}', ROME),
        ('<tool_call>{name: "get_weather", arguments: {city: "Rome"}}</tool_call>', ROME),
        ('Action: get_weather\nAction Input: {"city": "Rome"}', ROME),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "a\nb"}}</tool_call>', {"city": "a\nb"}),
        ("<tool_call>{'name': 'get_weather', 'arguments': {'city': 'L\\'Aquila'}}</tool_call>", {"city": "L'Aquila"}),
    ],
)
def test_forms_that_are_repaired(text, arguments):
    call = repair(text, TOOLS)
    assert call is not None
    assert (call.name, call.arguments, call.malformed) == ("get_weather", arguments, None)


@pytest.mark.parametrize(
    ("given", "repaired"),
    [
        ({"days": "5"}, {"days": 5}),
        ({"lat": "-2.5e1"}, {"lat": -25.0}),
        ({"detailed": "True"}, {"detailed": True}),
        ({"city": 5}, {"city": "5"}),
        ({"unit": "c"}, {"unit": "C"}),
        ({"tags": '["a", "b"]'}, {"tags": ["a", "b"]}),
        ({"tags": [1]}, {"tags": ["1"]}),
        ({"until": "null"}, {"until": None}),
        ({"until": "7"}, {"until": 7}),
        ({"place": {"zipCode": "123"}}, {"place": {"zip_code": 123}}),
        ({"place": "{'zip_code': 123}"}, {"place": {"zip_code": 123}}),
    ],
)
def test_values_that_hold_the_same_in_another_type(given, repaired):
    call = repair(render_call("get_weather", ROME | given), TOOLS)
    assert call is not None
    assert call.arguments == ROME | repaired
    assert all(type(call.arguments[key]) is type(value) for key, value in repaired.items())


@pytest.mark.parametrize(
    "text",
    [
        "No tool applies.",
        "",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Ro',  # the rest of the string is unknown
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": 1',  # perhaps 12
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "town": "x"}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "city": "Oslo"}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": "5.5"}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": "about 5"}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": "05"}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}, "parameters": {}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}, "note": 1}</tool_call>',
        '<tool_call>{"name": "get_weather"}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": NaN}}</tool_call>',
        "{" * 100_000,
        "<tool_call>" + '{"name": "get_weather", "arguments": ' + "[" * 100_000,
    ],
)
def test_what_would_need_a_guess_is_left(text):
    assert repair(text, TOOLS) is None


PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "Action: ", "Action Input: ", "\n", '"name"', "get_weather", '"arguments"'),
        *("{", "}", "[", "]", '"', "'", ",", ":", "\\", "\\u", "\\ud800"),
        *("city", "Rome", "None", "True", "1", "1e999", "日"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted(WEATHER["parameters"]["properties"]))


@given(st.lists(PIECES | st.text(max_size=3), max_size=25).map("".join), st.sampled_from([TAGS, REACT, LLAMA]))
def test_it_never_raises_and_what_it_returns_is_valid(text, style):
    call = repair(text, TOOLS, style)
    assert call is None or any(not validate(call, tool) for tool in TOOLS)


@given(st.dictionaries(NAMES, VALUES, max_size=4), st.text(max_size=5), st.sampled_from([TAGS, REACT, LLAMA]))
def test_a_valid_call_comes_back_as_it_is_and_others_are_valid_or_nothing(arguments, city, style):
    arguments = {**arguments, "city": arguments.get("city", city)}
    text = render_call("get_weather", arguments, style)
    (before,) = parse_calls(text, style)
    call = repair(text, TOOLS, style)
    if validate(before, WEATHER) == []:
        assert call == before
    elif call is not None:
        assert validate(call, WEATHER) == []
        assert len(call.arguments) == len(arguments)


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_python_literals_are_read_as_the_json_they_stand_for(arguments):
    arguments = json.loads(json.dumps(arguments))
    text = f"<tool_call>{{'name': 'get_weather', 'arguments': {arguments!r}}}</tool_call>"
    call, same = repair(text, TOOLS), repair(render_call("get_weather", arguments), TOOLS)
    if call is not None:
        assert same is not None
        assert call.arguments == same.arguments
