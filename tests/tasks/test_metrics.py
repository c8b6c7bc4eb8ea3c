"""Every metric against one contract, and each one's own rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlab.errors import SuiteError
from agentlab.tasks import load, score_split
from agentlab.tasks.checkers import json_values, last_number

from .helpers import small_splits, write_folder

TOOL = {
    "name": "send",
    "description": "Send",
    "parameters": {
        "type": "object",
        "properties": {
            "to": {"type": "string"},
            "times": {"type": "integer"},
            "amount": {"type": "number"},
            "urgent": {"type": "boolean"},
            "cc": {"type": "array", "items": {"type": "string"}},
            "options": {"type": "object"},
        },
        "required": ["to"],
    },
}
FUNCTION = """
def overlap(answer, text, item):
    if text == "raise":
        raise RuntimeError("broken")
    if text == "nan":
        return float("nan")
    if text == "two":
        return 2
    words = set(answer.split())
    return len(words & set(text.split())) / len(words)
"""
CALL = {"name": "send", "arguments": {"to": "Ann", "times": 2}}
SUITES = {
    "exact": ({}, "New York"),
    "number": ({}, 42),
    "label": ({"labels": ["card", "credit card", "cash_out", "スポーツ", "音楽"]}, "credit card"),
    "json": ({}, {"a": [1, {"b": None}], "c": True}),
    "tool_call": ({"tools": [TOOL]}, CALL),
    "tool_call none": ({"tools": [TOOL]}, None),
    "words:overlap": ({}, "alpha beta"),
}
WRONG = ["", " ", "\n", "no idea", "{", "[]", "-", "card cash_out", "<tool_call>"]


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    result = {}
    for number, (key, (extra, answer)) in enumerate(SUITES.items()):
        place = folder / str(number)
        write_folder(place, {"name": "s", "metric": key.split()[0], **extra}, small_splits(lambda n, a=answer: a))
        (place / "words.py").write_text(FUNCTION)
        result[key] = load(str(place), folder)
    return result


@pytest.mark.parametrize("key", SUITES)
class TestContract:
    """What evolution relies on, whatever the metric."""

    def test_the_training_target_is_right(self, suites, key):
        suite = suites[key]
        for item in suite.split("train"):
            assert suite.check(item, suite.target(item)) == 1.0
            assert suite.check(item, f"  {suite.target(item)}\n") == 1.0

    def test_nothing_is_never_right(self, suites, key):
        item = suites[key].split("train")[0]
        assert [suites[key].check(item, text) for text in ("", " ", "\n\t")] == [0.0, 0.0, 0.0]

    def test_something_else_is_wrong(self, suites, key):
        item = suites[key].split("train")[0]
        wrong = "<tool_call>{}</tool_call>" if key.endswith("none") else "Something else entirely."
        assert suites[key].check(item, wrong) == 0.0

    def test_any_text_gets_a_score_that_does_not_change(self, suites, key):
        suite = suites[key]
        item = suite.split("train")[0]
        pieces = st.sampled_from([*WRONG, suite.target(item), "<tool_call>", "9" * 5000, "1e999", "[" * 2000, "\ud800"])

        @given(st.text() | st.lists(pieces | st.text(max_size=5), max_size=5).map("".join))
        def check(text):
            score = suite.check(item, text)
            assert isinstance(score, float)
            assert 0.0 <= score <= 1.0
            assert suite.check(item, text) == score

        check()

    def test_the_evaluate_library_gives_the_same_scores(self, suites, key, monkeypatch):
        monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a metric went to the network"))
        suite = suites[key]
        items = [suite.split("train")[0], *suite.split("gate"), suite.split("train")[1]]
        texts = [suite.target(items[0]), "no idea", "", "alpha \ud800", suite.target(items[4])]
        assert score_split(suite, items, texts) == [
            suite.check(item, text) for item, text in zip(items, texts, strict=True)
        ]
        assert score_split(suite, [], []) == []
        with pytest.raises(ValueError, match="4 texts for 5 items"):
            score_split(suite, items, texts[:4])


def check(suites, key, answer, text, **config):
    """The score of `text` for another answer than the suite's own."""
    item = suites[key].split("train")[0]
    return suites[key]._checker(answer, text, item)


