"""What a resident model registers with the monitor, and what the planner's bytes are for it."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from nvml_standin import Nvml
from peft import LoraConfig

from agentlab import models
from agentlab.adapters import Lora, save
from agentlab.config import BudgetSettings
from agentlab.hardware import watch
from agentlab.hardware.ledger import adapter_bytes, kv_cache_bytes, sum_bytes
from agentlab.hardware.recovery import CALM_ANSWERS, Action, free_bytes, may_undo
from agentlab.hardware.shape import ModelShape
from agentlab.hardware.threads import limit_threads
from agentlab.hardware.watch import OWNERS
from agentlab.inference import Request, accounting
from agentlab.inference.accounting import account_for_child
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.inference.vllm_settings import ModelSizes, VllmSettings


class Process(SimpleNamespace):
    """What is asked of an engine in a process of its own; there is no vLLM for a GPU here."""

    __hash__ = object.__hash__


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch):
    """Models that other tests left open do not count."""
    monkeypatch.setattr(accounting, "_models", weakref.WeakSet())
    monkeypatch.setattr(accounting, "_children", weakref.WeakSet())


@pytest.fixture
def engine(tiny_model):
    with TransformersEngine(models.resolve(str(tiny_model))) as opened:
        yield opened


def test_base_and_adapters_are_accounted_for_until_the_model_is_closed(engine):
    before = OWNERS.holdings()
    engine.new_adapter("g000-c00", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    after = OWNERS.holdings()
    weights = sum(p.numel() * p.element_size() for n, p in engine.base.named_parameters() if "lora_" not in n)
    assert before["adapters"].held_mib == 0
    assert after["base"].held_mib == before["base"].held_mib == pytest.approx(weights / 2**20)
    assert after["adapters"].held_mib == pytest.approx(2 * 4 * (32 + 32) * 4 / 2**20)
    engine.unload_adapter("g000-c00")
    assert OWNERS.holdings()["adapters"].held_mib == 0
    engine.close()
    assert not {"base", "adapters"} & set(OWNERS.holdings())


def test_two_models_count_both_and_closing_one_leaves_the_other(engine, tiny_model):
    one = OWNERS.holdings()["base"].held_mib
    with TransformersEngine(models.resolve(str(tiny_model))):
        assert OWNERS.holdings()["base"].held_mib == pytest.approx(2 * one)
    assert OWNERS.holdings()["base"].held_mib == one


def test_an_adapter_that_answers_from_the_weights_costs_its_factors_and_the_sums(engine, tiny_model, tmp_path):
    modules = ["q_proj", "down_proj"]
    generator = torch.Generator().manual_seed(1)
    named = {name: m for name, m in engine.base.named_modules() if name.endswith(tuple(modules))}
    factors = {
        name: (torch.randn(4, m.in_features, generator=generator), torch.randn(m.out_features, 4, generator=generator))
        for name, m in named.items()
    }
    save(Lora(factors, 4, 8.0, 0.0, modules, ""), tmp_path / "a")
    engine.load_adapter("g000-c00", tmp_path / "a")
    shape = ModelShape.read(tiny_model / "config.json")
    assert engine.adapter_bytes() == adapter_bytes(shape, 4, modules)
    engine.generate([Request([{"role": "user", "content": "hello"}], adapter="g000-c00", max_new_tokens=2)])
    assert engine.adapter_bytes() == adapter_bytes(shape, 4, modules) + sum_bytes(shape, modules)


def test_what_lies_in_ram_is_not_counted_on_the_card_and_the_step_there_can_be_undone(engine, monkeypatch):
    """A model that was moved to the CPU of a machine with a card; nothing of ours is on the card any more."""
    monkeypatch.setattr("agentlab.hardware.monitor.accelerator", lambda: "cuda")
    monkeypatch.setattr(accounting, "_base_mib", lambda model: 5900.0)
    engine.new_adapter("g000-c00", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    found = watch.read(OWNERS.holdings(), nvml=Nvml(used=300 * 2**20))
    assert (found.device, found.owners) == ("cuda", {})
    free = free_bytes(found, BudgetSettings())
    assert free > 4 * 2**30
    assert may_undo(Action("cpu", "large", "large on the CPU", 3 * 2**30), free, CALM_ANSWERS, 0)
    monkeypatch.setattr(engine, "device", "cuda")
    assert {owner: held.held_mib for owner, held in OWNERS.holdings().items() if owner == "base"} == {"base": 5900.0}


def test_planned_memory_is_the_ledgers_on_a_gpu_and_nothing_on_a_cpu(engine, tiny_model):
    assert engine.planned_vram_mib(2, 100) == 0
    weights = sum(p.numel() * p.element_size() for p in engine.base.parameters())
    shape = ModelShape.read(tiny_model / "config.json")
    engine.device = "cuda"
    one, two = engine.planned_vram_mib(1, 100), engine.planned_vram_mib(2, 100)
    assert one * 2**20 > weights + kv_cache_bytes(shape, 1, 100, 4)
    assert two - one > kv_cache_bytes(shape, 1, 100, 4) / 2**20
    engine.device = "cpu"


def test_vllms_process_is_accounted_for_while_it_runs_and_its_cache_raises_no_alarm(tiny_model):
    sizes = ModelSizes(ModelShape.read(tiny_model / "config.json"), 3 * 2**30, 2)
    settings = VllmSettings(kv_cache_memory_bytes=2**30, max_model_len=512, max_loras=2, max_lora_rank=8)
    process = Process(device="cuda", settings=settings, sizes=sizes, is_running=True)
    account_for_child(process)
    held = OWNERS.holdings()
    assert (held["base"].held_mib, held["kv_cache"].held_mib, held["kv_cache"].idle_mib) == (3072, 1024, 1024)
    assert held["adapters"].held_mib == pytest.approx(2 * sizes.slot_bytes(8) / 2**20)
    process.is_running = False
    assert not {"base", "adapters", "kv_cache"} & set(OWNERS.holdings())


def test_threads_are_limited_and_never_raised():
    before = torch.get_num_threads()
    try:
        limit_threads(before + 10)
        assert torch.get_num_threads() == before
        limit_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
