"""Adapters leaving the project: as a plain PEFT folder, or merged into a plain transformers model folder."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentlab.adapters.card import CARD_FILE, Card, write_card
from agentlab.adapters.folders import new_folder, refuse_existing
from agentlab.adapters.lora import WEIGHTS_FILE, Lora, delta, load
from agentlab.adapters.peft_config import CONFIG_FILE
from agentlab.errors import AdapterError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl"}


def export_adapter(card: Card, folder: Path, out: Path, merged_into: Path | None) -> Path:
    """`out`, written from the adapter in `folder`: a copy with card and README, or the base model with it merged in."""
    refuse_existing(out)
    lora = load(folder)
    if merged_into is not None:
        return merge_into_base(merged_into, lora, out, card)
    with new_folder(out) as draft:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(folder / name, draft / name)
        _write_notes(draft, card, merged=False)
    return out


def merge_into_base(base_folder: Path, lora: Lora, out: Path, card: Card | None = None) -> Path:
    """`out`, a new model folder: the safetensors of `base_folder` with W + B·A·alpha/rank, shard by shard, dtypes kept.

    The other files (config, tokenizer, chat template) are copied. Raises AdapterError if the base is quantized, is not
    in safetensors, or does not have the adapter's modules in its shapes.
    """
    base_folder, out = Path(base_folder), Path(out)
    refuse_existing(out)
    config = _json(base_folder / "config.json")
    if config.get("quantization_config"):
        raise AdapterError(f"{base_folder} is quantized and cannot be merged into; take the unquantized model")
    shards = _shards(base_folder)
    waiting = set(lora.modules)
    with new_folder(out) as draft:
        for shard in shards:
            tensors, metadata = _read_shard(base_folder / shard)
            for module in [module for module in waiting if f"{module}.weight" in tensors]:
                tensors[f"{module}.weight"] = _merged(tensors[f"{module}.weight"], lora, module, base_folder)
                waiting.discard(module)
            _write_shard(draft / shard, tensors, metadata)
            del tensors
        if waiting:
            raise AdapterError(
                f"{base_folder} has no weight for {min(waiting)} and {len(waiting) - 1} more modules of the adapter; "
                "merge into the base model that it was trained on"
            )
        for path in base_folder.iterdir():
            if path.is_file() and path.suffix not in _NOT_COPIED and not (draft / path.name).exists():
                shutil.copyfile(path, draft / path.name)
        if card is not None:
            _write_notes(draft, card, merged=True)
    return out


def _merged(weight: "Tensor", lora: Lora, module: str, base_folder: Path) -> "Tensor":
    import torch

    a, b = lora.modules[module]
    shape = (b.shape[0], a.shape[1])
    if tuple(weight.shape) != shape or not weight.is_floating_point():
        raise AdapterError(
            f"{module} in {base_folder} is {tuple(weight.shape)} {weight.dtype}, the adapter's is {shape}; "
            "merge into the base model that it was trained on"
        )
    return (weight.to(torch.float32) + delta(lora, module)).to(weight.dtype)


def _shards(folder: Path) -> list[str]:
    if (folder / _INDEX).exists():
        names = _json(folder / _INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise AdapterError(f"{folder / _INDEX} is damaged (no weight_map); restore it from a copy")
        shards = sorted(set(names.values()))
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in shards):
            raise AdapterError(f"{folder / _INDEX} names shards outside its folder or not in safetensors")
        return shards
    if (folder / _SINGLE).exists():
        return [_SINGLE]
    raise AdapterError(f"no {_SINGLE} in {folder}; allowed: the folder of a model saved as safetensors")


def _read_shard(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {"format": "pt"}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} is missing or damaged ({error}); restore the base model") from None


def _write_shard(path: Path, tensors: dict[str, "Tensor"], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, str(path), metadata=metadata)
    except SafetensorError as error:  # safetensors hides the OSError of a full disk
        raise StorageError(f"cannot write {path}: {error}; free space or choose another folder") from None
    path.chmod(0o644)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path} is damaged (no mapping); restore it from a copy")
    return values


def _write_notes(folder: Path, card: Card, *, merged: bool) -> None:
    write_card(folder / CARD_FILE, card)
    what = "merged into its base model" if merged else "a LoRA adapter in PEFT's format"
    parents = ", ".join(card.parent_ids) or "none"
    metrics = "".join(f"| {name} | {value:.6g} |\n" for name, value in sorted(card.performance_metrics.items()))
    (folder / "README.md").write_text(
        f"# {card.name}\n\n`{card.adapter_id}`, {what}. Made by agentlab; `{CARD_FILE}` tells the rest.\n\n"
        f"- base model: {card.base_model} (sha256 {card.base_sha256 or 'unknown'})\n"
        f"- rank {card.rank}, alpha {card.alpha:g}, dropout {card.dropout:g}, on {', '.join(card.target_modules)}\n"
        f"- operator: {card.operator}, parents: {parents}, generation {card.generation}\n"
        f"- measured on suite {card.suite}:\n\n| metric | value |\n|---|---|\n{metrics}",
        encoding="utf-8",
    )
