"""Suites out of files and data sets."""

import csv
import json
import os

import pytest

from agentlab.errors import StorageError, SuiteError
from agentlab.tasks import load, make_suite

from .helpers import SPLITS

MOODS = ["happy", "sad", "angry"]


def rows(count, start=0):
    return [{"text": f"sentence number {n}", "label": MOODS[n % 3], "extra": n} for n in range(start, start + count)]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def write_csv(path, lines):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    return str(path)


def write_json(path, lines):
    path.write_text(json.dumps(lines))
    return str(path)


def write_data_set(path, lines):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=MOODS), "extra": datasets.Value("int64")}
    )
    numbered = [{**line, "label": MOODS.index(line["label"])} for line in lines]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(numbered, features=features)}).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_jsonl, "d.jsonl"), (write_csv, "d.csv"), (write_json, "d.json"), (write_data_set, "d")],
)
def test_every_source_gives_the_same_suite(tmp_path, write, name):
    suite = make_suite(write(tmp_path / name, rows(120)), tmp_path / "moods", license="CC0-1.0", system="Feel.")
    reference = make_suite(
        write_jsonl(tmp_path / "r.jsonl", rows(120)), tmp_path / "r" / "moods", license="CC0-1.0", system="Feel."
    )
    assert suite.digest == reference.digest
    assert (suite.name, suite.metric, suite.labels) == ("moods", "label", sorted(MOODS))
    assert (suite.license, suite.system) == ("CC0-1.0", "Feel.")
    assert suite.summary()["splits"] == {"train": 38, "fitness": 12, "gate": 40, "test": 30}
    assert load("moods", tmp_path).digest == suite.digest


def items_of(suite):
    return {name: suite.open_test() if name == "test" else suite.split(name) for name in SPLITS}


def test_every_row_is_in_one_split_and_labels_are_in_proportion(tmp_path):
    suite = make_suite(write_jsonl(tmp_path / "d.jsonl", rows(120)), tmp_path / "out")
    splits = items_of(suite)
    prompts = [item.messages[0]["content"] for items in splits.values() for item in items]
    assert sorted(prompts) == sorted(row["text"] for row in rows(120))
    for items in splits.values():
        counts = [sum(item.answer == mood for item in items) for mood in MOODS]
        assert max(counts) - min(counts) <= 2


def test_sizes_and_seed(tmp_path):
    source = write_jsonl(tmp_path / "d.jsonl", rows(60))
    sizes = {"train": 10, "fitness": 5, "gate": 6, "test": 7}
    first = make_suite(source, tmp_path / "a" / "s", sizes=sizes)
    assert first.summary()["splits"] == sizes
    assert make_suite(source, tmp_path / "b" / "s", sizes=sizes).digest == first.digest
    assert make_suite(source, tmp_path / "c" / "s", sizes=sizes, seed=8).digest != first.digest


def test_given_splits_are_kept(tmp_path):
    parts = {"train": rows(40), "dev": rows(40, 40), "test": rows(40, 80), "unlabelled": "ignored"}
    suite = make_suite(write_json(tmp_path / "d.json", parts), tmp_path / "out")
    numbers = {
        name: {int(item.messages[0]["content"].split()[-1]) for item in items}
        for name, items in items_of(suite).items()
    }
    assert numbers["train"] == set(range(40))
    assert numbers["fitness"] | numbers["gate"] == set(range(40, 80))
    assert numbers["test"] == set(range(80, 120))


def test_a_separate_test_file(tmp_path):
    test = write_jsonl(tmp_path / "t.jsonl", rows(9, 60))
    suite = make_suite(write_jsonl(tmp_path / "d.jsonl", rows(60)), tmp_path / "out", test_source=test)
    assert suite.test_items == 9
    assert {item.id.split("-")[0] for item in suite.open_test()} == {"test"}


def test_a_separate_file_without_tests_is_refused(tmp_path):
    (tmp_path / "v.json").write_text(json.dumps({"validation": rows(9, 60)}))
    with pytest.raises(SuiteError, match=r"v\.json has neither a test nor a train split; it has: \w+"):
        make_suite(write_jsonl(tmp_path / "d.jsonl", rows(60)), tmp_path / "out", test_source=str(tmp_path / "v.json"))


