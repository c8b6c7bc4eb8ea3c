"""Writing that survives a kill: a file has its old content or its new one, never a part."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentlab.errors import StorageError

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file of that size is more than the file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
}
_NO_PLACE = (errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP)


@contextlib.contextmanager
def disk_errors(path: Path, *, resumes: bool = True) -> Iterator[None]:
    """Turn a full disk, a missing permission or a place where `path` cannot be into a `StorageError` that names it.

    Other errors pass. resumes: whether the command goes on where it stopped when it is given again, which the error
    then says.
    """
    try:
        yield
    except OSError as error:
        reason = _DISK_ERRORS.get(error.errno or 0)
        remedy = "free space or choose another folder"
        place = Path(os.fsdecode(error.filename or path))
        if place.name.startswith(f".{path.name}."):
            place = path  # what a file is called while it is written says nothing to a person
        if error.errno in _NO_PLACE and error.filename and place in (path, *path.parents):  # not what is only read
            reason, remedy = str(error.strerror), "choose another folder"
            if place != path:
                reason, place = f"cannot make the folder {place}: {obstacle(place) or reason}", path
        if reason is None:
            raise
        again = ": it continues where it stopped" if resumes else ""
        raise StorageError(
            f"cannot write {place}: {reason}; {remedy}, then run the same command again{again}"
        ) from error


def obstacle(folder: Path) -> str:
    """Why nothing can be written to a folder, which may be there or be made yet; "" where nothing is known."""
    nearest = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    if not os.path.isdir(nearest):
        return f"{nearest} is no folder"
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"no permission to write in {nearest}"


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically and durably: temporary file, fsync, rename, fsync of the folder."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of `value` as indented JSON; NaN and infinity are refused, because JSON has neither."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; a damaged file is a `StorageError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path} is damaged ({error}); restore it from a copy or, while its step is not finished, delete it to "
            "redo that step"
        ) from error


def parse_yaml(text: str, loader: Any) -> Any:
    """The YAML value in `text`; whatever is wrong with it is a ValueError of one line."""
    import yaml

    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        where = str(error).replace('in "<unicode string>", ', "in ")
        raise ValueError(" ".join(where.split())) from None
    # The constructors of dates, numbers and !!tags let the errors of int(), date(), a failed match, … through.
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"a date, number or tag in it has no meaning ({' '.join(str(error).split())})") from None


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical_digest(value: Any) -> str:
    """Hex sha256 of a JSON value, independent of key order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """({tensor: {"dtype", "shape", "data_offsets"}}, bytes that the whole file should have), read without the data.

    Format: 8 bytes N, little-endian; N bytes of JSON; the tensors. Raises OSError, ValueError for what is no such file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("the header is longer than the file")
        try:
            tensors = dict(json.loads(file.read(length)))
            tensors.pop("__metadata__", None)
            ends = [int(row["data_offsets"][1]) for row in tensors.values()]
        except (TypeError, KeyError, IndexError, AttributeError):
            raise ValueError("the header is not one of safetensors") from None
    return tensors, 8 + length + max(ends, default=0)