@pytest.mark.parametrize("text", ["new york", "NEW  YORK.", '"New York"', "`New York`", "“New York.”", "Ｎew York"])
def test_exact_overlooks_case_space_quotes_and_a_closing_dot(suites, text):
    assert check(suites, "exact", "New York", text) == 1.0


@pytest.mark.parametrize("text", ["New York City", "NewYork", "in New York", "New, York"])
def test_exact_overlooks_nothing_else(suites, text):
    assert check(suites, "exact", "New York", text) == 0.0
    assert check(suites, "exact", ["Rome", text], text) == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", 1234),
        ("-3", -3),
        ("the answer is −3.5.", -3.5),
        ("$5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("50%", 50),
        ("1.5e3", 1500),
        (".5", 0.5),
        ("x = -.5", -0.5),
        ("5.", 5),
        ("12 of 1,234,567.89 apples", 1234567.89),
        ("between 3-4", 4),
        ("10 - 3 = 7", 7),
        ("(-7)", -7),
        ("１２", 12),
        ("#### 18", 18),
        ("1,23", 23),
        ("007", 7),
        ("**42**", 42),
        ("none", None),
        ("", None),
        ("9" * 400, None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else pytest.approx(number))


def test_number_tolerance_and_text_answers(tmp_path):
    splits = small_splits(lambda n: 10)
    loose = load(
        str(write_folder(tmp_path / "a", {"name": "a", "metric": "number", "tolerance": 0.5}, splits)), tmp_path
    )
    item = loose.split("train")[0]
    assert [loose.check(item, text) for text in ("10.5", "9.5", "10.51")] == [1.0, 1.0, 0.0]
    splits = small_splits(lambda n: f"{n} + 1 = {n + 1}\n#### 1,00{n}")
    strict = load(str(write_folder(tmp_path / "b", {"name": "b", "metric": "number"}, splits)), tmp_path)
    item = strict.split("train")[2]
    assert strict.target(item) == "2 + 1 = 3\n#### 1,002"
    assert [strict.check(item, text) for text in ("1002", "It is 1,002.0", "1002.1", "1002 or 3")] == [
        1.0,
        1.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("credit card", "The label is: Credit Card.", 1),
        ("credit card", "credit_card", 1),
        ("credit card", "credit-card", 1),
        ("card", "credit card", 0),
        ("card", "card", 1),
        ("card", "cards", 0),
        ("card", "card, card!", 1),
        ("card", "card or cash_out", 0),
        ("cash_out", "Cash out", 1),
        ("スポーツ", "これはスポーツです。", 1),
        ("スポーツ", "スポーツと音楽", 0),
    ],
)
def test_label_is_the_one_that_the_text_states(suites, answer, text, score):
    assert check(suites, "label", answer, text) == score


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ({"a": 5}, '{"a": 5.0}', 1),
        ({"a": 5}, 'Here: ```json\n{"a": 5}\n``` done {', 1),
        ({"a": 5}, '{"a": 5} {"a": 5}', 1),
        ({"a": 5}, '{"a": 5} {"a": 6}', 0),
        ({"a": 5}, '{"b": {"a": 5}}', 0),
        ({"a": 5}, '{"a": "5"}', 0),
        ({"a": 1}, '{"a": true}', 0),
        ({"a": True}, '{"a": 1}', 0),
        ({"a": None}, "{}", 0),
        ({"a": 1}, '{"a": 2, "a": 1}', 0),
        ({"a": 1, "b": 2}, '{"b": 2, "a": 1}', 1),
        ([1, 2], "The list is [1, 2].", 1),
        ([1, 2], "[2, 1]", 0),
        ("x", '"x"', 1),
        ("x", "x", 0),
        (3, "3.0", 1),
        (None, "null", 1),
    ],
)
def test_json_is_equal_after_parsing(suites, answer, text, score):
    assert check(suites, "json", answer, text) == score


def test_only_outermost_json_values_count():
    assert json_values('a {"x": {"y": 1}} b {broken {"z": 2}', "{") == [{"x": {"y": 1}}, {"z": 2}]