def test_duplicates_leave_train_first_and_are_reported(tmp_path):
    lines = [*rows(60), {"text": "Sentence  number 3!", "label": "sad", "extra": 0}]
    test = write_jsonl(tmp_path / "t.jsonl", [*rows(9, 60), {"text": "sentence number 5.", "label": "sad"}])
    suite = make_suite(write_jsonl(tmp_path / "d.jsonl", lines), tmp_path / "out", test_source=test)
    assert suite.test_items == 10
    assert any("2 items dropped" in warning for warning in suite.warnings)
    assert json.loads((tmp_path / "out" / "made-from.json").read_text())["dropped_duplicates"] == 2


@pytest.mark.parametrize(
    ("answers", "metric"),
    [
        (["1", "2.5", "-3", "$1,000"], "number"),
        ([1, 2, 3.5, 4], "number"),
        ([{"a": 1}, {"a": 2}, [1], {}], "json"),
        (["yes", "no"], "label"),
        ([f"free text {n}" for n in range(40)], "exact"),
    ],
)
def test_the_metric_is_guessed_from_the_answers(tmp_path, answers, metric):
    lines = [{"question": f"q{n}", "answer": answers[n % len(answers)]} for n in range(40)]
    suite = make_suite(write_jsonl(tmp_path / "d.jsonl", lines), tmp_path / "out")
    assert suite.metric == metric
    assert all(suite.check(item, suite.target(item)) == 1.0 for item in suite.split("train"))


def test_columns_messages_and_tools(tmp_path):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
    lines = [
        {
            "chat": [{"role": "user", "content": f"call {n}"}],
            "wanted": json.dumps({"name": "f", "arguments": {"n": n}}) if n % 2 else None,
            "tools": json.dumps([tool]),
        }
        for n in range(20)
    ]
    suite = make_suite(
        write_jsonl(tmp_path / "d.jsonl", lines),
        tmp_path / "out",
        metric="tool_call",
        prompt_column="chat",
        answer_column="wanted",
    )
    assert suite.groups() == ["f", "none"]
    assert all(item.tools == [tool] for item in suite.split("train"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "xml"}, "unknown format xml; allowed: auto, gsm8k"),
        ({"prompt_column": "txt"}, "has no column txt; allowed: text, label, extra"),
        ({"answer_column": "y"}, "has no column y"),
        ({"prompt_column": "extra"}, "d.jsonl, line 1: column extra must be a text"),
        ({"labels": ["happy", "sad"]}, r"d.jsonl, line \d+: answer 'angry' is not one of the 2 labels"),
        ({"metric": "exact", "labels": ["happy"]}, "labels belong to metric label"),
        ({"metric": "number"}, "allowed for metric number"),
        ({"metric": "bleu"}, r"^[^ ]*d.jsonl: unknown metric bleu"),
        ({"labels": ["happy", ""]}, r"^[^ ]*d.jsonl: label ''; allowed: a text that is not empty"),
        ({"sizes": {"train": 100}}, "30 rows of train are too few: split train needs 100 and"),
        ({"sizes": {"dev": 3}}, "unknown split dev in sizes"),
        ({"sizes": {"gate": 0}}, "size of gate: 0"),
        ({"format": "bfcl", "metric": "exact"}, "format bfcl brings its own metric"),
        ({"format": "bfcl", "labels": ["x"]}, "format bfcl has no labels"),
        ({"test_source": "none.jsonl"}, "no file or folder none.jsonl"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(tmp_path, options, sentence):
    source = write_jsonl(tmp_path / "d.jsonl", rows(30))
    with pytest.raises(SuiteError, match=sentence):
        make_suite(source, tmp_path / "new" / "out", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("d.jsonl", "{}\n", "which column is the prompt"),
        ("d.jsonl", "", "has no rows"),
        ("d.jsonl", "{\n", "line 1 is not JSON"),
        ("d.jsonl", "[]\n", "line 1 is not a JSON object"),
        ("d.jsonl", '{"prompt": "a"}\n', "which column is the answer"),
        ("d.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n', "d.jsonl, line 2 lacks column answer"),
        (
            "d.csv",
            "prompt,answer\na,\n" + "".join(f"p{n},a{n}\n" for n in range(9)),
            "d.csv, line 2: answer ''; allowed for metric exact",
        ),
        ("d.json", '[{"prompt": "a", "answer": "b"}, {"prompt": "c"}]', "d.json, row 2 of train lacks column answer"),
        ("d.jsonl", '{"prompt": "a", "answer": null}\n', "d.jsonl, line 1 has no answer"),
        ("d.jsonl", '{"prompt": "a", "answer": "b"}\n', "too few"),
        ("d.json", '"text"', "holds no rows"),
        ("d.json", "{", "cannot read"),
        ("d.csv", "prompt,answer\na,b,c\n", "line 2 has not as many cells"),
        ("d.csv", "prompt,answer\na\n", "line 2 has not as many cells"),
        ("d.txt", "a", "unknown kind of file"),
    ],
)
def test_bad_sources_are_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(SuiteError, match=sentence):
        make_suite(str(tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("write", "name", "place"),
    [(write_jsonl, "d.jsonl", "line 8"), (write_csv, "d.csv", "line 9"), (write_json, "d.json", "row 8 of train")],
)
@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("", "column label is ''; allowed for a label: a text that is not empty"),
        ("SAD", "label SAD cannot be told apart from sad in"),
    ],
)
def test_a_bad_label_is_named_by_its_row(tmp_path, write, name, place, label, sentence):
    lines = rows(40)
    lines[7]["label"] = label
    with pytest.raises(SuiteError) as caught:
        make_suite(write(tmp_path / name, lines), tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path / name}, {place}: {sentence}")


