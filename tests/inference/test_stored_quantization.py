"""Models that are quantized in their files: for real on the CPU kernels of vLLM, and which engine loads them."""

import dataclasses
import importlib.util
import shutil

import pytest
from conformance import CHAT
from engine_adapters import random_lora, two_adapters
from quantized_files import METHODS, write_quantized
from support import has_vllm_for_cpus, write_tiny_experiment, write_tiny_model

from agentlab import adapters as adapter_room
from agentlab import files, models
from agentlab.config import from_mapping
from agentlab.errors import AdapterError, ModelError
from agentlab.hardware.ledger import stored_weight_bytes
from agentlab.inference import Request, open_engine, opening, stored, vllm_build
from agentlab.inference.opening import choose_engine
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.inference.vllm_engine import VllmEngine
from agentlab.inference.vllm_modules import Modules
from agentlab.inference.vllm_settings import VllmSettings
from agentlab.lab import Lab
from agentlab.planning import plan_run

needs_vllm_for_cpus = pytest.mark.skipif(not has_vllm_for_cpus(), reason="vLLM is here for CUDA, not for CPUs")
SMALL = VllmSettings(2**28, max_model_len=512, max_num_seqs=8, max_loras=2, max_cpu_loras=4, max_lora_rank=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """method → (the model at 4 bits, the same with its weights restored)."""
    home = tmp_path_factory.mktemp("quantized")
    model = write_tiny_model(home / "whole", 64, 2)
    return {method: (home / method, write_quantized(model, home / method, method)) for method in METHODS}


def _forced(text, adapter=None):
    """A request whose log-probabilities are those of this very answer."""
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": text}}
    return Request(CHAT, adapter=adapter, max_new_tokens=32, structure=tag, logprobs=True)


def _answers(model, adapters, asked, rung):
    with TransformersEngine(models.resolve(str(model)), rung=rung) as engine:
        for adapter, folder in adapters.items():
            engine.load_adapter(adapter, folder)
        return engine.generate(asked)


def _differences(some, others):
    """Of the log-probabilities of the same tokens, for each answer its largest."""
    return [
        max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
        for one, other in zip(some, others, strict=True)
    ]


@needs_vllm_for_cpus
@pytest.mark.parametrize("method", METHODS)
def test_vllm_answers_from_packed_weights_as_from_restored_ones(folders, tmp_path, method):
    packed, restored = folders[method]
    adapters = two_adapters(restored, tmp_path, scale=0.3)
    asked = [_forced(text, adapter) for adapter in (None, *adapters) for text in ("cabbage", "0123456789 times")]
    expected, rounded = (_answers(restored, adapters, asked, rung) for rung in ("fp32", "bf16"))
    error = 1.5 * max(_differences(rounded, expected))  # what computing in 16 bits may do, as vLLM does
    for other in (expected[2:4], expected[4:]):
        assert max(_differences(expected[:2], other)) > 2 * error  # base and adapters are told apart
    with VllmEngine(models.resolve(str(packed)), settings=SMALL) as engine:
        assert engine.sizes.weight_bytes == stored_weight_bytes(packed)
        assert engine.parameters() == models.shape_of(str(restored))[0].parameters
        alone = engine.generate(asked[:2])
        for adapter, folder in adapters.items():
            engine.load_adapter(adapter, folder)
        # in one batch: the base beside adapters needs one of zeros on a CPU, whose size no packed weights tell
        together = engine.generate(asked)
        assert [one.text for one in together] == [other.text for other in expected]
        assert max(_differences(together, expected)) <= error
        for one, other in zip(engine.generate(asked[:2]), alone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=0.05)
        wide = random_lora(restored, 1)
        name, (a, b) = next(iter(wide.modules.items()))
        wide.modules[name] = (a.repeat(1, 2), b)
        adapter_room.save(wide, tmp_path / "wide")
        with pytest.raises(AdapterError, match=rf"does not fit .*: {name} has shape .*, the model needs \(64, 64\)"):
            engine.load_adapter("g000-c00", tmp_path / "wide")


@pytest.mark.parametrize("method", METHODS)
def test_auto_is_the_engine_that_can_load_it(folders, monkeypatch, method):
    model, settings = models.resolve(str(folders[method][0])), from_mapping({"name": "test"}, "test")
    refused = stored.not_by_transformers(model.folder)
    assert refused or importlib.util.find_spec("gptqmodel") is not None
    monkeypatch.setattr(vllm_build, "device", lambda: "cpu")
    assert choose_engine(settings, model) == ("vllm" if refused else "transformers")
    monkeypatch.setattr(stored, "not_by_transformers", lambda folder: "")
    assert choose_engine(settings, model) == "transformers"  # which learns, too
    monkeypatch.setattr(vllm_build, "device", lambda: None)
    monkeypatch.setattr(stored, "not_by_transformers", lambda folder: "no library")
    assert choose_engine(settings, model) == "transformers"
    with pytest.raises(ModelError, match=r"cannot be loaded here: no library; allowed: model.engine vllm"):
        open_engine(settings, model)


def with_config(tiny_model, folder, quantization):
    """The tiny model in `folder`, said to be quantized."""
    shutil.copytree(tiny_model, folder)
    config = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", config | {"quantization_config": quantization})
    return models.resolve(str(folder))


@pytest.mark.parametrize(
    ("quantization", "method", "reason"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8", "transformers would unpack the whole model"),
        ({"quant_method": "hqq"}, "hqq", "its quantization_config cannot be read"),
        ({"quant_method": "unheard-of"}, "unheard-of", "its quantization_config cannot be read"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes", ""),
    ],
)
def test_what_transformers_would_unpack_or_not_know_is_refused(tiny_model, tmp_path, quantization, method, reason):
    model = with_config(tiny_model, tmp_path / "model", quantization)
    assert stored.stored_quantization(model.folder) == method
    assert models.shape_of(str(model.folder))[0].prequantized == method
    found = stored.not_by_transformers(model.folder)
    assert found.startswith(reason)
    assert bool(found) is bool(reason)
    if reason:
        with pytest.raises(ModelError, match=f"is stored in {method} and cannot be loaded here: {reason}"):
            TransformersEngine(model)


@pytest.mark.parametrize("cuda", [True, False])
def test_a_run_is_answered_by_the_engine_that_can_load_its_model(folders, tiny_model, monkeypatch, cuda):
    settings = from_mapping({"name": "test"}, "test")
    monkeypatch.setattr(vllm_build, "device", lambda: "cuda" if cuda else "cpu")
    monkeypatch.setattr(stored, "not_by_transformers", lambda folder: "no library" if folder != tiny_model else "")
    packed, plain = models.resolve(str(folders["awq"][0])), models.resolve(str(tiny_model))
    assert [opening.engine_of_run(settings, packed, bound) for bound in ("vllm", "transformers", None)] == ["vllm"] * 3
    assert opening.engine_of_run(settings, plain, "vllm") == ("vllm" if cuda else "transformers")
    assert opening.engine_of_run(settings, plain, "transformers") == "transformers"


def test_bitsandbytes_files_are_not_given_to_vllm(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_build, "device", lambda: "cuda")
    model = with_config(tiny_model, tmp_path / "model", {"quant_method": "bitsandbytes"})
    assert choose_engine(from_mapping({"name": "test"}, "test"), model) == "transformers"
    with pytest.raises(
        ModelError, match=r"is stored in bitsandbytes, which vLLM does not load; allowed: .* transformers"
    ):
        VllmEngine(model)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_no_rung_is_asked_of_a_model_that_has_its_own(folders, engine):
    settings = from_mapping({"name": "test", "model": {"rung": "fp32", "engine": engine}}, "test")
    with pytest.raises(ModelError, match=r"is stored in gptq and loaded as it is: rung fp32; allowed: model.rung auto"):
        open_engine(settings, models.resolve(str(folders["gptq"][0])))


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="the library that is missed is there")
def test_an_evolution_of_what_only_answers_here_is_refused_before_it_begins(folders, tmp_path, monkeypatch):
    lab = Lab.open(write_tiny_experiment(tmp_path, folders["awq"][0]))
    with pytest.raises(ModelError, match=r"is stored in awq, and nothing can be learned on it here: .*gptqmodel.*nf4"):
        next(lab.evolve())
    assert lab.run.model() is None
    monkeypatch.setattr(vllm_build, "device", lambda: "cuda")
    small = Lab.open(tmp_path / "experiments" / "tiny.yaml", ["budget.vram_gib=0.51"])
    assert plan_run(small.run, small.suite).models[0].answers_on == "vllm"  # also where it does not fit there
    model = plan_run(lab.run, lab.suite).models[0]
    assert [phase.name for phase in model.phases] == ["serve"]  # there is nothing to train
    (note,) = [text for text in model.notes if "gptqmodel" in text]
    assert "nothing can be learned on it here" in note


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="the library that is missed is there")
def test_so_is_that_of_a_model_whose_sizes_nobody_knows(tiny_model, tmp_path):
    model = with_config(tiny_model, tmp_path / "model", {"quant_method": "awq", "bits": 4, "group_size": 32})
    config = files.read_json(model.folder / "config.json")
    files.write_json(model.folder / "config.json", config | {"num_local_experts": 8})
    lab = Lab.open(write_tiny_experiment(tmp_path, model.folder))
    with pytest.raises(ModelError, match=r"is stored in awq, and nothing can be learned on it here"):
        next(lab.evolve())


def test_packed_modules_of_an_unknown_family_take_no_adapters_on_a_cpu(folders):
    model = models.resolve(str(folders["gptq"][0]))
    shape = models.shape_of(str(model.folder))[0]
    assert Modules(model, shape).without_effect().modules["model.layers.0.mlp.down_proj"][0].shape == (1, 64)
    unknown = Modules(model, dataclasses.replace(shape, family="gemma2"))
    assert unknown.without_effect() is None
    assert unknown.targets == Modules(model, shape).targets
