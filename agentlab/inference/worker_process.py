"""A child process that speaks length-prefixed JSON over a socket of its own and never outlives its parent.

Its stdout and stderr go to a log file, so that nothing a library prints can be taken for a message; the log's last
lines are quoted when it dies. Nothing is unpickled.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PREFIX = struct.Struct("!I")
_MAX_MESSAGE_BYTES = 1 << 28
_TAIL_LINES = 3  # that a message shows
_LOG_LINES = 100  # in which a cause is looked for: what is printed at the exit comes after it
_PARENT_POLL_S = 1.0
SEND_S = 300.0  # in which a message is taken in by a child that works

Message = dict[str, Any]


class ChildDied(Exception):
    """The child is gone; the message ends with what its log says last. log: more of it, to look for a cause in.

    code: its exit code, negative for the signal that ended it; None where it only went silent.
    """

    def __init__(self, message: str, log: str = "", code: int | None = None) -> None:
        super().__init__(message)
        self.log = log
        self.code = code


class Channel:
    """One end of the conversation; several threads may send, one may receive."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()
        self._received = bytearray()

    def send(self, message: Message, wait_s: float | None = None) -> None:
        """Raises OSError where nobody is at the other end, or has not taken all of it in `wait_s`."""
        data = json.dumps(message).encode()
        with self._sending:
            self._end.settimeout(wait_s)  # `receive` looks before it reads: it waits for nothing
            self._end.sendall(_PREFIX.pack(len(data)) + data)

    def receive(self, wait_s: float | None = None) -> Message | None:
        """The next message; None when none has come after `wait_s`. Raises EOFError when the other end is closed."""
        deadline = None if wait_s is None else time.monotonic() + wait_s
        while True:
            if len(self._received) >= _PREFIX.size:
                (size,) = _PREFIX.unpack_from(self._received)
                if size > _MAX_MESSAGE_BYTES:
                    raise EOFError(f"a message of {size} bytes")
                if len(self._received) >= _PREFIX.size + size:
                    data = bytes(self._received[_PREFIX.size : _PREFIX.size + size])
                    del self._received[: _PREFIX.size + size]
                    return dict(json.loads(data))
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._end], [], [], left)[0]:
                return None
            try:
                piece = self._end.recv(1 << 16)
            except ConnectionError:
                piece = b""
            if not piece:
                raise EOFError("the other end is closed")
            self._received += piece

    def close(self) -> None:
        self._end.close()


class ChildProcess:
    """`python -m module` in a session of its own; killed with its whole group by `kill`, or when this process ends."""

    def __init__(self, module: str, env: Mapping[str, str]) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="agentlab-", suffix=".log")  # noqa: SIM115
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            self._log.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._channel = Channel(ours)

    def send(self, message: Message) -> None:
        """Raises ChildDied."""
        try:
            self._channel.send(message, SEND_S)
        except OSError:
            raise self._death() from None

    def receive(self, wait_s: float | None = None) -> Message | None:
        """The child's next message, None after `wait_s` without one. Raises ChildDied."""
        try:
            return self._channel.receive(wait_s)
        except (EOFError, OSError, ValueError):
            raise self._death() from None

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """Everything that the child has printed."""
        with contextlib.suppress(OSError):
            return Path(self._log.name).read_text(encoding="utf-8", errors="replace")
        return ""

    def _death(self) -> ChildDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2.0)
        code = self._process.poll()
        how = "went silent" if code is None else f"ended with {signal_name(code)}"
        lines = [line.strip() for line in self.log().splitlines() if line.strip()]
        last = " | ".join(lines[-_TAIL_LINES:])
        message = f"{how}; its log ends: {last[-500:]}" if last else how
        return ChildDied(message, "\n".join(lines[-_LOG_LINES:]), code)

    def kill(self) -> None:
        """End the child and everything that it started; harmless when repeated."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # the group's number stays taken while any member lives
        self._process.wait()
        self._channel.close()
        self._log.close()


def signal_name(code: int) -> str:
    """ "exit code 1", or the signal that ended a process."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def parents_channel() -> Channel:
    """In the child: the conversation with the process that started it, as its command line says."""
    return Channel(socket.socket(fileno=int(sys.argv[1])))


def end_group() -> None:
    """In the child: kill it and everything that it started."""
    os.killpg(0, signal.SIGKILL)


def die_with_parent() -> None:
    """In the child: end this process's whole group soon after its parent is gone, whatever the main thread does.

    Linux could signal the death of the *thread* that started a child, which is not what a notebook's worker threads
    mean, so the parent's id is looked at instead.
    """
    parent = int(sys.argv[2])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        end_group()

    threading.Thread(target=watch, daemon=True).start()
