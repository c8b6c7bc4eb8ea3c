"""Shapes: what is read from a config.json, and the sentence for what cannot be planned."""

import json
import struct

import pytest

from agentlab.errors import ModelError
from agentlab.hardware.ledger import stored_weight_bytes
from agentlab.hardware.shape import ModelShape, ShapeError, published, published_names

LEAST = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip


def test_what_is_not_written_has_its_default():
    shape = ModelShape.from_config(LEAST)
    assert (shape.head_dim, shape.kv_heads, shape.tied, shape.qkv_bias, shape.window) == (16, 4, False, False, None)
    assert shape.exact
    assert not ModelShape.from_config(LEAST | {"model_type": "gemma9"}).exact
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
