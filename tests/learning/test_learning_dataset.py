from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlab.config import TrainingSettings
from agentlab.learning import encode, sample, steps_of
from agentlab.tasks import Item


def items_of(groups):
    return [
        Item(f"i{index}", [{"role": "user", "content": str(index)}], "x", group) for index, group in enumerate(groups)
    ]


groups = st.lists(st.sampled_from("abc"), min_size=1, max_size=15)
mixes = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.0, 0.05, 0.5, 1.0, 2.0, 20.0]))


@given(groups, st.integers(0, 60), mixes, st.integers(0, 2**31))
def test_sample_uses_every_item_equally_often(names, count, mix, seed):
    items = items_of(names)
    chosen = sample(items, count, mix, seed)
    assert len(chosen) == count
    assert chosen == sample(items, count, mix, seed)
    usable = [item.id for item in items if mix.get(item.group, 1.0) > 0] or [item.id for item in items]
    assert {item.id for item in chosen} <= set(usable)
    for start in range(0, count, len(usable)):  # each epoch: nothing twice, and nothing left out before the next
        epoch = [item.id for item in chosen[start : start + len(usable)]]
        assert len(set(epoch)) == len(epoch)


def test_sample_is_another_one_with_another_seed():
    items = items_of("a" * 30)
    orders = {tuple(item.id for item in sample(items, 30, {}, seed)) for seed in range(20)}
    assert len(orders) == 20


def test_a_group_of_twice_the_weight_comes_first_twice_as_often():
    items = items_of("aaaabbbb")
    first = Counter(sample(items, 1, {"a": 2.0}, seed)[0].group for seed in range(3000))
    assert 0.64 < first["a"] / 3000 < 0.70  # 2/3, three standard errors are 0.026


@given(groups, st.integers(0, 60), mixes, st.integers(0, 2**31))
def test_what_is_wanted_more_comes_more_often_and_nothing_fills_a_round_alone(names, count, mix, seed):
    items = items_of(names)
    wanted = np.linspace(0.05, 1, len(items))
    chosen = sample(items, count, mix, seed, wanted)
    assert len(chosen) == count
    assert chosen == sample(items, count, mix, seed, wanted)
    usable = [item.id for item in items if mix.get(item.group, 1.0) > 0] or [item.id for item in items]
    assert {item.id for item in chosen} <= set(usable)
    half = -(-len(usable) // 2)
    for start in range(0, count, half):
        part = [item.id for item in chosen[start : start + half]]
        assert len(set(part)) == len(part)


def test_an_item_of_twenty_times_the_weight_is_in_nearly_every_round():
    items = items_of("a" * 20)
    wanted = np.array([1.0] * 4 + [0.05] * 16)
    often = Counter(item.id for seed in range(200) for item in sample(items, 20, {}, seed, wanted))
    assert min(often[f"i{i}"] for i in range(4)) > 380  # of 400 rounds
    assert 90 < max(often[f"i{i}"] for i in range(4, 20)) < 210


def test_prompt_is_the_engines_and_the_target_ends_its_turn(engine, suite):
    for item in suite.split("train"):
        example = encode(engine, suite, item)
        prompt = engine.encode(engine.render(suite.chat(item)))
        completion = [*engine.encode(item.answer), engine.tokenizer.eos_token_id]
        assert example.input_ids == prompt + completion
        assert example.completion_mask == [0] * len(prompt) + [1] * len(completion)


TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASKING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        # rewrites the prompt once it is answered
        "{% if messages[-1]['role'] == 'assistant' %}<|im_start|>done\n{% endif %}" + TURNS + ASKING,
        # writes no end of turn after the last message
        TURNS.replace("<|im_end|>", "{% if not loop.last or m['role'] != 'assistant' %}<|im_end|>{% endif %}").replace(
            "\n{% endfor", "{% endfor"
        )
        + ASKING,
        # writes something after the end of turn
        TURNS + "{% if messages[-1]['role'] == 'assistant' %}<|im_start|>bye<|im_end|>{% endif %}" + ASKING,
    ],
    ids=["rewriting", "unended", "talkative"],
)
def test_other_templates_end_in_one_end_of_turn_too(engine, suite, monkeypatch, template):
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    item = suite.split("train")[0]
    example = encode(engine, suite, item)
    prompt = engine.encode(engine.render(suite.chat(item)))
    assert example.input_ids[: len(prompt)] == prompt
    assert example.input_ids[len(prompt) :] == [*engine.encode(item.answer), engine.tokenizer.eos_token_id]
    assert sum(example.completion_mask) == len(example.input_ids) - len(prompt)


def test_a_token_budget_pays_for_steps(engine, suite):
    lengths = [len(encode(engine, suite, item).input_ids) for item in suite.split("train")]
    batch = sum(lengths) / len(lengths) * 4
    budget = {"batch_size": 4, "tokens": round(6 * batch)}
    assert steps_of(engine, suite, TrainingSettings(**budget)) == 6
    assert steps_of(engine, suite, TrainingSettings(**budget, steps=2)) == 2
    assert steps_of(engine, suite, TrainingSettings(batch_size=4, tokens=1)) == 1
