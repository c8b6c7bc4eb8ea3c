"""The built-in suites: deterministic, valid, and with nothing in `test` that `train` has shown."""

import importlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from agentlab.errors import SuiteError
from agentlab.tasks import BUILT_IN, export_built_in, load
from agentlab.tasks.builtin import made
from agentlab.tasks.builtin.toolcalls import FIXED, TOOLS
from agentlab.toolformat import parse_calls, validate


@pytest.fixture(params=BUILT_IN)
def suite(request, tmp_path):
    return load(request.param, tmp_path)


def pool_of(name):
    """All templates and entities of each pool, as written in the module."""
    module = importlib.import_module(f"agentlab.tasks.builtin.{name}")
    tables = list(module.TEMPLATES.values()) if name == "toolcalls" else [module.TEMPLATES]
    templates, entities = {}, {}
    for pool in ("train", "dev", "test"):
        found = [template for table in tables for template in table[pool]]
        templates[pool] = {template if isinstance(template, str) else template[0] for template in found}
        entities[pool] = {value for values in module.ENTITIES.values() for value in values[pool]}
    return templates, entities


def fitting(template, values=".+"):
    """A pattern for what can be made from the template with such values."""
    return re.compile(re.sub(r"\\\{\w+\\\}", lambda _: f"(?:{values})", re.escape(template)) + r"(?:\nFields: .*)?$")


def words(text):
    return " ".join(re.findall(r"[^\W_]+(?:[.'][^\W_]+)*", text.casefold()))


def test_sizes_and_no_warnings(suite):
    assert suite.summary()["splits"] == {"train": 800, "fitness": 48, "gate": 128, "test": 200}
    assert suite.warnings == []


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("dev", "test"), ("train", "dev")])
def test_pools_share_no_template_and_no_entity(name, one, other):
    templates, entities = pool_of(name)
    assert not {words(text) for text in templates[one]} & {words(text) for text in templates[other]}
    assert not {words(text) for text in entities[one]} & {words(text) for text in entities[other]}


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(("split", "pool"), [("train", "train"), ("fitness", "dev"), ("gate", "dev"), ("test", "test")])
def test_every_item_is_made_from_its_own_pool(name, split, pool):
    templates, entities = pool_of(name)
    for item in made(name)[split]:
        assert item.template in templates[pool]
        assert set(item.entities) <= entities[pool]
        allowed = entities[pool] | {value for values in FIXED.values() for value in values}
        values = "|".join(map(re.escape, sorted(allowed))) + ("" if name == "toolcalls" else r"|\d+")
        assert fitting(item.template, values).match(item.prompt)


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_entity_of_test_is_written_in_any_training_prompt(name):
    train = [f" {words(item.prompt)} " for item in made(name)["train"]]
    for entity in {entity for item in made(name)["test"] for entity in item.entities}:
        assert not [prompt for prompt in train if f" {words(entity)} " in prompt], entity


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_training_prompt_fits_a_template_of_test(name):
    templates, _ = pool_of(name)
    patterns = [fitting(text) for text in templates["test"]]
    for item in made(name)["train"]:
        assert not [pattern.pattern for pattern in patterns if pattern.match(item.prompt)]


def test_every_target_is_right_and_the_answer_of_another_item_is_not(suite):
    items = suite.split("train") + suite.open_test()
    assert all(suite.check(item, suite.target(item)) == 1.0 for item in items)
    pairs = [(item, other) for item, other in itertools.pairwise(items) if suite.target(item) != suite.target(other)]
    wrong = [suite.check(item, suite.target(other)) for item, other in pairs]
    assert len(wrong) > len(items) / 2
    assert sum(wrong) / len(wrong) < 0.05


def test_the_same_in_every_process(suite, tmp_path):
    code = f"from agentlab.tasks import load; from pathlib import Path; print(load({suite.name!r}, Path('/')).digest)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == suite.digest


def test_exported_to_a_folder_it_is_the_same_suite(suite, tmp_path):
    export_built_in(suite.name, tmp_path / "copy")
    copy = load("copy", tmp_path)
    assert copy.digest == suite.digest
    assert [copy.chat(item) for item in copy.open_test()] == [suite.chat(item) for item in suite.open_test()]
    with pytest.raises(SuiteError, match="already exists"):
        export_built_in(suite.name, tmp_path / "copy")
    with pytest.raises(SuiteError, match="no built-in suite x; allowed: toolcalls"):
        export_built_in("x", tmp_path / "other")


def test_toolcalls_covers_choice_types_and_no_tool(tmp_path):
    suite = load("toolcalls", tmp_path)
    kinds = {
        "enum" if "enum" in schema else schema["type"]
        for tool in TOOLS.values()
        for schema in tool["parameters"]["properties"].values()
    }
    assert kinds == {"string", "integer", "number", "boolean", "enum"}
    for split, items in (("train", suite.split("train")), ("test", suite.open_test())):
        counts = Counter(item.group for item in items)
        assert counts.pop("none") == len(items) // (4 if split == "train" else 8)
        assert set(counts) == set(TOOLS)
        assert max(counts.values()) - min(counts.values()) <= 1
        for item in items:
            assert [tool["name"] for tool in item.tools] == list(TOOLS)
            if item.answer:
                (call,) = parse_calls(suite.target(item))
                assert validate(call, TOOLS[item.answer["name"]]) == []
                for value in call.arguments.values():
                    assert isinstance(value, bool) or str(value) in item.messages[0]["content"]


def test_toolcalls_shows_requests_whose_tool_is_missing(tmp_path):
    items = made("toolcalls")["test"]
    templates = {
        text
        for table in importlib.import_module("agentlab.tasks.builtin.toolcalls").TEMPLATES.values()
        for text in table["test"]
    }
    hard = [item for item in items if item.answer is None and item.template in templates]
    assert len(hard) >= 5


def test_train_has_many_phrasings_of_each_tool():
    module = importlib.import_module("agentlab.tasks.builtin.toolcalls")
    assert all(len(table["train"]) >= 8 and len(table["test"]) >= 4 for table in module.TEMPLATES.values())


@pytest.mark.model
def test_toolcalls_prompts_are_short_for_the_embedded_model(tmp_path, embedded):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.folder)
    suite = load("toolcalls", tmp_path)
    prompts = [
        len(
            tokenizer(
                tokenizer.apply_chat_template(suite.chat(item), tokenize=False, add_generation_prompt=True)
            ).input_ids
        )
        for item in suite.split("train")
    ]
    targets = [len(tokenizer(suite.target(item)).input_ids) for item in suite.split("train")]
    assert sum(prompts) / len(prompts) <= 110
    assert max(prompts) <= 130
    assert sum(targets) / len(targets) <= 32
    assert max(targets) <= 40


def test_arithmetic_answers_follow_from_the_numbers_in_the_text():
    for item in made("arithmetic")["train"][:50]:
        numbers = [int(text) for text in re.findall(r"\d+", item.prompt)]
        first, last = numbers[0], numbers[-1]
        possible = {sum(numbers), first - last, last - first, first * last}
        if len(numbers) == 3:
            possible |= {numbers[0] + numbers[1] * numbers[2]}
        assert item.answer in possible, item.prompt


def test_extraction_answers_hold_exactly_the_named_fields():
    for item in made("extraction")["test"]:
        text, fields = item.prompt.split("\nFields: ")
        assert list(item.answer) == fields.split(", ")
        assert all(str(value) in text for value in item.answer.values())
        assert json.loads(json.dumps(item.answer)) == item.answer
