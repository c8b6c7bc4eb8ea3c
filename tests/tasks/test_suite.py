"""The folder format: what loads, what is refused, and with which sentence."""

import datetime
import json
import re

import pytest
import yaml

from agentlab.errors import SuiteError
from agentlab.tasks import BUILT_IN, load

from .helpers import SPLITS, small_splits, write_folder

LABELS = {"name": "mood", "metric": "label", "labels": ["happy", "sad"]}
TOOL = {
    "name": "add",
    "description": "Add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a"],
    },
}
CALLS = {"name": "calls", "metric": "tool_call", "tools": [TOOL]}


def label_splits():
    return small_splits(lambda n: ["happy", "sad"][n % 2])


def call_splits():
    return small_splits(lambda n: {"name": "add", "arguments": {"a": n}})


def test_a_folder_loads_by_every_way_of_naming_it(tmp_path):
    write_folder(tmp_path / "experiments" / "mood", LABELS, label_splits())
    suites = [load(name, tmp_path) for name in ("mood", "experiments/mood", str(tmp_path / "experiments" / "mood"))]
    assert len({suite.digest for suite in suites}) == 1
    suite = suites[0]
    assert [item.id for item in suite.split("gate")] == ["gate-0", "gate-1", "gate-2"]
    assert suite.groups() == ["happy", "sad"]
    assert suite.summary()["splits"] == dict.fromkeys(SPLITS, 3)
    assert len(suite.warnings) == 1
    assert "gate has 3 items" in suite.warnings[0]


def test_test_is_sealed_but_counted(tmp_path):
    suite = load(str(write_folder(tmp_path / "mood", LABELS, label_splits())), tmp_path)
    with pytest.raises(SuiteError, match="sealed"):
        suite.split("test")
    with pytest.raises(SuiteError, match="unknown split"):
        suite.split("dev")
    assert suite.test_items == 3
    assert [item.id for item in suite.open_test()] == ["test-0", "test-1", "test-2"]
    assert "test question" not in repr(suite) + json.dumps(suite.summary())


def test_an_unknown_suite_lists_the_built_in_ones(tmp_path):
    with pytest.raises(SuiteError) as caught:
        load("toolcals", tmp_path)
    assert all(name in str(caught.value) for name in BUILT_IN)


def test_chat_shows_labels_tools_and_both_system_prompts(tmp_path):
    suite = load(str(write_folder(tmp_path / "mood", {**LABELS, "system": "Be brief."}, label_splits())), tmp_path)
    item = suite.split("train")[0]
    assert suite.chat(item) == [
        {"role": "system", "content": "Be brief.\nAnswer with one label: happy, sad"},
        {"role": "user", "content": "train question 0"},
    ]
    splits = call_splits()
    first = splits["train"][0]
    del first["prompt"]
    first["messages"] = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hello"}]
    suite = load(str(write_folder(tmp_path / "calls", CALLS, splits)), tmp_path)
    own, plain = (suite.chat(item) for item in suite.split("train")[:2])
    assert own[0]["content"].startswith("Own.\n")
    assert "add(a: int, b?: int) - Add" in own[0]["content"]
    assert [message["role"] for message in plain] == ["system", "user"]
    assert suite.split("train")[0].messages[0]["content"] == "Own."


def test_own_tools_come_before_the_suites(tmp_path):
    splits = call_splits()
    other = {"name": "other", "parameters": {"type": "object", "properties": {}}}
    splits["train"][0] |= {"tools": [other, "add"]}
    splits["train"][1] |= {"tools": [other], "answer": None}
    suite = load(str(write_folder(tmp_path / "calls", CALLS, splits)), tmp_path)
    assert [[tool["name"] for tool in item.tools] for item in suite.split("train")] == [
        ["other", "add"],
        ["other"],
        ["add"],
    ]
    assert suite.groups() == ["add", "none"]


def test_groups_are_given_or_derived_and_at_most_24(tmp_path):
    splits = label_splits()
    splits["train"][0]["group"] = "special"
    suite = load(str(write_folder(tmp_path / "a", LABELS, splits)), tmp_path)
    assert suite.groups() == ["happy", "sad", "special"]
    splits["train"] = [{"id": f"t{n}", "prompt": f"p{n}", "answer": "sad", "group": f"g{n}"} for n in range(25)]
    suite = load(str(write_folder(tmp_path / "b", LABELS, splits)), tmp_path)
    assert suite.groups() == ["all"]


@pytest.mark.parametrize("change", ["name", "system", "train", "test"])
def test_the_digest_changes_with_everything(tmp_path, change):
    before = load(str(write_folder(tmp_path / "a", LABELS, label_splits())), tmp_path).digest
    config, splits = dict(LABELS), label_splits()
    if change in SPLITS:
        splits[change][0]["answer"] = "sad"
    else:
        config[change] = "other"
    assert load(str(write_folder(tmp_path / "b", config, splits)), tmp_path).digest != before
    assert load(str(write_folder(tmp_path / "c", LABELS, label_splits())), tmp_path).digest == before


