import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from agentlab.adapters import Lora, delta, load, save
from agentlab.errors import AdapterError

from .helpers import TOKENS, random_lora


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(random_lora(1), tmp_path / "a")
    return tmp_path / "a"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_keeps_everything(folder: Path) -> None:
    lora, back = random_lora(1), load(folder)
    assert (back.rank, back.alpha, back.dropout, back.base_model) == (4, 8.0, 0.1, "tiny")
    assert back.target_modules == ["down_proj", "k_proj", "q_proj"]
    assert back.scaling == 2.0
    for name, (a, b) in lora.modules.items():
        assert torch.equal(back.modules[name][0], a)
        assert torch.equal(back.modules[name][1], b)


def test_same_adapter_gives_same_bytes(tmp_path: Path) -> None:
    one = random_lora(1)
    other = Lora(dict(reversed(one.modules.items())), 4, 8.0, 0.1, ["q_proj", "k_proj", "down_proj"], "tiny")
    save(one, tmp_path / "one")
    save(other, tmp_path / "other")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_save_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    save(random_lora(1), tmp_path / "a")
    save(random_lora(2), tmp_path / "a")
    assert torch.equal(
        load(tmp_path / "a").modules["model.layers.0.mlp.down_proj"][0],
        random_lora(2).modules["model.layers.0.mlp.down_proj"][0],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_peft_reads_what_is_saved(folder: Path, llama: LlamaForCausalLM) -> None:
    lora = random_lora(1)
    expected = copy.deepcopy(llama)
    with torch.no_grad():
        for name in lora.modules:
            expected.get_submodule(name).weight += delta(lora, name)
        wanted = expected(TOKENS).logits
        base = llama(TOKENS).logits
        found = PeftModel.from_pretrained(copy.deepcopy(llama), str(folder)).eval()(TOKENS).logits
    assert (wanted - base).abs().max() > 0.01
    assert torch.allclose(found, wanted, atol=1e-5)


def test_reads_what_peft_saves(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    model = get_peft_model(
        copy.deepcopy(llama),
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"], init_lora_weights=False),
    ).eval()
    model.save_pretrained(tmp_path / "peft")
    lora = load(tmp_path / "peft")
    assert (lora.rank, lora.alpha, lora.target_modules) == (3, 5.0, ["o_proj", "q_proj"])
    save(lora, tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(llama), str(tmp_path / "again")).eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_modules_narrowed_by_the_config_become_full_names(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    get_peft_model(copy.deepcopy(llama), config).save_pretrained(tmp_path / "one")
    get_peft_model(
        copy.deepcopy(llama), LoraConfig(r=2, target_modules=r".*1\.self_attn\.q_proj", init_lora_weights=False)
    ).save_pretrained(tmp_path / "regex")
    for name in ("one", "regex"):
        assert load(tmp_path / name).target_modules == ["model.layers.1.self_attn.q_proj"]


REFUSED_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"use_rslora": True}, "use_rslora"),
    ({"use_rslora": 1}, "use_rslora"),
    ({"use_dora": True}, "use_dora"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "bias"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"init_lora_weights": ["x"]}, "init_lora_weights"),
    ({"peft_type": "IA3"}, "peft_type"),
    ({"peft_type": None}, "peft_type"),
    ({"r": 10**9}, "r is"),
    ({"r": 10**5000}, "r is"),
    ({"r": 0}, "r is"),
    ({"r": True}, "r is"),
    ({"r": "4"}, "r is"),
    ({"r": 5}, "allowed for rank 5"),
    ({"lora_alpha": float("nan")}, "lora_alpha"),
    ({"lora_alpha": -1}, "lora_alpha"),
    ({"lora_alpha": 10**400}, "lora_alpha"),
    ({"lora_dropout": 1.0}, "lora_dropout"),
    ({"lora_dropout": [0.1]}, "lora_dropout"),
    ({"target_modules": []}, "target_modules"),
    ({"target_modules": [1]}, "target_modules"),
    ({"target_modules": ["../q_proj"]}, "target_modules"),
    ({"target_modules": ["q_proj"]}, "does not name"),
    ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "auto_mapping"),
    ({"auto_mapping": "os"}, "auto_mapping"),
    ({"base_model_name_or_path": "a\x1b[2Jb"}, "base_model_name_or_path"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED_CONFIGS)
