"""What is given up for memory, in which order, and when it is taken back: decisions alone."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlab.config import BudgetSettings
from agentlab.hardware import ledger
from agentlab.hardware.recovery import (
    CALM_ANSWERS,
    MAX_STEPS,
    Action,
    Footprint,
    Situation,
    free_bytes,
    may_undo,
    next_action,
    next_rung,
)
from agentlab.hardware.rungs import LADDER
from agentlab.hardware.shape import published, published_names
from agentlab.hardware.sizing import LEAST_TOKENS
from agentlab.hardware.watch import Sample

SIZES = {"bf16": 8000, "int8": 4200, "nf4": 2300, "hqq3": 2000}
HELD = Footprint("cuda", 4096, 7, "bf16", SIZES, 3, 1500)
WHOLE = Situation("serving", "large", HELD, asked_tokens=4000, smaller="small", cpu="small")


def change(situation, **held):
    return dataclasses.replace(situation, footprint=dataclasses.replace(situation.footprint, **held))


def test_the_order_is_context_adapters_rungs_smaller_model_cpu():
    situation, taken = WHOLE, []
    while (action := next_action(situation, len(taken))) is not None:
        taken.append(action)
        match action.kind:
            case "shrink_context":
                tokens = int(action.target)
                situation = dataclasses.replace(change(situation, context_tokens=tokens), asked_tokens=tokens)
            case "offload_adapters":
                situation = change(situation, idle_adapters=0, idle_adapter_bytes=0)
            case "lower_rung":
                situation = change(situation, rung=action.target)
            case "smaller_model":
                situation = Situation("serving", "small", Footprint("cuda", 512, 7), smaller=None, cpu="small")
            case "cpu":
                situation = Situation("serving", "small", Footprint("cpu", 512, 7))
    assert [(action.kind, action.source, action.target, action.bytes_expected) for action in taken] == [
        ("shrink_context", "4096", "2000", 2000 * 7),
        ("shrink_context", "2000", "1000", 1000 * 7),
        ("shrink_context", "1000", str(LEAST_TOKENS), (1000 - LEAST_TOKENS) * 7),
        ("offload_adapters", "3", "0", 1500),
        ("lower_rung", "bf16", "int8", 3800),
        ("lower_rung", "int8", "nf4", 1900),
        ("lower_rung", "nf4", "hqq3", 300),
        ("smaller_model", "large", "small", 2000),
        ("cpu", "small", "small on the CPU", 0),
    ]


def test_what_an_answer_cannot_do_without_is_not_shrunk():
    assert next_action(dataclasses.replace(WHOLE, least_tokens=3000), 0).target == "3000"
    assert next_action(dataclasses.replace(WHOLE, least_tokens=4000), 0).kind == "offload_adapters"


def test_a_model_that_cannot_be_loaded_has_no_context_and_no_adapters_to_give_up():
    assert next_action(dataclasses.replace(WHOLE, problem="loading"), 0).kind == "lower_rung"


def test_a_rung_that_saves_no_bytes_is_passed_over():
    assert next_rung("bf16", {"bf16": 100, "int8": 100, "nf4": 60}) == "nf4"
    assert next_rung("nf4", {"nf4": 100, "hqq3": 101}) is None
    assert next_rung("nf4", SIZES) == "hqq3"
    assert next_rung("fp32", {"fp32": 16000, **SIZES}) == "bf16"


def test_an_engine_with_nothing_to_give_up_hands_over():
    assert next_action(Situation("serving", "served", smaller="small"), 0).kind == "smaller_model"
    assert next_action(Situation("serving", "served"), 0) is None


@given(st.integers(0, 2 * MAX_STEPS))
def test_the_number_of_steps_is_bounded(taken):
    assert (next_action(WHOLE, taken) is None) is (taken >= MAX_STEPS)


@pytest.mark.parametrize("asked", [600, 4096, 8192, 32_768, 262_144])
def test_the_cpu_is_reached_and_everything_tried_there_however_long_the_request(asked):
    sizes = {"fp32": 16000, **SIZES}
    taken = 0
    for device, others in [("cuda", 2), ("cuda", 1), ("cuda", 0), ("cpu", 0)]:
        held = Footprint(device, asked, 7, "fp32", sizes, 3, 1500)
        while True:
            situation = Situation("serving", "m", held, asked, smaller="s" if others else None, cpu="c")
            action = next_action(situation, taken)
            taken += 1
            match action:
                case Action(kind="shrink_context", target=tokens):
                    held = dataclasses.replace(held, context_tokens=int(tokens))
                case Action(kind="offload_adapters"):
                    held = dataclasses.replace(held, idle_adapters=0)
                case Action(kind="lower_rung", target=rung):
                    held = dataclasses.replace(held, rung=rung)
                case _:
                    break
        assert (held.context_tokens, held.idle_adapters, held.rung) == (LEAST_TOKENS, 0, "hqq3")
        assert (action and action.kind) == ("smaller_model" if others else "cpu" if device == "cuda" else None)
    assert taken - 1 <= MAX_STEPS


@pytest.mark.parametrize(
    ("free", "calm", "relapses", "expected"),
    [
        (1101, CALM_ANSWERS, 0, True),
        (1099, CALM_ANSWERS, 0, False),  # a tenth more has to be free
        (9999, CALM_ANSWERS - 1, 0, False),
        (9999, CALM_ANSWERS, 1, False),
        (9999, 2 * CALM_ANSWERS, 1, True),
        (9999, 2 * CALM_ANSWERS, 99, False),
    ],
)
def test_a_step_is_undone_when_memory_has_returned_for_good_enough(free, calm, relapses, expected):
    assert may_undo(Action("lower_rung", "bf16", "nf4", 1000), free, calm, relapses) is expected


def test_what_is_taken_as_far_as_there_is_room_need_not_be_free_to_come_back():
    on_vllm = change(WHOLE, elastic_bytes=4000, idle_adapters=0)
    lower = next_action(dataclasses.replace(on_vllm, problem="loading"), 0)
    assert (lower.kind, lower.bytes_expected) == ("lower_rung", 3800 + 4000)
    assert may_undo(lower, 4200, CALM_ANSWERS, 0)
    assert not may_undo(lower, 4100, CALM_ANSWERS, 0)


@pytest.mark.parametrize(("card", "budget"), [(6141, 5.0), (8188, 7.0), (24564, 22.0)])
@pytest.mark.parametrize("name", published_names())
def test_a_model_alone_on_its_card_comes_back_to_the_rung_that_fits(card, budget, name):
    shape, tokens = published(name), 2000
    sizes = {rung.name: ledger.weights(shape, rung, 2).total for rung in LADDER}
    cache, context = tokens * ledger.kv_bytes_per_token(shape, 2), int(0.35 * 2**30)
    rung = next((rung for rung in sizes if sizes[rung] + cache + context <= budget * 2**30), None)
    if rung is None or (lower := next_rung(rung, sizes)) is None:
        assert rung is None or rung == list(sizes)[-1] or min(sizes.values()) == sizes[rung]  # it has no step to undo
        return
    held_mib = (sizes[lower] + context) / 2**20
    sample = Sample(0, "cuda", "card", card, held_mib, 0, owners={"base": held_mib})
    free = free_bytes(sample, BudgetSettings(vram_gib=budget)) - cache
    assert may_undo(Action("lower_rung", rung, lower, sizes[rung] - sizes[lower]), free, CALM_ANSWERS, 0)


@pytest.mark.parametrize(
    ("free", "calm", "relapses", "expected"),
    [
        (1, CALM_ANSWERS, 0, True),
        (0, CALM_ANSWERS, 0, False),  # the card is full, or nobody watches it
        (2**40, CALM_ANSWERS - 1, 0, False),
        (2**40, 4 * CALM_ANSWERS - 1, 2, False),
        (2**40, 4 * CALM_ANSWERS, 2, True),
    ],
)
def test_a_step_of_unknown_size_is_tried_after_as_many_calm_answers(free, calm, relapses, expected):
    assert may_undo(Action("smaller_model", "a", "b", 0), free, calm, relapses) is expected


@pytest.mark.parametrize(("free", "expected"), [(1101, True), (1099, False)])
def test_where_no_model_is_left_only_the_room_counts(free, expected):
    step = Action("smaller_model", "a", "b", 1000)
    assert may_undo(step, free, calm_answers=0, relapses=9, nothing_left=True) is expected


def test_free_memory_is_what_the_alert_and_the_budget_leave():
    budget = BudgetSettings(vram_gib=5.0, memory_alert=0.9)
    card = {"time_s": 0.0, "device": "cuda", "name": "card", "total_mib": 6000.0, "swap_used_mib": 0.0}
    mine = Sample(used_mib=3000, owners={"base": 2500.0, "other_processes": 500.0}, **card)
    assert free_bytes(mine, budget) == 2400 * 2**20  # 90 % of the card
    others = Sample(used_mib=5000, owners={"base": 1000.0, "other_processes": 4000.0}, **card)
    assert free_bytes(others, budget) == 400 * 2**20
    full = Sample(used_mib=4900, owners={"base": 4900.0}, **card)
    assert free_bytes(full, budget) == 220 * 2**20  # of the budget's 5,120 MiB
    idle = Sample(used_mib=4900, owners={"base": 4900.0}, idle_mib=1000, **card)
    assert free_bytes(idle, budget) == 1220 * 2**20
    over = Sample(used_mib=5990, owners={}, **card)
    assert free_bytes(over, budget) == 0
