"""One holder at a time: an advisory file lock that names its holder and dies with it."""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from agentlab.errors import LeaseHeldError
from agentlab.files import disk_errors


class Lease:
    """The right to something that only one process may use: the accelerator, or one run's folder.

    The kernel releases a `flock` when its process dies, so a kill leaves nothing to clean up; the text in the file
    (pid, purpose, since) is there for people and may outlive its holder.
    """

    def __init__(self, path: Path, purpose: str) -> None:
        self.path = path
        self.purpose = purpose
        self._handle: int | None = None

    def acquire(self, wait_s: float = 0.0) -> "Lease":
        """Take it or raise LeaseHeldError naming the holder; `wait_s` gives a dying holder time to go."""
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(handle)
                    raise LeaseHeldError(f"{self.purpose} must wait: {describe(self.path)}") from None
                time.sleep(0.1)
        self._handle = handle
        text = json.dumps({"pid": os.getpid(), "purpose": self.purpose, "since_s": time.time()})
        with contextlib.suppress(OSError):  # a full disk: held it is all the same, only nobody can read by whom
            os.ftruncate(handle, 0)
            os.pwrite(handle, text.encode(), 0)
        return self

    def release(self) -> None:
        """Give it up; harmless when not held."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> "Lease":
        return self if self._handle is not None else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lease at `path` now: {pid, purpose, since_s}; None when nobody does."""
    if not path.exists():
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            return dict(json.loads(os.pread(handle, 4096, 0)))
        except ValueError:
            return {"pid": 0, "purpose": "unknown", "since_s": time.time()}
    finally:
        os.close(handle)
    return None


def describe(path: Path) -> str:
    """One sentence on the holder, for error messages."""
    found = holder(path)
    if found is None:
        return "it was held a moment ago and is free now; try again"
    if found["pid"] == os.getpid():
        return f"this process holds it itself ({found['purpose']}); lab.release() or closing the agent gives it up"
    since = time.strftime("%H:%M:%S", time.localtime(found["since_s"]))
    return f"process {found['pid']} holds it since {since} ({found['purpose']}); stop that one or wait for it"
