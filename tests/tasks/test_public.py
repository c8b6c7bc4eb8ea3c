"""GSM8K, CLINC150 and BFCL, the real files."""

import json

import pytest

from agentlab.errors import SuiteError
from agentlab.tasks import make_suite
from agentlab.tasks.public import bfcl_answer, bfcl_schema, bfcl_tool
from agentlab.toolformat import Call, check_tool, validate


def all_right(suite):
    items = [*suite.split("train"), *suite.split("fitness"), *suite.split("gate"), *suite.open_test()]
    return all(suite.check(item, suite.target(item)) == 1.0 for item in items)


def test_gsm8k(data_folder, tmp_path):
    suite = make_suite(str(data_folder / "gsm8k"), tmp_path / "gsm8k", format="gsm8k", sizes={"test": 1319})
    assert suite.summary()["splits"] == {"train": 7209, "fitness": 64, "gate": 200, "test": 1319}
    assert (suite.metric, suite.license) == ("number", "MIT")
    assert all_right(suite)
    by_id = {item.id: item for item in suite.open_test()}
    ducks = by_id["gsm8k-test-0000"]
    assert ducks.messages[0]["content"].startswith("Janet")
    assert "<<" not in suite.target(ducks)
    assert [suite.check(ducks, text) for text in ("18", "She makes $18.00 every day.", "16")] == [1.0, 1.0, 0.0]


def test_clinc150_all_and_six_intents(data_folder, tmp_path):
    source = str(data_folder / "clinc150")
    whole = make_suite(source, tmp_path / "all", format="clinc150")
    assert len(whole.labels) == 150
    assert all_right(whole)
    assert whole.groups() == ["all"]
    intents = ["weather", "timer", "translate", "alarm", "play_music", "oos"]
    sizes = {"train": 300, "fitness": 36, "gate": 120, "test": 240}
    six = make_suite(source, tmp_path / "six", format="clinc150", labels=intents, sizes=sizes)
    assert six.labels == intents
    assert six.summary()["splits"] == sizes
    assert set(six.summary()["groups"]) == set(intents)
    item = six.split("train")[0]
    assert six.chat(item)[0]["content"] == f"Answer with one label: {', '.join(intents)}"
    with pytest.raises(SuiteError, match="no intent wether"):
        make_suite(source, tmp_path / "bad", format="clinc150", labels=["wether", "timer"])


def test_bfcl(data_folder, tmp_path):
    suite = make_suite(str(data_folder / "bfcl"), tmp_path / "bfcl", format="bfcl")
    assert sum(suite.summary()["splits"].values()) >= 310
    assert suite.warnings == ["3 items dropped: the same prompt occurs twice"]
    assert len(suite.split("gate")) == 100
    assert all_right(suite)
    items = {item.id: item for name in ("train", "fitness", "gate") for item in suite.split(name)}
    items |= {item.id: item for item in suite.open_test()}
    assert all(check_tool(tool) is None for item in items.values() for tool in item.tools)
    assert all((item.answer is None) == id.startswith("irrelevance") for id, item in items.items())
    triangle = items["simple_python_0"]

    def score(**arguments):
        call = json.dumps({"name": "calculate_triangle_area", "arguments": arguments})
        return suite.check(triangle, f"<tool_call>{call}</tool_call>")

    assert score(base=10, height=5) == 1.0
    assert score(base=10.0, height=5, unit="Units") == 1.0
    assert score(base=10, height=5, unit="cm") == 0.0
    assert score(base=5, height=10) == 0.0
    assert score(base=10) == 0.0


def test_bfcl_types_become_json_schema():
    schema = {
        "type": "dict",
        "properties": {
            "type": {"type": "string"},
            "pair": {"type": "tuple", "items": {"type": "float"}},
            "rest": {"type": "any", "description": "x"},
            "deep": {"type": "array", "items": {"type": "dict", "properties": {"n": {"type": "integer"}}}},
        },
        "required": ["type"],
    }
    assert bfcl_schema(schema) == {
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            "pair": {"type": "array", "items": {"type": "number"}},
            "rest": {"description": "x"},
            "deep": {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}}},
        },
        "required": ["type"],
    }
    tool = bfcl_tool({"name": "f", "parameters": schema})
    assert check_tool(tool) is None
    assert validate(Call("f", {"type": "a", "pair": [1, 2.5], "rest": None}), tool) == []


def test_bfcl_answers_keep_all_choices_and_begin_with_one_that_fits():
    tool = bfcl_tool({"name": "f", "parameters": {"type": "dict", "properties": {"n": {"type": "integer"}}}})
    truth = [{"f": {"n": ["5", 5], "o": [{"x": ["a", ""]}], "u": ["", "m"]}}]
    assert bfcl_answer(truth, [tool]) == {
        "name": "f",
        "arguments": {"n": {"any": [5, "5"]}, "o": {"any": [{"x": {"any": ["a", ""]}}]}, "u": {"any": ["", "m"]}},
    }


@pytest.mark.parametrize("format", ["gsm8k", "clinc150", "bfcl"])
def test_a_folder_without_the_files_is_refused(tmp_path, format):
    with pytest.raises(SuiteError, match="no file"):
        make_suite(str(tmp_path), tmp_path / "out", format=format)


@pytest.mark.parametrize(("format", "names"), [("gsm8k", "GSM8K's"), ("bfcl", "BFCL's files")])
def test_files_of_something_else_are_refused(tmp_path, format, names):
    for name in ("train", "test", "simple_python", "simple_python_answers", "irrelevance"):
        (tmp_path / f"{name}.jsonl").write_text('{"id": "a", "answer": 5}\n')
    with pytest.raises(SuiteError, match=names):
        make_suite(str(tmp_path), tmp_path / "out", format=format)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "data_full.json").write_text('{"train": [1, 2]}')
    with pytest.raises(SuiteError, match="is not CLINC150"):
        make_suite(str(tmp_path), tmp_path / "out", format="clinc150")
