"""A small valid suite on disk, to be broken in one place by each test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

SPLITS = ("train", "fitness", "gate", "test")


def write_folder(folder: Path, config: dict[str, Any], splits: dict[str, list[Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for name, lines in splits.items():
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def small_splits(answer: Callable[[int], Any], **extra: Any) -> dict[str, list[Any]]:
    """Three items in each split with prompts and ids that differ."""
    return {
        split: [
            {"id": f"{split}-{n}", "prompt": f"{split} question {n}", "answer": answer(n), **extra} for n in range(3)
        ]
        for split in SPLITS
    }
