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

_lock = threading.RLock()
_open: Counter[tuple[int, int, int]] = Counter()  # (process, device, inode) → how often


@contextlib.contextmanager
def opening(path: Path) -> Iterator[bool]:
    """Whether the file is open in this process already; nobody else of it opens or closes one meanwhile."""
    with _lock:
        try:
            here = _open[_key(path)] > 0
        except OSError:
            here = False
        yield here


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
