"""A model's shape without loading it: from files, from a GGUF's metadata, from the published config."""

import dataclasses
import json
import struct

import pytest

from agentlab import models
from agentlab.errors import ModelError
from agentlab.hardware.shape import PUBLISHED, published


def same(one, other):
    return dataclasses.replace(one, name="") == dataclasses.replace(other, name="")


def test_the_embedded_model_is_known_before_it_is_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTLAB_HOME", str(tmp_path))
    shape, origin, stored = models.shape_of(models.EMBEDDED)
    assert (origin, stored) == ("from its published config", None)
    assert same(shape, published("SmolLM2-135M"))


def test_a_gguf_files_metadata_are_a_shape():
    path = models._embedded_gguf()
    shape, origin, stored = models.shape_of(str(path))
    assert (origin, stored) == ("from its GGUF file", None)
    assert same(shape, published("SmolLM2-135M"))


def test_what_is_no_gguf_is_one_sentence(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be read"):
        models.shape_of(str(path))


def test_a_well_known_hub_model_needs_not_be_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shape, origin, _ = models.shape_of("Qwen/Qwen2.5-7B-Instruct")
    assert origin == "from its published config"
    assert shape.layers == 28
    with pytest.raises(ModelError, match="agentlab models get org/unknown"):
        models.shape_of("org/unknown")
    with pytest.raises(ModelError, match="unknown model 'nothing'"):
        models.shape_of("nothing")


def test_a_folder_tells_its_own_shape_and_what_is_quantized_in_it(tmp_path):
    values = json.loads((PUBLISHED / "Qwen2.5-0.5B.json").read_text())
    header = json.dumps({"w": {"dtype": "U8", "shape": [10], "data_offsets": [0, 10]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(10))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape, origin, stored = models.shape_of(tmp_path.name, tmp_path.parent)
    assert (origin, stored) == ("from its files", None)
    assert same(shape, published("Qwen2.5-0.5B"))
    (tmp_path / "config.json").write_text(
        json.dumps(values | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    shape, _, stored = models.shape_of(str(tmp_path))
    assert (shape.prequantized, stored) == ("bitsandbytes", 10)
