"""The planner: what it chooses, what it refuses, and what it says; the shipped experiments among it."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvml_standin import Nvml

from agentlab import config, planning
from agentlab.cli.planning import text
from agentlab.errors import DoesNotFitError
from agentlab.hardware import ledger
from agentlab.hardware.ledger import GIB
from agentlab.hardware.plan import check_fits, make_plan
from agentlab.hardware.rungs import BF16, FP32
from agentlab.hardware.shape import published
from agentlab.hardware.sizing import Machine, Model, Workload
from agentlab.hardware.speed import CPU

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
WORKLOAD = Workload(48, 100, 120, 30, 200, 60)
GPU = Machine("cuda", 32 * GIB)
QWEN_7B = "Qwen/Qwen2.5-7B-Instruct"


def settings_of(**sections):
    return config.from_mapping({"name": "x", **sections}, "test")


def plan_of(name, machine=GPU, workload=WORKLOAD, rungs=None, **sections):
    models = [Model("primary", name, published(name), "from its published config")]
    return make_plan(settings_of(**sections), models, machine, workload, rungs)


def shipped(name):
    from agentlab.lab import Lab

    return Lab.open(EXPERIMENTS / f"{name}.yaml").plan()


# -- the shipped experiments --------------------------------------------------------------------------------------


def test_the_laptops_experiment_fits_as_the_engine_loads_it():
    plan = shipped("laptop-6gb")
    assert plan.fits
    primary = plan.models[0]
    assert (primary.rung, primary.estimate.assumed) == ("bf16", "an RTX 4050 Laptop")
    serve, evaluate, train = primary.phases
    assert serve.chosen["context_tokens"] == 4096
    assert serve.chosen["adapters"] == 10
    assert evaluate.chosen["batch_size"] == evaluate.wanted["batch_size"]
    assert train.chosen["micro_batch"] * train.chosen["accumulation"] == 8
    assert max(phase.total_bytes for phase in primary.phases) < 4.0 * GIB


def test_the_original_trio_is_planned_honestly():
    plan = shipped("laptop-6gb-r1")
    primary, fallback, emergency = plan.models
    assert [model.fits for model in plan.models] == [False, False, True]
    for model in (primary, fallback):
        assert dict(model.phases[0].lines)["weights"] / GIB == pytest.approx(5.17, abs=0.01)
        assert any("2.03 GiB" in note and "untied" in note for note in model.notes)
        assert not any("embedding" in remedy for remedy in model.remedies)  # nothing here can leave it in RAM
        assert any("Ollama" in remedy for remedy in model.remedies)
        assert any(remedy.startswith("Qwen3-4B") for remedy in model.remedies)
    assert any("cannot meet the target without a token budget" in note for note in primary.notes)
    assert not any("token budget" in note for note in fallback.notes)
    # a 7B on such a card writes some 60 to 75 tokens in two seconds
    assert 50 <= primary.estimate.tokens_in_target <= 75
    assert len(emergency.phases) == 1


def test_the_workstations_experiment_fits():
    plan = shipped("workstation-24gb")
    assert plan.fits
    assert plan.models[0].rung == "bf16"
    assert plan.models[0].estimate.assumed == "an RTX 4090"


# -- choices ------------------------------------------------------------------------------------------------------


def test_auto_takes_the_most_precise_rung_that_fits():
    for name, rung in {"Qwen2.5-0.5B": "bf16", "Qwen2.5-1.5B": "bf16", "Qwen2.5-3B": "int8", "Qwen3-4B": "nf4"}.items():
        budget = {"vram_gib": 4.5} if name == "Qwen3-4B" else {}
        plan = plan_of(name, budget=budget)
        assert plan.models[0].rung == rung, name
        assert plan.fits


def test_a_rung_in_the_settings_is_the_only_one():
    assert plan_of("Qwen2.5-0.5B", model={"rung": "nf4"}).models[0].rung == "nf4"
    assert not plan_of("Qwen2.5-3B", model={"rung": "bf16"}).fits
    assert "model.rung=int8" in plan_of("Qwen2.5-3B", model={"rung": "bf16"}).models[0].remedies


def test_a_long_item_shrinks_micro_batch_and_evaluation_and_keeps_the_steps_items():
    long = dataclasses.replace(WORKLOAD, longest_prompt_tokens=3000)
    plan = plan_of(
        "Qwen2.5-1.5B", workload=long, training={"max_length": 4096, "batch_size": 8}, model={"rung": "bf16"}
    )
    _, evaluate, train = plan.models[0].phases
    assert plan.fits
    assert train.chosen["micro_batch"] < 8
    assert train.chosen["micro_batch"] * train.chosen["accumulation"] == 8
    assert 1 <= evaluate.chosen["batch_size"] < 32
    one_more = ledger.largest_batch(published("Qwen2.5-1.5B"), evaluate.chosen["tokens"], 10**12, 10**6)
    assert one_more > evaluate.chosen["batch_size"]


def test_serving_shrinks_the_context_before_it_drops_adapters():
    ample = plan_of("Qwen2.5-1.5B", model={"rung": "bf16"}).models[0].phases[0]
    tight = plan_of("Qwen2.5-1.5B", model={"rung": "bf16"}, budget={"vram_gib": 3.5}).models[0].phases[0]
    assert (ample.chosen["context_tokens"], ample.chosen["adapters"]) == (4096, 10)
    assert tight.fits
    assert 512 < tight.chosen["context_tokens"] < 4096
    assert tight.chosen["adapters"] == 10
    tighter = plan_of("Qwen2.5-1.5B", model={"rung": "bf16"}, budget={"vram_gib": 3.4}).models[0].phases[0]
    assert tighter.fits
    assert tighter.chosen["context_tokens"] == 512
    assert 1 < tighter.chosen["adapters"] < 10
    least = plan_of("Qwen2.5-1.5B", model={"rung": "bf16"}, budget={"vram_gib": 3.0}).models[0].phases[0]
    assert not least.fits
    assert (least.chosen["context_tokens"], least.chosen["adapters"]) == (512, 1)


def test_adapters_are_the_primary_models_alone():
    shape = published("Qwen2.5-1.5B")
    models = [Model(role, shape.name, shape, "") for role in ("primary", "fallback", "emergency")]
    for machine in (GPU, Machine("cpu", 32 * GIB)):
        primary, *others = make_plan(settings_of(), models, machine, WORKLOAD).models
        assert primary.phases[0].chosen["adapters"] == 10
        for other in others:
            (serve,) = other.phases
            assert (serve.chosen["adapters"], serve.wanted["adapters"]) == (0, 0)
            assert dict(serve.lines)["adapters"] == 0
            assert serve.chosen["longest_context_tokens"] >= primary.phases[0].chosen["longest_context_tokens"]


@pytest.mark.parametrize("vram_gib", [3.4, 4.0, 5.0, 7.0, 16.0])
def test_what_is_chosen_fits_and_the_next_larger_does_not(vram_gib):
    shape = published("Qwen2.5-1.5B")
    free = int(vram_gib * GIB) - ledger.weights(shape, BF16).total
    tokens = ledger.longest_context(shape, free)
    needed = lambda t: ledger.kv_cache_bytes(shape, 1, t + ledger.KV_ROOM_TOKENS) + ledger.prefill_bytes(shape, 1, t)  # noqa: E731
    assert needed(tokens) <= free
    assert tokens == shape.context_length or needed(tokens + 1) > free
    adapters = ledger.most_adapters(shape, 16, ["q_proj"], free)
    assert adapters * ledger.adapter_bytes(shape, 16, ["q_proj"]) <= free
    assert (adapters + 1) * ledger.adapter_bytes(shape, 16, ["q_proj"]) > free


def test_nothing_fits_into_nothing():
    shape = published("Qwen2.5-1.5B")
    assert ledger.longest_context(shape, -1) == 0
    assert ledger.most_adapters(shape, 16, ["q_proj"], -1) == 0
    assert ledger.largest_batch(shape, 100, -1, 32) == 0


# -- settings -----------------------------------------------------------------------------------------------------


def test_the_drivers_context_counts_and_the_reserve_lies_beyond_the_budget():
    plain = plan_of("Qwen2.5-1.5B").models[0].phases[0]
    more = plan_of("Qwen2.5-1.5B", budget={"context_gib": 0.6}).models[0].phases[0]
    assert more.total_bytes - plain.total_bytes == int(0.6 * GIB) - int(0.35 * GIB)
    card = dataclasses.replace(GPU, card_bytes=6 * GIB, card_name="Card")
    assert plan_of("Qwen2.5-1.5B", machine=card).notes == ()
    (note,) = plan_of("Qwen2.5-1.5B", machine=card, budget={"reserve_gib": 1.5}).notes
    assert "6.50 GiB" in note
    assert "Card has 6.00" in note


def test_a_card_smaller_than_the_budget_is_the_limit_and_is_named():
    card = dataclasses.replace(GPU, card_bytes=4 * GIB, card_name="Card")
    wide = plan_of("Qwen2.5-1.5B", workload=dataclasses.replace(WORKLOAD, longest_prompt_tokens=1000))
    plan = plan_of("Qwen2.5-1.5B", workload=dataclasses.replace(WORKLOAD, longest_prompt_tokens=1000), machine=card)
    assert wide.models[0].phases[1].total_bytes > 4 * GIB
    assert plan.fits
    assert {phase.limit_bytes for phase in plan.models[0].phases} == {4 * GIB}
    assert "a GPU, of which 4.00 GiB, all that Card has, may be used" in text(plan)
    (note,) = plan.notes
    assert "budget.vram_gib = 5.00 GiB is more than Card has (4.00)" in note
    with pytest.raises(DoesNotFitError, match=r"Card has 4\.00 in all, 1\.\d\d GiB too much"):
        check_fits(plan_of(QWEN_7B, machine=card, model={"rung": "nf4"}))
    assert "all that" not in text(plan_of("Qwen2.5-1.5B", machine=dataclasses.replace(card, card_bytes=6 * GIB)))


def test_only_a_card_that_torch_runs_on_limits_a_plan(monkeypatch):
    monkeypatch.setattr("agentlab.hardware.monitor._nvml", Nvml)
    for device, found in (("cuda", (6 * GIB, "Card A", (8, 9))), ("cpu", (None, None, None))):
        monkeypatch.setattr("agentlab.hardware.monitor.accelerator", lambda device=device: device)
        here = planning.machine("auto")
        assert here.device == device
        for one in (here, planning.machine("cuda")):
            assert (one.card_bytes, one.card_name, one.capability) == found


def test_a_gpu_that_the_driver_does_not_show_is_planned_for_where_torch_knows_it(monkeypatch):
    monkeypatch.setattr("agentlab.hardware.monitor._nvml", lambda: None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
    here = planning.machine("auto")
    assert (here.device, here.card_bytes) == ("cuda", None)


def test_the_least_efficiency_is_the_settings():
    def low(share):
        notes = plan_of("Qwen2.5-0.5B", budget={"memory_efficiency": share}).models[0].notes
        return [note for note in notes if "memory_efficiency" in note]

    assert not low(0.5)
    assert len(low(0.99)) == 1


def test_on_a_cpu_the_limit_is_a_share_of_the_ram():
    machine = Machine("cpu", 8 * GIB)
    plan = plan_of("Qwen2.5-1.5B", machine=machine)
    assert not plan.fits
    assert plan.models[0].rung == "fp32"
    assert plan.models[0].phases[0].limit_bytes == int(0.8 * 8 * GIB)
    assert plan.models[0].estimate.assumed == CPU.name
    assert plan_of("SmolLM2-135M", machine=machine).fits
    assert plan_of("Qwen2.5-1.5B", machine=Machine("cpu", 32 * GIB)).fits
    assert not plan_of("Qwen2.5-1.5B", machine=Machine("cpu", 32 * GIB), budget={"ram_fraction": 0.2}).fits


# -- refusal ------------------------------------------------------------------------------------------------------


def test_what_fits_is_not_refused():
    check_fits(plan_of("Qwen2.5-1.5B"))
    check_fits(plan_of("SmolLM2-135M", machine=Machine("cpu", 8 * GIB), rungs=[FP32]))


def test_a_refusal_is_one_sentence_with_numbers_and_the_remedy():
    with pytest.raises(DoesNotFitError) as caught:
        check_fits(plan_of(QWEN_7B, model={"rung": "nf4"}))
    message = str(caught.value)
    assert "\n" not in message
    for part in (QWEN_7B, "nf4", "weights: 5.17", "budget.vram_gib allows 5.00", "too much", "Ollama", "Qwen3-4B"):
        assert part in message
    assert "embedding" not in message
    with pytest.raises(DoesNotFitError, match=r"at fp32: .*budget\.ram_fraction.*GiB too much; what would fit: .*Qwen"):
        check_fits(plan_of(QWEN_7B, machine=Machine("cpu", 24 * GIB)))


def test_a_refusal_advises_only_what_is_loaded():
    with pytest.raises(DoesNotFitError) as caught:
        check_fits(plan_of(QWEN_7B, rungs=[BF16]))
    remedy = str(caught.value).partition("what would fit: ")[2]
    assert "Qwen3-1.7B at bf16" in remedy
    for other in ("int8", "nf4", "hqq3", "embedding"):
        assert other not in remedy


def test_a_quantized_file_counts_as_it_is_stored():
    shape = dataclasses.replace(published("Qwen2.5-3B"), prequantized="bitsandbytes")
    model = Model("primary", "local", shape, "from its files", weight_bytes=2 * GIB)
    (found,) = make_plan(settings_of(), [model], GPU, WORKLOAD).models
    assert found.rung == "as stored (bitsandbytes)"
    assert dict(found.phases[0].lines)["weights"] == 2 * GIB
    assert found.fits


def test_the_plan_as_json_adds_up():
    values = json.loads(json.dumps(plan_of(QWEN_7B, model={"rung": "nf4"}).as_dict()))
    assert values["fits"] is False
    for phase in values["models"][0]["phases"]:
        assert sum(phase["lines_bytes"].values()) == phase["total_bytes"]
        assert phase["over_bytes"] == phase["total_bytes"] - phase["limit_bytes"]
        assert phase["fits"] is False


def test_estimates_grow_with_the_work():
    few = plan_of("Qwen2.5-1.5B", training={"tokens": 1000}).models[0].estimate
    many = plan_of("Qwen2.5-1.5B", training={"tokens": 4000}).models[0].estimate
    assert many.train_minutes == pytest.approx(4 * few.train_minutes)
    long = dataclasses.replace(WORKLOAD, longest_prompt_tokens=8000)  # few of them fit at once
    shrunk = plan_of("Qwen2.5-1.5B", workload=long, evaluation={"batch_size": 64}, model={"rung": "bf16"}).models[0]
    batch = shrunk.phases[1].chosen["batch_size"]
    same = plan_of("Qwen2.5-1.5B", workload=long, evaluation={"batch_size": batch}, model={"rung": "bf16"}).models[0]
    assert batch < 64
    assert shrunk.estimate.evaluate_minutes == same.estimate.evaluate_minutes
    pool = plan_of("Qwen2.5-1.5B", population={"pool": 2}).models[0].estimate
    assert pool.disk_mib < few.disk_mib
    for size, continued in ((2, False), (3, True)):  # an only child continues nobody
        kept, none = (
            plan_of("Qwen2.5-1.5B", population={"size": size}, training={"average": share}).models[0].estimate.disk_mib
            for share in (0.5, 0)
        )
        assert (kept > none) is continued
    even = plan_of("Qwen2.5-1.5B", training={"tokens": 1000, "focus": 0}).models[0].estimate
    assert 1.2 * even.train_minutes < few.train_minutes < 1.7 * even.train_minutes  # what is looked at is paid for
    short = plan_of("Qwen2.5-1.5B", population={"generations": 1}, training={"tokens": 1000}).models[0].estimate
    assert short.train_minutes > even.train_minutes  # founders that nobody follows are trained in full
    slow = plan_of("Qwen2.5-1.5B", model={"rung": "bf16"}).models[0].estimate
    fast = plan_of("Qwen2.5-1.5B", model={"rung": "nf4"}).models[0].estimate
    assert fast.tokens_in_target > 2 * slow.tokens_in_target