def refused(tmp_path, config, splits):
    write_folder(tmp_path / "bad", config, splits)
    with pytest.raises(SuiteError) as caught:
        load("bad", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metrics": "exact"}, r"unknown key metrics; did you mean metric\?"),
        ({"name": None}, "key name must be a text"),
        ({"metric": "bleu"}, "unknown metric bleu; allowed: exact, number, label, json, tool_call"),
        ({"metric": "no.such.module"}, "metric no.such.module cannot be imported"),
        ({"metric": "math:nothing"}, "has no function nothing"),
        ({"labels": ["happy"]}, "at least 2 labels"),
        ({"labels": ["happy", "sad", True]}, "quote it"),
        ({"labels": ["sad", "happy", "Happy"]}, "happy and Happy cannot be told apart"),
        ({"labels": ["happy", "sadly"]}, r"train.jsonl, line 2: answer 'sad' is not one of the 2 labels; did you mean"),
        ({"tolerance": 0.1}, "tolerance belongs to metric number"),
        ({"tools": [{"name": "f", "parameters": {"type": "array"}}]}, "tool f"),
        ({"tools": [TOOL, TOOL]}, "tool add is defined twice"),
        ({"system": ["a"]}, "key system must be a text"),
        ({"labels": ["happy", "sad", " "]}, "label ' '; allowed: a text that is not empty"),
        ({"system": "\ud800"}, "not valid Unicode"),
        ({"tools": [{**TOOL, "since": datetime.date(2020, 1, 1)}]}, "quote a date"),
    ],
)
def test_settings_are_refused_with_one_sentence(tmp_path, changes, sentence):
    config = {key: value for key, value in {**LABELS, **changes}.items() if value is not None}
    message = refused(tmp_path, config, label_splits())
    assert re.search(sentence, message), message
    assert "suite.yaml" in message or "train.jsonl" in message


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{broken", "gate.jsonl, line 2 is not JSON"),
        ("[1]", "gate.jsonl, line 2: an item is a JSON object"),
        ({"id": "x", "prompt": "p"}, "line 2: key answer is missing"),
        ({"id": "x", "prompt": "\ud800", "answer": "sad"}, "line 2: text that is not valid Unicode"),
        ({"id": "x", "prompt": "p", "answer": "sad", "\udfff": 1}, "line 2: text that is not valid Unicode"),
        ({"id": "x", "prompt": "p", "answer": float("nan")}, "line 2: NaN or an infinite number"),
        ({"prompt": "p", "answer": "sad"}, "line 2: key id must be a text"),
        ({"id": "", "prompt": "p", "answer": "sad"}, "line 2: key id must be a text"),
        ({"id": "x", "answer": "sad"}, "line 2: an item has either prompt or messages"),
        ({"id": "x", "prompt": "p", "messages": [], "answer": "sad"}, "either prompt or messages"),
        ({"id": "x", "prompt": " ", "answer": "sad"}, "key prompt must be a text"),
        ({"id": "x", "messages": [], "answer": "sad"}, "at least one message"),
        ({"id": "x", "messages": [{"role": "me", "content": ""}], "answer": "sad"}, "a message has role"),
        ({"id": "x", "messages": [{"role": "assistant", "content": "a"}], "answer": "sad"}, "last message"),
        ({"id": "x", "promt": "p", "answer": "sad"}, r"unknown key promt; did you mean prompt\?"),
        ({"id": "x", "prompt": "p", "answer": "sad", "group": 3}, "key group must be a text"),
        ({"id": "x", "prompt": "p", "answer": "sad", "tools": ["f"]}, "unknown tool f"),
        ({"id": "x", "prompt": "p", "answer": ["sad"]}, "is not one of the 2 labels"),
        ({"id": "train-1", "prompt": "p", "answer": "sad"}, r"id train-1 is already used in .*train.jsonl, line 2"),
        ({"id": "gate-0", "prompt": "p", "answer": "sad"}, r"id gate-0 is already used in .*gate.jsonl, line 1"),
        (
            {"id": "x", "prompt": "TRAIN  question, 1!", "answer": "sad"},
            r"gate.jsonl, line 2 repeats .*train.jsonl, line 2",
        ),
    ],
)
def test_items_are_refused_with_file_and_line(tmp_path, line, sentence):
    splits = label_splits()
    splits["gate"][1] = line
    message = refused(tmp_path, LABELS, splits)
    assert re.search(sentence, message), message
    assert "gate.jsonl, line 2" in message


