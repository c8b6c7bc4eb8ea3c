"""The ledger's bytes against those of real models, caches and quantized modules."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from agentlab.hardware import ledger
from agentlab.hardware.rungs import BF16, FP32, HQQ3, INT8, NF4
from agentlab.hardware.shape import PUBLISHED, ModelShape, published, published_names

SMALL = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256,
}  # fmt: skip
VARIANTS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biases and untied": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "head_dim": 48},
    "mistral without a window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, windows in the upper layers": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 64, "attention_bias": True},
}  # fmt: skip


def config_of(variant):
    values = SMALL | VARIANTS[variant]
    return AutoConfig.for_model(**values), ModelShape.from_config(values)


def on_meta(config, dtype):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def state_bytes(model):
    """Bytes of what bitsandbytes keeps beside the packed weights, each storage once, without its tables of codes."""
    found = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        parts = [getattr(weight, "SCB", None)]
        if state is not None:
            parts += [state.absmax, state.offset, state.state2.absmax]
        for tensor in parts:
            if tensor is not None:
                found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(found.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rung", "dtype"), [(FP32, torch.float32), (BF16, torch.bfloat16)])
def test_weights_of_every_family_are_exact(variant, rung, dtype):
    config, shape = config_of(variant)
    model = on_meta(config, dtype)
    assert ledger.weights(shape, rung).footprint == model.get_memory_footprint()
    assert shape.parameters == model.num_parameters()


@pytest.mark.parametrize("name", published_names())
def test_published_shapes_are_those_that_transformers_builds(name):
    model = on_meta(AutoConfig.from_pretrained(PUBLISHED / f"{name}.json"), torch.bfloat16)
    assert ledger.weights(published(name), BF16).footprint == model.get_memory_footprint()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [7, 40])
def test_kv_cache_bytes_are_those_of_a_dynamic_cache(variant, tokens):
    config, shape = config_of(variant)
    cache = DynamicCache(config=config)
    for layer in range(shape.layers):
        states = torch.zeros(2, shape.kv_heads, tokens, shape.head_dim, dtype=torch.bfloat16)
        cache.update(states, states, layer)
    measured = sum(
        t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys.clone(), layer.values.clone())
    )
    assert ledger.kv_cache_bytes(shape, 2, tokens) == measured


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    config, _ = config_of("qwen2")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


QUANTIZED = [
    (INT8, BitsAndBytesConfig(load_in_8bit=True)),
    (NF4, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
]


def check_quantized(folder, shape, rung, options):
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=options, dtype=torch.bfloat16, device_map="cpu"
    )
    planned = ledger.weights(shape, rung)
    assert model.get_memory_footprint() == pytest.approx(planned.footprint, rel=0.01)
    assert state_bytes(model) == pytest.approx(planned.quantization_state, rel=0.01)


@pytest.mark.parametrize(("rung", "options"), QUANTIZED, ids=lambda value: getattr(value, "name", ""))
def test_weights_quantized_by_bitsandbytes(small_folder, rung, options):
    check_quantized(small_folder, config_of("qwen2")[1], rung, options)


@pytest.mark.model
@pytest.mark.parametrize(("rung", "options"), QUANTIZED, ids=lambda value: getattr(value, "name", ""))
def test_the_embedded_models_weights_quantized_by_bitsandbytes(embedded, rung, options):
    check_quantized(embedded.folder, ModelShape.read(embedded.folder / "config.json"), rung, options)


@pytest.mark.model
def test_the_embedded_models_weights_and_their_file(embedded):
    shape = ModelShape.read(embedded.folder / "config.json")
    model = AutoModelForCausalLM.from_pretrained(embedded.folder, dtype=torch.float32)
    assert ledger.weights(shape, FP32).footprint == model.get_memory_footprint()
    stored = ledger.stored_weight_bytes(embedded.folder)
    assert stored == sum(p.numel() * p.element_size() for p in model.parameters())
    assert published("SmolLM2-135M-Instruct").parameters == shape.parameters


def check_quantized_by_hqq(folder, shape):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=3, group_size=64, axis=1)
    config["weight_quant_params"]["optimize"] = False  # which takes long and changes no size
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.bfloat16, device="cpu")
    quantized = [module for module in model.modules() if isinstance(module, HQQLinear)]
    assert len(quantized) == 7 * shape.layers
    state = sum(t.numel() * t.element_size() for m in quantized for t in (m.meta["scale"], m.meta["zero"]))
    planned = ledger.weights(shape, HQQ3)
    assert model.get_memory_footprint() == pytest.approx(planned.footprint, rel=0.01)
    assert state == planned.quantization_state


@pytest.mark.model
def test_the_embedded_models_weights_quantized_by_hqq(embedded):
    check_quantized_by_hqq(embedded.folder, ModelShape.read(embedded.folder / "config.json"))


@pytest.mark.soak
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-1.5B"])
def test_random_weights_of_published_shapes_at_every_rung(tmp_path, name):
    config, shape = AutoConfig.from_pretrained(PUBLISHED / f"{name}.json"), published(name)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert ledger.stored_weight_bytes(tmp_path) == 2 * shape.parameters
    for rung, options in QUANTIZED:
        check_quantized(tmp_path, shape, rung, options)
    check_quantized_by_hqq(tmp_path, shape)
