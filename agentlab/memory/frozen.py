"""A memory that can only be read just now: the state of a file on a full disk, or on one that takes no writes, in RAM.

SQLite cannot even read a file with a log there, because readers, too, note in a file beside it what they read.
"""

import contextlib
import shutil
import sqlite3
import tempfile
from pathlib import Path

from agentlab.errors import MemoryStoreError, StorageError
from agentlab.memory.schema import connect, sqlite_errors, text_of

_PLACES = (None, "/dev/shm")  # the usual folder for what is temporary, and RAM
_TIMES = 3
_UNWRITABLE = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")


def can_be_read(path: Path, error: StorageError) -> bool:
    """Whether what kept the memory from being opened is only that nothing can be written there."""
    name = getattr(error.__cause__, "sqlite_errorname", None) or ""
    return name.startswith(_UNWRITABLE) and path.is_file() and path.stat().st_size > 0


def state_of(path: Path) -> sqlite3.Connection:
    """What the file and its log hold now, as a database in RAM that belongs to nobody else.

    Only for a file that this process has not open (`handles`). Raises StorageError where no folder has room for the
    moment of copying, MemoryStoreError for a damaged file.
    """
    for place in _PLACES:
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix="agentlab-", dir=place) as scratch:
            copy = Path(scratch) / path.name
            _copy(path, copy)
            try:
                with sqlite_errors(path), contextlib.closing(connect(copy, create=False)) as on_disk:
                    on_disk.execute("PRAGMA journal_mode = DELETE")  # RAM knows no log
                    ram = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                    ram.text_factory = text_of
                    on_disk.backup(ram)
                    return ram
            except StorageError:
                continue  # that place is full, too
            except MemoryStoreError as problem:
                raise MemoryStoreError(str(problem).replace(str(copy), str(path))) from None
    raise StorageError(f"cannot read {path}: its disk takes no writes, and there is no room for a copy elsewhere")


def _copy(path: Path, copy: Path) -> None:
    """Copy the file and its log; again where somebody wrote meanwhile."""
    for _ in range(_TIMES):
        before = _marks(path)
        for end in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{end}", f"{copy}{end}")
        if _marks(path) == before:
            return


def _marks(path: Path) -> list[tuple[int, int]]:
    found = []
    for end in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            seen = Path(f"{path}{end}").stat()
            found.append((seen.st_size, seen.st_mtime_ns))
    return found
