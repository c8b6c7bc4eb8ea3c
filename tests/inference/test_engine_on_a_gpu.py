"""What only a GPU can show of the engine: `make gpu`."""

import gc

import pytest
import torch
from conformance import CHAT, EngineConformance
from engine_adapters import two_adapters
from gpu import ON_A_GPU
from test_rungs import Subset

from agentlab import models
from agentlab.hardware import ledger
from agentlab.hardware.rungs import LADDER, RUNGS
from agentlab.hardware.shape import ModelShape
from agentlab.inference import OutOfMemoryError, Request
from agentlab.inference.transformers_engine import TransformersEngine

pytestmark = ON_A_GPU
MIB = 2**20


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    return two_adapters(tiny_model, tmp_path_factory.mktemp("adapters"), scale=0.3)


class TestInFp32(EngineConformance):
    """The whole suite, where rounding does not blur what answers depend on."""

    @pytest.fixture(scope="class")
    def engine(self, tiny_model):
        with TransformersEngine(models.resolve(str(tiny_model)), rung="fp32") as engine:
            assert engine.device == "cuda"
            yield engine

    @pytest.fixture(scope="class")
    def adapters(self, folders):
        return folders


class OnAGpu(Subset):
    @pytest.fixture(scope="class")
    def engine(self, tiny_model):
        with TransformersEngine(models.resolve(str(tiny_model)), rung=self.rung) as engine:
            assert (engine.device, engine.rung) == ("cuda", self.rung)
            yield engine


class TestInBF16(OnAGpu):
    rung = "bf16"


class TestInInt8(OnAGpu):
    rung = "int8"


class TestInNF4(OnAGpu):
    rung = "nf4"


class TestInHQQ3(OnAGpu):
    rung = "hqq3"


def allocated():
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def chats(rows, characters):
    return [[{"role": "user", "content": chr(97 + row % 26) * characters}] for row in range(rows)]


@pytest.mark.parametrize("rung", [rung.name for rung in LADDER])
def test_a_loaded_base_takes_what_the_ledger_says(larger_model, rung):
    before = allocated()
    with TransformersEngine(models.resolve(str(larger_model)), rung=rung) as engine:
        planned = ledger.weights(ModelShape.read(larger_model / "config.json"), RUNGS[rung]).total
        assert engine.rung_bytes()[rung] == planned
        # the allocator hands out large blocks whole, with up to a MiB that nobody asked for
        assert allocated() - before == pytest.approx(planned, abs=16 * MIB)


def test_each_rung_down_frees_what_it_promised_and_the_way_back_works(larger_model):
    with TransformersEngine(models.resolve(str(larger_model)), rung="bf16") as engine:
        engine.generate([Request(CHAT, max_new_tokens=4)])
        held = allocated()
        for rung in ("int8", "nf4", "hqq3"):
            saved = engine.change_rung(rung)
            assert saved > 0
            assert held - allocated() == pytest.approx(saved, abs=16 * MIB)
            held = allocated()
            assert engine.generate([Request(CHAT, max_new_tokens=4)])[0].completion_tokens
        engine.change_rung("bf16", room_bytes=2**30)
        assert engine.generate([Request(CHAT, max_new_tokens=4)])[0].completion_tokens


@pytest.mark.parametrize("rung", ["bf16", "nf4"])
@pytest.mark.parametrize(("rows", "characters"), [(1, 12_000), (32, 700)])
def test_answers_peak_where_the_ledger_says(larger_model, rung, rows, characters):
    with TransformersEngine(models.resolve(str(larger_model)), rung=rung) as engine:
        engine.generate([Request(CHAT, max_new_tokens=4)])
        before = allocated()
        torch.cuda.reset_peak_memory_stats()
        done = engine.generate([Request(chat, max_new_tokens=8) for chat in chats(rows, characters)], rows)
        peak = torch.cuda.max_memory_allocated()
        tokens = max(completion.prompt_tokens for completion in done) + 8
        assert peak > before + ledger.kv_cache_bytes(engine._shape, rows, tokens)
        assert peak / MIB == pytest.approx(engine.planned_vram_mib(rows, tokens), abs=150)


def test_a_batch_that_the_budget_refuses_becomes_smaller_and_is_answered(larger_model):
    with TransformersEngine(models.resolve(str(larger_model)), 0.5, rung="bf16") as engine:
        torch.cuda.reset_peak_memory_stats()
        done = engine.generate([Request(chat, max_new_tokens=4) for chat in chats(64, 1500)], 64)
        assert [completion.completion_tokens for completion in done] == [4] * 64
        assert torch.cuda.max_memory_reserved() <= 0.5 * 2**30


def test_a_prompt_that_the_budget_refuses_is_an_error_that_leaves_the_engine_usable(larger_model):
    with TransformersEngine(models.resolve(str(larger_model)), 0.3, rung="bf16") as engine:
        with pytest.raises(OutOfMemoryError):
            engine.generate([Request(chats(1, 16_000)[0], max_new_tokens=4)])
        assert engine.generate([Request(CHAT, max_new_tokens=4)])[0].completion_tokens == 4


def test_a_model_that_the_budget_refuses_leaves_nothing_behind(larger_model):
    before = allocated()
    with pytest.raises(OutOfMemoryError, match="does not fit into memory"):
        TransformersEngine(models.resolve(str(larger_model)), 0.1, rung="bf16")
    assert allocated() == before


def test_idle_adapters_free_their_memory_and_come_back(tiny_model, folders):
    with TransformersEngine(models.resolve(str(tiny_model)), rung="bf16") as engine:
        for adapter, folder in folders.items():
            engine.load_adapter(adapter, folder)
        asked = [Request(CHAT, adapter=adapter, max_new_tokens=8) for adapter in folders]
        before = [engine.generate([request])[0].token_ids for request in asked]
        held = allocated()
        assert engine.offload_adapters() > 0
        assert allocated() < held
        assert [engine.generate([request])[0].token_ids for request in asked] == before
