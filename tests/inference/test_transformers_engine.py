"""The transformers engine against the conformance suite, on the tiny model and on the real one."""

import json
import shutil

import pytest
import torch
from conformance import CHAT, EngineConformance
from engine_adapters import random_lora, two_adapters

from agentlab import adapters as adapter_room
from agentlab import models
from agentlab.errors import AdapterError
from agentlab.inference import Request
from agentlab.inference.transformers_engine import TransformersEngine


class TestOnTinyModel(EngineConformance):
    @pytest.fixture(scope="class")
    def engine(self, tiny_model):
        with TransformersEngine(models.resolve(str(tiny_model))) as engine:
            yield engine

    @pytest.fixture(scope="class")
    def adapters(self, engine, tmp_path_factory):
        return two_adapters(engine.model_files.folder, tmp_path_factory.mktemp("adapters"), scale=0.3)

    def test_how_to_sample_is_the_requests_to_say(self, engine, tiny_model, tmp_path):
        """Qwen2.5's files penalize the words of the prompt; an argument that is copied from it would be wrong."""
        shutil.copytree(tiny_model, tmp_path / "model")
        own = {"repetition_penalty": 50.0, "do_sample": True, "temperature": 5.0, "eos_token_id": 2, "pad_token_id": 0}
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(own))
        requests = [Request(CHAT, max_new_tokens=40), Request(CHAT, max_new_tokens=30)]
        with TransformersEngine(models.resolve(str(tmp_path / "model"))) as penalizing:
            found = penalizing.generate(requests)
        assert [one.token_ids for one in found] == [one.token_ids for one in engine.generate(requests)]

    def test_foreign_adapter_is_refused_and_leaves_nothing(self, engine, tmp_path):
        lora = random_lora(engine.model_files.folder, 1)
        name, (a, b) = next(iter(lora.modules.items()))
        lora.modules[name] = (torch.cat([a, a], dim=1), b)
        adapter_room.save(lora, tmp_path / "wide")
        with pytest.raises(AdapterError, match="does not fit"):
            engine.load_adapter("g000-c00", tmp_path / "wide")
        assert engine.adapters() == []

    def test_weights_survive_the_round_trip_through_the_engine(self, engine):
        lora = random_lora(engine.model_files.folder, 5)
        engine.add_adapter("g000-c00", lora)
        back = engine.read_adapter("g000-c00")
        for name, (a, b) in lora.modules.items():
            assert torch.equal(back.modules[name][0], a)
            assert torch.equal(back.modules[name][1], b)

    def test_an_adapter_in_the_weights_answers_as_beside_them_and_leaves_no_trace(self, engine, adapters):
        before = {name: weight.clone() for name, weight in engine.base.state_dict().items()}
        for adapter, folder in adapters.items():
            engine.load_adapter(adapter, folder)
            engine.add_adapter(f"beside-{adapter}", adapter_room.load(folder))
        ids = torch.tensor([engine.encode(engine.render(CHAT))], device=engine.device)
        with torch.inference_mode():
            with engine.using(None):
                plain = engine.model(ids).logits
            for adapter in adapters:
                with engine.using(f"beside-{adapter}"):
                    beside = engine.model(ids).logits
                with engine.using(adapter):
                    inside = engine.model(ids).logits
                torch.testing.assert_close(inside, beside, atol=1e-4, rtol=1e-4)
                assert not torch.allclose(inside, plain, atol=1e-2)
            with engine.using(None):
                assert torch.equal(engine.model(ids).logits, plain)
        with pytest.raises(RuntimeError, match="in the middle"), engine.using(next(iter(adapters))):
            raise RuntimeError("in the middle")
        for adapter in engine.adapters():
            engine.unload_adapter(adapter)
        after = engine.base.state_dict()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())

    def test_an_adapter_on_a_head_that_shares_the_embeddings_weights_changes_the_head_alone(self, engine, tmp_path):
        assert engine.base.lm_head.weight is engine.base.get_input_embeddings().weight
        out, inner = engine.base.lm_head.weight.shape
        draw = torch.Generator().manual_seed(4)
        factors = torch.randn(2, inner, generator=draw), torch.randn(out, 2, generator=draw)
        adapter_room.save(adapter_room.Lora({"lm_head": factors}, 2, 2.0, 0.0, ["lm_head"], ""), tmp_path / "head")
        ids = torch.tensor([engine.encode(engine.render(CHAT))], device=engine.device)
        with torch.inference_mode():
            hidden = engine.base.base_model(ids).last_hidden_state
            plain = engine.base(ids).logits
            engine.load_adapter("g000-c00", tmp_path / "head")
            with engine.using("g000-c00"):
                found = engine.model(ids).logits
        torch.testing.assert_close(found, plain + hidden @ factors[0].T @ factors[1].T, atol=1e-3, rtol=1e-4)

    def test_a_replaced_adapter_answers_as_the_new_one(self, engine, adapters):
        first, second = adapters.values()
        seen = []
        for folder in (first, second, first):
            engine.load_adapter("g000-c00", folder)
            seen.append(engine.generate([Request(CHAT, adapter="g000-c00", max_new_tokens=12)])[0].token_ids)
        assert seen[0] == seen[2] != seen[1]

    def test_out_of_memory_halves_the_batch(self, engine, monkeypatch):
        real, sizes = TransformersEngine._batch, []

        def scarce(self, requests, *rest):
            sizes.append(len(requests))
            if len(requests) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, requests, *rest)

        monkeypatch.setattr(TransformersEngine, "_batch", scarce)
        told = []
        monkeypatch.setattr(engine, "tell", told.append)
        answers = engine.generate([Request(CHAT, max_new_tokens=2)] * 5, batch_size=5)
        assert len(answers) == 5
        assert max(sizes[1:]) <= 2
        (step,) = told
        assert (step.action, step.source, step.target) == ("shrink_batch", "5", "2")
        assert step.reason == "CUDA out of memory"


@pytest.mark.model
class TestOnSmolLM2(EngineConformance):
    @pytest.fixture(scope="class")
    def engine(self, embedded):
        with TransformersEngine(embedded) as engine:
            yield engine

    @pytest.fixture(scope="class")
    def adapters(self, engine, tmp_path_factory):
        return two_adapters(engine.model_files.folder, tmp_path_factory.mktemp("adapters"), scale=0.05)

    def test_it_knows_the_capital_of_france(self, engine):
        question = [{"role": "user", "content": "What is the capital of France?"}]
        assert "Paris" in engine.generate([Request(question, max_new_tokens=12)])[0].text

    def test_logprobs_are_those_of_the_forward_pass(self, engine):
        (completion,) = engine.generate([Request(CHAT, max_new_tokens=5, logprobs=True)])
        prompt = engine.encode(engine.render(CHAT))
        with torch.inference_mode():
            logits = engine.model(torch.tensor([prompt + completion.token_ids], device=engine.device)).logits[0].float()
        expected = torch.log_softmax(logits, -1)
        for index, (token, value) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            assert value == pytest.approx(float(expected[len(prompt) - 1 + index, token]), abs=2e-3)
