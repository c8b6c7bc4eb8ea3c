"""What only a GPU can show of vLLM: `make gpu`."""

import pytest
import torch
from conformance import CHAT, TAGS, TOOLS, EngineConformance
from engine_adapters import random_lora, two_adapters
from gpu import ON_A_GPU
from support import write_tiny_model
from test_rungs import Subset

from agentlab import adapters as adapter_room
from agentlab import models
from agentlab.inference import Request, vllm_build
from agentlab.inference.vllm_engine import VllmEngine
from agentlab.toolformat import structure

pytestmark = [*ON_A_GPU, pytest.mark.skipif(vllm_build.build() != "cuda", reason="vLLM is not here for CUDA")]
BUDGET_GIB, CONTEXT_GIB = 2.0, 0.5


class TestOnAGpu(Subset):
    """One engine for all of it, within a small part of the card."""

    # what of the suite rounding in 16 bits does not touch
    test_limit_is_exact_and_named = EngineConformance.test_limit_is_exact_and_named
    test_logprobs_one_per_token_and_negative = EngineConformance.test_logprobs_one_per_token_and_negative
    test_what_it_says_it_can_do = EngineConformance.test_what_it_says_it_can_do_agrees_with_what_it_does
    test_cancelling = EngineConformance.test_cancelling_ends_running_requests_and_leaves_out_the_rest
    test_a_refused_reload = EngineConformance.test_a_reload_that_is_refused_leaves_the_old_one
    test_the_whole_context = EngineConformance.test_prompt_and_answer_may_fill_the_context_and_no_more
    test_required_calls = EngineConformance.test_a_required_call_is_whole_and_fits_its_tool
    test_free_text = EngineConformance.test_free_text_may_be_kept_from_calling
    test_calls_in_free_text = EngineConformance.test_a_call_in_free_text_fits_its_tool
    test_too_small_a_limit = EngineConformance.test_a_limit_too_small_for_a_call_is_refused

    @pytest.fixture(scope="class")
    def engine(self, tmp_path_factory):
        model = models.resolve(str(write_tiny_model(tmp_path_factory.mktemp("vllm-model"), 256, 4)))
        with VllmEngine(model, BUDGET_GIB, rank=8, adapters=2, context_gib=CONTEXT_GIB) as engine:
            assert engine.device == "cuda"
            yield engine

    @pytest.fixture(scope="class")
    def adapters(self, engine, tmp_path_factory):
        return two_adapters(engine.model_files.folder, tmp_path_factory.mktemp("adapters"), scale=0.3)

    def test_more_adapters_than_slots_answer_in_one_batch(self, engine, tmp_path):
        names = [f"g001-c{index:02d}" for index in range(6)]
        for seed, name in enumerate(names):
            adapter_room.save(random_lora(engine.model_files.folder, seed, rank=4, scale=0.3), tmp_path / name)
            engine.load_adapter(name, tmp_path / name)
        engine.pin(names[0])
        mixed = engine.generate([Request(CHAT, adapter=name, max_new_tokens=6) for name in names])
        assert len({tuple(one.token_ids) for one in mixed}) > 3

    def test_it_gives_the_card_back_while_it_sleeps_and_answers_as_before(self, engine, adapters):
        for adapter, folder in adapters.items():
            engine.load_adapter(adapter, folder)
        requests = [Request(CHAT, adapter=name, max_new_tokens=8, reuse_prompt=False) for name in (None, *adapters)]
        before = [engine.generate([request])[0].token_ids for request in requests]
        awake, _ = torch.cuda.mem_get_info()
        engine.sleep()
        asleep, _ = torch.cuda.mem_get_info()
        assert asleep - awake > engine.settings.kv_cache_memory_bytes
        assert engine.wake() is False
        assert [engine.generate([request])[0].token_ids for request in requests] == before

    def test_what_an_evolution_asks_of_it_works(self, engine):
        engine.rehearse()
        assert engine.adapters() == []

    def test_its_allocator_stays_below_the_budget_also_when_a_long_prompt_is_scored(self, engine):
        empty = engine.count_tokens([{"role": "user", "content": ""}])
        chat = [{"role": "user", "content": "x" * (engine.context_length() - 128 - empty)}]
        tag = structure(TOOLS, TAGS, "required")
        (done,) = engine.generate([Request(chat, max_new_tokens=128, structure=tag, logprobs=True)])
        assert len(done.logprobs) == done.completion_tokens
        assert 0 < engine.vram_peak_mib() <= (BUDGET_GIB - CONTEXT_GIB) * 1024