def test_many_leaks_are_named_by_the_first_three(tmp_path):
    splits = label_splits()
    splits["test"] = [{"id": f"x{n}", "prompt": f"P{n}.", "answer": "sad"} for n in range(5)]
    splits["train"] = [{"id": f"y{n}", "prompt": f"p{n}", "answer": "sad"} for n in range(5)]
    message = refused(tmp_path, LABELS, splits)
    assert message.count("repeats") == 3
    assert "and 2 more" in message


def test_a_prompt_twice_in_one_split_is_warned_about(tmp_path):
    splits = label_splits()
    splits["train"] += [
        {"id": "a", "prompt": "Train question 0!", "answer": "happy"},
        {"id": "b", "prompt": "train question 1", "answer": "happy"},
    ]
    splits["test"].append({"id": "c", "prompt": "test question 0", "answer": "happy"})
    warnings = load(str(write_folder(tmp_path / "a", LABELS, splits)), tmp_path).warnings
    assert warnings[1:] == [
        "prompts that occur more than once in split train: 2, of these with contradictory answers: 1",
        "prompts that occur more than once in split test: 1, of these with contradictory answers: 0",
    ]


@pytest.mark.parametrize("prompts", [("What is 3 - 4?", "What is 3 + 4?"), ("Half of 1.5?", "Half of 15?"), ("!", "?")])
def test_prompts_that_only_look_alike_are_no_leak(tmp_path, prompts):
    splits = label_splits()
    splits["train"][0]["prompt"], splits["test"][0]["prompt"] = prompts
    load(str(write_folder(tmp_path / "a", LABELS, splits)), tmp_path)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"name": "sub", "arguments": {}}, "answer names unknown tool sub; allowed: add"),
        ({"name": "add", "arguments": {}}, "answer does not fit tool add: 'a' is a required property"),
        ({"name": "add", "arguments": {"a": "1"}}, "argument a: '1' is not of type 'integer'"),
        ({"name": "add", "arguments": {"a": 1, "c": 1}}, "'c' was unexpected"),
        ({"name": "add", "arguments": {"a": {"any": []}}}, "empty list of accepted values"),
        ({"name": "add"}, "allowed for metric tool_call"),
        ("add", "allowed for metric tool_call"),
    ],
)
def test_tool_answers_must_fit_their_tool(tmp_path, answer, sentence):
    splits = call_splits()
    splits["fitness"][2]["answer"] = answer
    message = refused(tmp_path, CALLS, splits)
    assert "fitness.jsonl, line 3" in message
    assert sentence in message


@pytest.mark.parametrize(
    ("metric", "answer"),
    [("number", "none"), ("number", True), ("number", None), ("exact", 5), ("exact", []), ("exact", " . ")],
)
def test_answers_must_suit_the_metric(tmp_path, metric, answer):
    message = refused(tmp_path, {"name": "x", "metric": metric}, small_splits(lambda n: answer))
    assert f"allowed for metric {metric}" in message


@pytest.mark.parametrize("tolerance", [-1, "big", True, float("nan"), float("inf")])
def test_impossible_tolerances_are_refused(tmp_path, tolerance):
    message = refused(tmp_path, {"name": "x", "metric": "number", "tolerance": tolerance}, small_splits(lambda n: n))
    assert "tolerance" in message


@pytest.mark.parametrize("split", SPLITS)
def test_missing_and_empty_splits_are_named(tmp_path, split):
    folder = write_folder(tmp_path / "bad", LABELS, label_splits())
    (folder / f"{split}.jsonl").write_text("\n\n")
    with pytest.raises(SuiteError, match=f"split {split} of .*bad has no items"):
        load("bad", tmp_path)
    (folder / f"{split}.jsonl").unlink()
    with pytest.raises(SuiteError, match=f"bad lacks {split}.jsonl"):
        load("bad", tmp_path)


@pytest.mark.parametrize(
    "content", [b"- a\n", b"name: [", b"name: 2020-13-45", b"[1]: 2", b"name: !!bool x", b"\xff\xfe\x00", b""]
)
def test_an_unreadable_suite_yaml_is_named(tmp_path, content):
    folder = write_folder(tmp_path / "bad", LABELS, label_splits())
    (folder / "suite.yaml").write_bytes(content)
    with pytest.raises(SuiteError, match=r"suite\.yaml"):
        load("bad", tmp_path)
    (folder / "suite.yaml").unlink()
    with pytest.raises(SuiteError, match=r"lacks suite\.yaml"):
        load("bad", tmp_path)


def test_line_separators_inside_json_do_not_split_a_line(tmp_path):
    splits = label_splits()
    line = '{"id": "odd", "prompt": "a\u2028b\u0085c", "answer": "sad"}'
    splits["train"].append(line)
    suite = load(str(write_folder(tmp_path / "a", LABELS, splits)), tmp_path)
    assert suite.split("train")[-1].messages[0]["content"] == yaml.safe_load('"a\\u2028b\\u0085c"')