def test_refuses_configs(folder: Path, changes: dict[str, Any], said: str) -> None:
    change_config(folder, **{key: 0 if isinstance(v, int) and v > 10**100 else v for key, v in changes.items()})
    for key, value in changes.items():
        if isinstance(value, int) and value > 10**100:  # json.dumps refuses to write this many digits
            path = folder / "adapter_config.json"
            path.write_text(path.read_text().replace(f'"{key}": 0', f'"{key}": 1' + "0" * 5000))
            said = "adapter_config.json"
    with pytest.raises(AdapterError) as error:
        load(folder)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff", "[" * 100_000, '{"r": 1' + " " * (2 << 20) + "}"])
def test_refuses_what_is_no_config(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load(folder)


def test_refuses_missing_files_and_pickles(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="missing"):
        load(tmp_path / "nowhere")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(AdapterError, match="missing"):
        load(folder)
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(AdapterError, match="pickle"):
        load(folder)


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, str(path))

    return apply


KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
REFUSED_WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "nan": (lambda t: t.update({KEY: t[KEY] * float("nan")}), "NaN"),
    "infinity": (lambda t: t.update({KEY: t[KEY] / 0}), "infinity"),
    "integers": (lambda t: t.update({KEY: t[KEY].long()}), "int64"),
    "half a pair": (lambda t: t.pop(KEY), "only lora_B"),
    "wrong rank": (lambda t: t.update({KEY: t[KEY][:2].clone()}), "allowed for rank 4"),
    "three axes": (lambda t: t.update({KEY: t[KEY][None].clone()}), "allowed for rank 4"),
    "dora": (lambda t: t.update({KEY.replace("lora_A", "lora_magnitude_vector"): torch.ones(3)}), "no factor"),
    "a path": (lambda t: t.update({"base_model.model.../../x.lora_A.weight": torch.ones(4, 3)}), "no factor"),
    "empty": (lambda t: t.clear(), "no LoRA"),
}


@pytest.mark.parametrize("case", REFUSED_WEIGHTS)
def test_refuses_weights(folder: Path, case: str) -> None:
    change, said = REFUSED_WEIGHTS[case]
    with_tensors(change)(folder)
    with pytest.raises(AdapterError) as error:
        load(folder)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_bytes_give_a_sentence_or_a_valid_adapter(folder: Path) -> None:
    """Cut anywhere: refused. Flipped: refused, or (in the payload) other finite numbers, which sha256 finds."""
    path = folder / "adapter_model.safetensors"
    good = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(AdapterError, match="damaged"):
            load(folder)
    generator = torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(good[:8], "little")
    places = torch.cat([torch.arange(0, header, 5), torch.randint(header, len(good), (60,), generator=generator)])
    refused = 0
    for place in places.tolist():
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            load(folder)
        except AdapterError:
            refused += 1
    assert refused > 100


def test_save_refuses_what_load_would(tmp_path: Path) -> None:
    lora = random_lora(1)
    lora.modules["model.layers.0.mlp.down_proj"][0][0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN"):
        save(lora, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(AdapterError, match="in the way"):
        save(random_lora(1), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_half_precision_is_read_as_float32(folder: Path) -> None:
    with_tensors(lambda tensors: tensors.update({name: t.to(torch.bfloat16) for name, t in tensors.items()}))(folder)
    assert {factor.dtype for pair in load(folder).modules.values() for factor in pair} == {torch.float32}


def test_delta_names_the_missing_module(folder: Path) -> None:
    with pytest.raises(AdapterError, match="lm_head"):
        delta(load(folder), "lm_head")


def test_weights_outlive_their_file(folder: Path) -> None:
    lora = load(folder)
    shutil.rmtree(folder)
    assert torch.isfinite(delta(lora, "model.layers.0.mlp.down_proj")).all()
