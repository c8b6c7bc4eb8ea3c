"""Shapes: what is read from a config.json, and the sentence for what cannot be planned."""

import dataclasses
import json
import struct

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, Starcoder2Config

from agentlab.errors import ModelError
from agentlab.hardware.ledger import kv_cache_bytes, stored_weight_bytes
from agentlab.hardware.shape import FAMILIES, PUBLISHED, ModelShape, ShapeError, published, published_names

LEAST = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip


def test_what_is_not_written_has_its_default():
    shape = ModelShape.from_config(LEAST)
    assert (shape.head_dim, shape.kv_heads, shape.tied, shape.qkv_bias, shape.window) == (16, 4, False, False, None)
    assert shape.exact
    assert not ModelShape.from_config(LEAST | {"model_type": "gemma9"}).exact
    for odd in ({"text_config": "x"}, {"text_config": [1]}, {"model_type": ["llama"]}, {"model_type": None}):
        with pytest.raises(ShapeError, match="is no model's config"):
            ModelShape.from_config(LEAST | odd)
    seeing = {"model_type": "seer", "vision_config": {}, "text_config": LEAST}
    assert ModelShape.from_config(seeing) == shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 8}, "mixture of experts"),
        ({"hidden_size": None}, "cannot be planned"),
        ({"vocab_size": "many"}, "many"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(change, words):
    with pytest.raises(ShapeError, match=words):
        ModelShape.from_config(LEAST | change, "some/model")


# As their makers published them: what is the default of the family's config class is left out.
GEMMA_2 = {
    "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000, "sliding_window": 4096,
    "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "transformers_version": "4.42.4",
}  # fmt: skip
GEMMA_3 = {
    "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512,
    "sliding_window_pattern": 6, "max_position_embeddings": 32768,
}  # fmt: skip
GEMMA_3_SEEING = {
    "model_type": "gemma3", "vision_config": {}, "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
}  # fmt: skip
STARCODER = {
    "model_type": "starcoder2", "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
    "num_attention_heads": 24, "num_key_value_heads": 2, "vocab_size": 49152, "sliding_window": 4096,
    "max_position_embeddings": 16384, "use_bias": True,
}  # fmt: skip


def on_meta(config):
    """The model that transformers makes of a config.json, without weights; its part that writes."""
    values = dict(config)
    whole = CONFIG_MAPPING[values.pop("model_type")](**values)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(whole.get_text_config())


@pytest.mark.parametrize("config", [GEMMA_2, GEMMA_3, GEMMA_3_SEEING], ids=["gemma-2-2b", "gemma-3-1b", "gemma-3-4b"])
def test_what_a_config_leaves_out_is_what_transformers_takes(config):
    shape, model = ModelShape.from_config(config), on_meta(config)
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=2e-4)  # norms differ
    assert shape.tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (
        model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim
    )  # fmt: skip
    assert (shape.window, shape.windowed_layers) == (
        model.config.sliding_window, model.config.layer_types.count("sliding_attention")
    )  # fmt: skip
    assert shape.window == config.get("text_config", config)["sliding_window"]


@pytest.mark.parametrize(
    ("config", "tokens", "mib"), [(GEMMA_2, 8192, 624), (GEMMA_3, 4096, 27), (GEMMA_3, 32_768, 139)]
)
def test_the_cache_of_a_model_of_which_some_layers_have_windows(config, tokens, mib):
    assert kv_cache_bytes(ModelShape.from_config(config), 1, tokens) / 2**20 == pytest.approx(mib, abs=1)


def test_every_layer_has_a_window_where_transformers_knows_no_kinds_of_layers():
    shape = ModelShape.from_config(STARCODER)
    assert (shape.tied, shape.window, shape.windowed_layers) == (True, 4096, 30)
    cache = DynamicCache(config=Starcoder2Config(**STARCODER))
    assert [layer.is_sliding for layer in cache.layers] == [True] * 30


def test_a_window_that_nobody_knows_the_use_of_saves_nothing():
    shape = ModelShape.from_config(LEAST | {"model_type": "gemma9", "sliding_window": 8})
    assert (shape.window, shape.windowed_layers) == (None, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_of_the_families_that_are_known_here_are_transformers(family):
    values = LEAST | {"model_type": family, "head_dim": 16, "sliding_window": None}
    config = CONFIG_MAPPING[family](**{key: value for key, value in values.items() if key != "model_type"})
    here = ModelShape.from_config(values)
    there = ModelShape.from_config(config.to_dict())
    assert here == dataclasses.replace(there, context_length=here.context_length, kv_heads=here.kv_heads)


@pytest.mark.parametrize("name", published_names())
def test_a_published_config_says_all_that_matters(name):
    values = json.loads((PUBLISHED / f"{name}.json").read_text())
    config = CONFIG_MAPPING[values["model_type"]](**{key: values[key] for key in values if key != "model_type"})
    assert ModelShape.from_config(values, name) == ModelShape.from_config(config.to_dict(), name)


@pytest.mark.parametrize("kind", ["mistral3", "seer"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_model_that_sees_says_of_the_whole_holds_for_the_part_that_writes(kind, tied):
    config = {
        "model_type": kind, "quantization_config": {"quant_method": "gptq", "bits": 4}, "tie_word_embeddings": tied,
        "text_config": LEAST | {"model_type": "mistral", "head_dim": 16},
    }  # fmt: skip
    shape = ModelShape.from_config(config)
    assert (shape.prequantized, shape.tied, shape.family) == ("gptq", tied, "mistral")


def test_a_missing_key_is_named():
    with pytest.raises(ModelError, match="'vocab_size' is missing"):
        ModelShape.from_config({key: value for key, value in LEAST.items() if key != "vocab_size"})


def test_a_broken_file_is_one_sentence(tmp_path):
    path = tmp_path / "config.json"
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            ModelShape.read(path)
    with pytest.raises(ModelError, match=r"none\.json cannot be read"):
        ModelShape.read(tmp_path / "none.json")


def test_published_models_are_found_by_hub_id_and_variant():
    assert published("Qwen/Qwen2.5-7B-Instruct").layers == 28
    assert published("qwen2.5-7b").tied is False
    assert published("mistralai/Mistral-7B-Instruct-v0.3") is not None
    assert published("HuggingFaceTB/SmolLM2-135M-Instruct").vocab == 49152
    assert published("org/unknown") is None
    assert len(published_names()) >= 10


def test_stored_sizes_come_from_headers_the_index_or_the_file(tmp_path):
    header = json.dumps({"w": {"dtype": "U8", "shape": [10], "data_offsets": [0, 10]}}).encode()
    shard = struct.pack("<Q", len(header)) + header + bytes(10)
    for number in range(2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(shard)
    assert stored_weight_bytes(tmp_path) == 20
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 999}}))
    assert stored_weight_bytes(tmp_path) == 999
    (tmp_path / "x.gguf").write_bytes(bytes(123))
    assert stored_weight_bytes(tmp_path / "x.gguf") == 123
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-1.safetensors").write_bytes(struct.pack("<Q", 10**6))
    with pytest.raises(ModelError, match="damaged"):
        stored_weight_bytes(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no safetensors"):
        stored_weight_bytes(tmp_path / "empty")
