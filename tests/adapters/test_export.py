import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from agentlab.adapters import Pool, delta, load, merge_into_base, save
from agentlab.errors import AdapterError

from .helpers import TOKENS, card, random_lora


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    pool = Pool(tmp_path / "adapters")
    save(random_lora(1), pool.path("g000-c00"))
    pool.add(card("g000-c00"))
    return pool


def test_merging_equals_merge_and_unload(tmp_path: Path, llama: LlamaForCausalLM, llama_folder: Path) -> None:
    lora = random_lora(1)
    save(lora, tmp_path / "a")
    peft = PeftModel.from_pretrained(copy.deepcopy(llama), str(tmp_path / "a")).eval().merge_and_unload()
    merge_into_base(llama_folder, lora, tmp_path / "merged")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for name, value in peft.state_dict().items():
        assert torch.allclose(found.state_dict()[name], value, atol=1e-6), name
    with torch.no_grad():
        assert torch.allclose(found(TOKENS).logits, peft(TOKENS).logits, atol=1e-5)
        assert not torch.allclose(found(TOKENS).logits, llama(TOKENS).logits, atol=1e-3)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in llama_folder.iterdir()}


def test_shards_and_dtypes_are_kept(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    base = tmp_path / "base"
    copy.deepcopy(llama).to(torch.bfloat16).save_pretrained(base, max_shard_size="20KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 1
    (base / "old.bin").write_bytes(b"pickle")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    lora = random_lora(1)
    merge_into_base(base, lora, tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    assert not (tmp_path / "merged" / "old.bin").exists()
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
    found: dict[str, torch.Tensor] = {}
    for shard in shards:
        found |= load_file(tmp_path / "merged" / shard)
    for name, value in copy.deepcopy(llama).to(torch.bfloat16).state_dict().items():
        module = name.removesuffix(".weight")
        wanted = (value.float() + delta(lora, module)).bfloat16() if module in lora.modules else value
        assert torch.equal(found[name], wanted), name
    LlamaForCausalLM.from_pretrained(tmp_path / "merged")


def test_refuses_a_base_that_does_not_fit(tmp_path: Path, llama_folder: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match="was trained on"):
        merge_into_base(llama_folder, random_lora(1, shapes={"model.layers.9.mlp.down_proj": (32, 48)}), out)
    with pytest.raises(AdapterError, match="was trained on"):
        merge_into_base(llama_folder, random_lora(1, shapes={"model.layers.0.mlp.down_proj": (32, 47)}), out)
    with pytest.raises(AdapterError, match="cannot read"):
        merge_into_base(tmp_path / "nowhere", random_lora(1), out)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"no model\.safetensors"):
        merge_into_base(base, random_lora(1), out)
    (base / "model.safetensors").write_bytes((llama_folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(AdapterError, match="damaged"):
        merge_into_base(base, random_lora(1), out)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(AdapterError, match="outside"):
        merge_into_base(base, random_lora(1), out)
    (base / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(AdapterError, match="quantized"):
        merge_into_base(base, random_lora(1), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_export_is_a_plain_peft_folder(pool: Pool, tmp_path: Path, llama: LlamaForCausalLM) -> None:
    out = pool.export("g000-c00", tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
    ]
    assert "g000-c00" in (out / "README.md").read_text()
    model = PeftModel.from_pretrained(copy.deepcopy(llama), str(out))
    twin = load(out)
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    assert torch.allclose(layer.get_delta_weight("default"), delta(twin, name), atol=1e-6)


def test_export_merged(pool: Pool, tmp_path: Path, llama_folder: Path) -> None:
    out = pool.export("g000-c00", tmp_path / "out", merged_into=llama_folder)
    assert LlamaForCausalLM.from_pretrained(out).config.hidden_size == 32
    assert "merged" in (out / "README.md").read_text()


def test_export_overwrites_nothing(pool: Pool, tmp_path: Path, llama_folder: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pool.export("g000-c00", out)  # an empty folder is welcome
    (tmp_path / "file").write_text("mine")
    for taken in (out, tmp_path / "file"):
        for merged_into in (None, llama_folder):
            with pytest.raises(AdapterError, match="not overwritten"):
                pool.export("g000-c00", taken, merged_into)
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list(out.iterdir())) == 4
