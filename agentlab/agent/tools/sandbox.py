"""Python code → what it printed, run in a process that can do nothing but compute and use a folder of its own."""

import functools
import json
import math
import os
import secrets
import signal
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agentlab.agent.tools import process

_WORKER = Path(__file__).with_name("sandbox_worker.py")
_REFUSED = 120  # the worker's exit code when its locks did not hold
_ENTRIES_COUNTED = 2000


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    timeout_s: float = 10.0
    memory_mib: int = 512  # address space
    file_mib: int = 16  # one file
    folder_mib: int = 64  # all files together, looked at every 50 ms
    open_files: int = 64
    threads: int = 4096  # counted by the kernel over all processes of the user; starting processes is denied anyway
    output_chars: int = 2000


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot run code safely, in one sentence; None where it can."""
    need = "running Python needs a Linux kernel with Landlock (5.13 or newer, and `landlock` among its LSMs)"
    if sys.platform != "linux":
        return f"{need}; this is {sys.platform}"
    from agentlab.agent.tools import sandbox_kernel

    if os.uname().machine not in sandbox_kernel.ARCHITECTURES:
        return f"running Python needs x86_64 or aarch64; this is {os.uname().machine}"
    return None if sandbox_kernel.landlock_abi() >= 1 else f"{need}; this kernel offers none"


def run_python(
    code: str, *, limits: Limits = Limits(), should_stop: Callable[[], bool] = lambda: False, audit: bool = True
) -> tuple[str, str | None]:
    """(text, problem): output, value of a last expression and errors of `code`; problem as in `Observation`.

    No network, no other processes, no environment, no files but the standard library (to read) and an empty current
    folder that is deleted afterwards. Of other files it can ask whether they are there, how large and how old: Landlock
    does not hide that. Held by Landlock, seccomp, resource limits and an audit hook; without Landlock nothing is run
    and the text says so. audit=False leaves the hook out: tests show that the kernel holds alone.
    """
    if reason := unavailable():
        return reason, "error"
    folder = tempfile.mkdtemp(prefix="agentlab-python-")
    try:
        job = {"code": code, "folder": folder, "limits": _resource_limits(limits), "audit": audit}
        # the interpreter itself and not a venv's link to it: all of the venv stays out of reach
        command = [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", str(_WORKER)]
        loader = os.environ.get("LD_LIBRARY_PATH")  # some builds find libpython by it; the worker clears it
        ended = process.run(
            command,
            json.dumps(job).encode(),
            timeout_s=limits.timeout_s,
            should_stop=should_stop,
            output_chars=limits.output_chars - 100,  # 100: what `_report` adds
            env={} if loader is None else {"LD_LIBRARY_PATH": loader},
            cwd=folder,
            watch=lambda pid: _too_much(folder, pid, limits.folder_mib),
        )
    finally:
        _remove(folder)
    return _report(ended, limits)


def _resource_limits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_AS": limits.memory_mib << 20,
        "RLIMIT_CPU": math.ceil(limits.timeout_s) + 1,
        "RLIMIT_FSIZE": limits.file_mib << 20,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_NPROC": limits.threads,
        "RLIMIT_CORE": 0,
    }


def _report(ended: process.Finished, limits: Limits) -> tuple[str, str | None]:
    output = ended.output.text().rstrip("\n")
    note: str | None
    if ended.problem == "timeout":
        note, problem = f"timed out after {limits.timeout_s:g} s; the process was killed", "timeout"
    elif ended.problem == "cancelled":
        note, problem = "cancelled; the process was killed", "cancelled"
    elif ended.problem is not None:
        note, problem = f"stopped: {ended.reason}", "error"
    elif ended.exit_code == 0:
        return output or "done; nothing was printed", None
    else:
        # a traceback or the refusal speaks for itself
        told = ended.exit_code in (1, _REFUSED) and output
        note, problem = None if told else process.describe_end(ended.exit_code or 0), "error"
        if ended.exit_code == -signal.SIGXCPU:
            note = "the process used up its CPU time"
    return "\n".join(part for part in (output, note) if part), problem


def _too_much(folder: str, pid: int, limit_mib: int) -> str | None:
    """Why the folder is too full, or None. Never looks at more than some thousand entries.

    Files that the process has open and unlinked have no entry; they count as well.
    """
    size, entries = _unlinked_bytes(pid), 0
    waiting = [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as found:
            for entry in found:
                entries += 1
                with suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                if entries > _ENTRIES_COUNTED:
                    return f"more than {_ENTRIES_COUNTED} files and folders"
    return f"files of more than {limit_mib} MiB together" if size > limit_mib << 20 else None


def _unlinked_bytes(pid: int) -> int:
    """What open files take that have no name any more."""
    sizes = {}
    with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as opened:
        for entry in opened:
            with suppress(OSError):
                held = entry.stat()
                if stat.S_ISREG(held.st_mode) and not held.st_nlink:
                    sizes[held.st_ino] = held.st_blocks * 512  # a file that is open twice is there once
    return sum(sizes.values())


def _remove(folder: str) -> None:
    """Delete the folder, however deep it is, without following links out of it.

    Folders are moved up to the top before they are emptied, so neither depth nor the length of a path matters.
    """
    with suppress(OSError):
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            while _thin_out(top):
                pass
        finally:
            os.close(top)
        os.rmdir(folder)


def _thin_out(top: int) -> bool:
    """Delete what is no folder in `top`, and each folder there after moving its folders up; False when empty."""
    names = os.listdir(top)
    for name in names:
        if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=top)
            continue
        os.chmod(name, 0o700, dir_fd=top)  # it is a folder and nobody else is left to change that
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        try:
            for below in os.listdir(inner):
                if stat.S_ISDIR(os.stat(below, dir_fd=inner, follow_symlinks=False).st_mode):
                    os.chmod(below, 0o700, dir_fd=inner)  # moving a folder changes its .. and needs the right to
                    os.rename(below, secrets.token_hex(8), src_dir_fd=inner, dst_dir_fd=top)
                else:
                    os.unlink(below, dir_fd=inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=top)
    return bool(names)
