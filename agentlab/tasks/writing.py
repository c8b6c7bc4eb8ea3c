"""Writing a suite's folder: complete or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from agentlab.errors import StorageError, SuiteError
from agentlab.files import disk_errors, sync_folder, write_json, write_text


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """Refuse an `out` that exists; inside, every error of the file system is a `StorageError` that names `out`."""
    try:
        if out.exists():
            raise SuiteError(f"{out} already exists; choose another folder or delete it first")
        with disk_errors(out, resumes=False):
            yield
    except OSError as error:
        nearest = next(parent for parent in out.absolute().parents if os.path.exists(parent))
        reason = (error.strerror or str(error)) if nearest.is_dir() else f"{nearest} is no folder"
        raise StorageError(
            f"cannot make the folder {out}: {reason}; choose a place where folders can be made"
        ) from None


def write_suite(
    config: Mapping[str, Any],
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    out: Path,
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Write suite.yaml, one JSONL file per split and, if given, made-from.json into the new folder `out`.

    Raises SuiteError if `out` exists; StorageError if it cannot be written.
    """
    with new_folder(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
        try:
            write_text(building / "suite.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
            for name, lines in splits.items():
                text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
                write_text(building / f"{name}.jsonl", text)
            if made_from is not None:
                write_json(building / "made-from.json", made_from)
            building.chmod(0o755)
            try:
                os.rename(building, out)
            except FileExistsError:
                raise SuiteError(f"{out} already exists; choose another folder or delete it first") from None
            sync_folder(out.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def export_built_in(name: str, out: Path) -> None:
    """Write a built-in suite into the new folder `out`, to read or to change it. Raises SuiteError."""
    from agentlab.tasks.builtin import BUILT_IN, content

    if name not in BUILT_IN:
        raise SuiteError(f"no built-in suite {name}; allowed: {', '.join(BUILT_IN)}")
    config, splits = content(name)
    write_suite(config, splits, out)