def call(arguments, name="send"):
    return f"<tool_call>{__import__('json').dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize(
    ("expected", "given", "score"),
    [
        ({"to": "Ann"}, {"to": " ann "}, 1),
        ({"to": "Ann"}, {"to": "Anna"}, 0),
        ({"to": "Ann"}, {"to": "Ann", "times": 1}, 0),
        ({"to": "Ann", "times": 2}, {"to": "Ann"}, 0),
        ({"times": 2}, {"times": 2.0}, 1),
        ({"times": 2}, {"times": "2"}, 0),
        ({"amount": 2.5}, {"amount": 2.5}, 1),
        ({"urgent": True}, {"urgent": True}, 1),
        ({"urgent": True}, {"urgent": 1}, 0),
        ({"times": 1}, {"times": True}, 0),
        ({"to": {"any": ["Ann", "Bob"]}}, {"to": "bob"}, 1),
        ({"to": {"any": ["Ann", "Bob"]}}, {"to": "Cy"}, 0),
        ({"to": {"any": ["Ann", ""]}}, {}, 1),
        ({"to": {"any": [None, "Ann"]}}, {}, 1),
        ({"to": {"any": ["Ann"]}}, {}, 0),
        ({"cc": ["A", {"any": ["B", "C"]}]}, {"cc": ["a", "c"]}, 1),
        ({"cc": ["A", "B"]}, {"cc": ["B", "A"]}, 0),
        ({"cc": ["A", "B"]}, {"cc": ["A"]}, 0),
        ({"cc": {"any": [["A", "B"], ["B", "A"]]}}, {"cc": ["B", "A"]}, 1),
        ({"options": {"x": 1, "y": {"any": [2, ""]}}}, {"options": {"x": 1}}, 1),
        ({"options": {"x": 1}}, {"options": {"x": 1, "z": 1}}, 0),
        ({"options": {"x": 1}}, {"options": [1]}, 0),
        ({"any": [1, 2]}, {"any": [1, 2]}, 1),  # an argument that is called "any"
        ({"any": [1, 2]}, {"any": 1}, 0),
    ],
)
def test_tool_arguments(suites, expected, given, score):
    assert check(suites, "tool_call", {"name": "send", "arguments": expected}, call(given)) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (call(CALL["arguments"]), 1),
        ("Let me see. " + call(CALL["arguments"]), 1),
        (call(CALL["arguments"]).removesuffix("</tool_call>"), 1),
        (call(CALL["arguments"], "sent"), 0),
        (call(CALL["arguments"]) * 2, 0),
        (call(CALL["arguments"]) + "<tool_call>{", 0),
        (call(CALL["arguments"]).replace("tool_call>", "tool>"), 0),
    ],
)
def test_exactly_one_well_formed_call(suites, text, score):
    assert check(suites, "tool_call", CALL, text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("No tool applies.", 1),
        ("I cannot send anything, sorry.", 1),
        (call({"to": "x"}), 0),
        ("<tool_call>", 0),
        ("<tool_call", 0),
        ('{"name": "send", "arguments": {}}', 0),
        ('send(to="Ann")', 0),
        ("", 0),
    ],
)
def test_where_no_tool_applies_every_attempt_is_wrong(suites, text, score):
    assert check(suites, "tool_call", None, text) == score


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("raise", "failed on item train-0: RuntimeError: broken"),
        ("nan", "gave nan"),
        ("two", "gave 2.0 on item train-0"),
    ],
)
def test_a_function_that_misbehaves_is_named(suites, text, sentence):
    with pytest.raises(SuiteError, match=sentence):
        suites["words:overlap"].check(suites["words:overlap"].split("train")[0], text)


def test_a_function_gives_partial_credit_and_its_code_is_in_the_digest(suites, tmp_path):
    suite = suites["words:overlap"]
    assert suite.check(suite.split("train")[0], "beta gamma") == 0.5
    digests = []
    for number, code in enumerate([FUNCTION, FUNCTION + "\n# changed"]):
        place = tmp_path / str(number)
        write_folder(place, {"name": "s", "metric": "words.overlap"}, small_splits(lambda n: "alpha"))
        (place / "words.py").write_text(code)
        digests.append(load(str(place), tmp_path).digest)
    assert len(set(digests)) == 2


def test_an_installed_function_works_as_metric(tmp_path):
    write_folder(tmp_path / "s", {"name": "s", "metric": "operator:eq"}, small_splits(lambda n: "yes"))
    suite = load("s", tmp_path)
    with pytest.raises(SuiteError, match="failed on item train-0: TypeError"):
        suite.check(suite.split("train")[0], "yes")
