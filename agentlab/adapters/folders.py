"""Whole folders written atomically: a reader finds the finished folder or none of it."""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from agentlab.errors import AdapterError
from agentlab.files import disk_errors, sync_folder

_TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place when the block ends without an error.

    Every file in it is fsynced before the rename. A `target` that exists is replaced if `replace` says so.
    Raises AdapterError where something is in the way, StorageError on a full disk or a missing permission.
    """
    if not replace:
        refuse_existing(target)
    elif target.exists() and not target.is_dir():
        raise AdapterError(
            f"cannot write an adapter to {target}: a file of that name is in the way; delete or rename it"
        )
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = _beside(target)
        draft.mkdir()
        try:
            yield draft
            _sync_tree(draft)
            _move(draft, target, replace)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        sync_folder(target.parent)


def refuse_existing(target: Path) -> None:
    """Raise AdapterError if anything but an empty folder is at `target`."""
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise AdapterError(f"{target} exists and is not overwritten; choose another folder or delete it first")


def sweep(folder: Path) -> None:
    """Delete the temporary folders in `folder` whose writers are dead; those of living processes stay."""
    for path in sorted(folder.glob(".*.tmp")):
        match = _TEMPORARY.fullmatch(path.name)
        if match and path.is_dir() and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _move(draft: Path, target: Path, replace: bool) -> None:
    if replace and target.exists():
        # Python cannot exchange two folders: a kill between these renames leaves no target, and its owner redoes it.
        old = _beside(target)
        os.rename(target, old)
        os.rename(draft, target)
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        os.rename(draft, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise AdapterError(f"{target} appeared while it was being written; choose another folder") from None
        raise


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
