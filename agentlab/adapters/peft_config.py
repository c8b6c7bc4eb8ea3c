"""What of a PEFT `adapter_config.json` is understood, and the refusal of everything else."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentlab.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 1024
_MAX_CONFIG_BYTES = 1 << 20

# Keys that change what the factors mean, with the only values under which delta = B·A·alpha/rank is the whole truth.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "velora_config": (None, {}),
}
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base weights when they start: their factors alone are not all.
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LoraShape:
    """The settings of a plain LoRA. `target_modules` is None where the config narrows modules by other means."""

    rank: int
    alpha: float
    dropout: float
    target_modules: list[str] | None
    base_model: str


def read(folder: Path) -> LoraShape:
    """The validated settings in `folder`; raises AdapterError with one sentence for anything but a plain LoRA."""
    path = folder / CONFIG_FILE
    values = _json(path)
    _refuse_unlike_lora(values, path)
    rank = _checked(values, path, "r", f"a whole number from 1 to {MAX_RANK}", _is_rank)
    alpha = _checked(values, path, "lora_alpha", "a number above 0", lambda value: _is_number(value) and value > 0)
    dropout = _checked(values, path, "lora_dropout", "0 up to 1", lambda value: _is_number(value) and 0 <= value < 1)
    base = values.get("base_model_name_or_path")
    if base is not None and not (isinstance(base, str) and len(base) <= 4096 and base.isprintable()):
        raise AdapterError(f"{path}: base_model_name_or_path is no plain text; allowed: a model name or null")
    return LoraShape(rank, float(alpha), float(dropout), _targets(values, path), base or "")


def write(folder: Path, shape: LoraShape) -> None:
    """Write `shape` as a config that PEFT, vLLM and transformers read; the same shape gives the same bytes."""
    alpha = int(shape.alpha) if shape.alpha.is_integer() else shape.alpha  # other readers declare it as an integer
    values: dict[str, Any] = {
        "alpha_pattern": {},
        "base_model_name_or_path": shape.base_model or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": shape.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": shape.rank,
        "rank_pattern": {},
        "target_modules": sorted(shape.target_modules or []),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise AdapterError(f"{path} is larger than 1 MiB and no adapter config; restore the adapter from a copy")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(f"no adapter at {path.parent}: {CONFIG_FILE} is missing") from None
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged ({error}); restore the adapter from a copy") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path} is damaged (no mapping); restore the adapter from a copy")
    return values


def _refuse_unlike_lora(values: dict[str, Any], path: Path) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{path}: peft_type is {_shown(kind)}; allowed: LORA")
    for key, allowed in _PLAIN.items():
        value = values.get(key)
        if not any(type(value) is type(plain) and value == plain for plain in allowed):
            raise AdapterError(
                f"{path}: {key} is {_shown(value)}, with which adapters cannot be merged correctly; "
                f"allowed: {_shown(allowed[-1])}"
            )
    start = values.get("init_lora_weights")
    if not (start is None or isinstance(start, bool | str)) or start not in _PLAIN_INITS:
        raise AdapterError(f"{path}: init_lora_weights is {_shown(start)}, which changes the base model; allowed: true")
    mapping = values.get("auto_mapping")
    if mapping is not None:
        library = mapping.get("parent_library") if isinstance(mapping, dict) else None
        # PEFT's auto classes import this module by name.
        if not (isinstance(library, str) and re.fullmatch(r"transformers(\.\w+)*", library)):
            raise AdapterError(f"{path}: auto_mapping would import {_shown(library)}; allowed: null or transformers")


def _targets(values: dict[str, Any], path: Path) -> list[str] | None:
    narrowed = any(values.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    targets = values.get("target_modules")
    if isinstance(targets, str) and targets:
        return None  # a regular expression; not run, because the weights' own names say the same
    good = isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    if not good or not all(re.fullmatch(r"\w+([.-]\w+)*", name) for name in targets or []):
        raise AdapterError(f"{path}: target_modules is {_shown(targets)}; allowed: a list of module names")
    return None if narrowed else sorted(set(targets or []))


def _checked(values: dict[str, Any], path: Path, key: str, allowed: str, good: Any) -> Any:
    value = values.get(key, 0.0 if key == "lora_dropout" else None)
    if not good(value):
        raise AdapterError(f"{path}: {key} is {_shown(value)}; allowed: {allowed}")
    return value


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) < 1 << 53  # larger ones overflow or lose digits as a float
    return type(value) is float and math.isfinite(value)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, int) or abs(value) < 1 << 53 else "a huge number"
    return text if len(text) <= 80 else text[:77] + "..."