def test_text_that_cannot_be_written_is_refused(tmp_path):
    lines = [*rows(40), {"text": "half \ud800", "label": "sad"}]
    with pytest.raises(SuiteError, match=r"d\.jsonl, line 41: text that is not valid Unicode"):
        make_suite(write_jsonl(tmp_path / "d.jsonl", lines), tmp_path / "out")


@pytest.mark.parametrize(
    ("metric", "answers", "contradictory"),
    [
        ("exact", ["yes", "Yes.", "no"], 1),
        ("exact", ["yes", "Yes."], 0),
        ("exact", ["a", 5], 1),
        ("number", ["5", 5.0], 0),
        ("number", ["5", "x = 6"], 1),
        ("json", [{"a": 1}, '{"a": 1.0}'], 0),
        ("json", [{"a": 1}, {"a": 2}, {"a": 3}], 1),
    ],
)
def test_contradictory_answers_are_reported(tmp_path, metric, answers, contradictory):
    lines = [{"prompt": f"p{n}", "answer": answers[0]} for n in range(20)]
    lines += [{"prompt": "P7!", "answer": answer} for answer in answers[1:]]
    suite = make_suite(write_jsonl(tmp_path / "d.jsonl", lines), tmp_path / "out", metric=metric)
    told = f"prompts with contradictory answers: {contradictory}, of each the first answer is kept"
    assert any(told in warning for warning in suite.warnings) == bool(contradictory)
    assert json.loads((tmp_path / "out" / "made-from.json").read_text())["contradictory_prompts"] == contradictory


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "x" * 300, "x" * 300 + "/out"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    source = write_jsonl(tmp_path / "d.jsonl", rows(40))
    with pytest.raises(StorageError, match="cannot make the folder") as caught:
        make_suite(source, tmp_path / place)
    assert ("file is no folder" in str(caught.value)) == place.startswith("file")


def test_a_hub_name_needs_to_be_asked_for(tmp_path):
    with pytest.raises(SuiteError, match="needs format hub"):
        make_suite("openai/gsm8k", tmp_path / "out")


def test_an_existing_folder_is_not_touched(tmp_path):
    source = write_jsonl(tmp_path / "d.jsonl", rows(30))
    (tmp_path / "out").mkdir()
    with pytest.raises(SuiteError, match="already exists"):
        make_suite(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_no_half_suite(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "d.jsonl", rows(30))
    written = []
    real = os.fsync

    def full(handle):
        written.append(handle)
        if len(written) > 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        make_suite(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]
