"""Which memories this process has open, so that nothing else of it opens and closes their files.

POSIX drops all of a process's locks on a file when the process closes any handle on it, also one that only read. SQLite
minds that for its own handles; ours would let another process believe itself alone and take the log away, with what was
acknowledged since.
"""

import contextlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from agentlab.errors import MemoryStoreError

_lock = threading.RLock()  # of what is below, never held while a file is opened
_open: Counter[tuple[int, int, int]] = Counter()  # (process, device, inode) → how often
_repaired: set[tuple[int, int, int]] = set()
_opening: dict[str, threading.RLock] = {}  # real path → who opens it now


@contextlib.contextmanager
def opening(path: Path) -> Iterator[bool]:
    """Whether the file is open in this process already; nobody else of it opens or closes this file meanwhile.

    Raises MemoryStoreError during a repair.
    """
    with _lock:
        place = _opening.setdefault(os.path.realpath(path), threading.RLock())
    with place:
        try:
            key = _key(path)
        except OSError:
            yield False
            return
        with _lock:
            if key in _repaired:
                raise MemoryStoreError(f"{path} is being repaired; open it again when that is done")
            here = _open[key] > 0
        yield here


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether this process has the file open for nothing else; while it has not, nobody of it can open it."""
    with opening(path) as here:
        key = None if here else _key(path)
        if key is not None:
            with _lock:
                _repaired.add(key)
    try:
        yield key is not None
    finally:
        if key is not None:
            with _lock:
                _repaired.discard(key)


def hold(owner: object, path: Path) -> Callable[[], object]:
    """Count the file as open until `owner` is gone or what comes back is called."""
    key = _key(path)
    with _lock:
        _open[key] += 1
    return weakref.finalize(owner, _let_go, key)


def _let_go(key: tuple[int, int, int]) -> None:
    with _lock:
        _open[key] -= 1
        if not _open[key]:
            del _open[key]


def _key(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return os.getpid(), found.st_dev, found.st_ino
