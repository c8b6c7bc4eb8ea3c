"""A child process that never outlives its time: bounded output, one group, killed as a whole."""

import codecs
import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from agentlab.agent.tools.rendering import BoundedText

POLL_S = 0.05
_CHUNK_BYTES = 1 << 16
_RESULT_BYTES = 1 << 24


@dataclass(frozen=True)
class Finished:
    """How it ended. `output` is stdout and stderr in the order they were written."""

    exit_code: int | None  # negative: the number of the signal that killed it; None: killed by us
    problem: str | None  # None, "timeout", "cancelled" or "stopped", the last with `reason`
    output: BoundedText
    result: bytes  # what it wrote to its result pipe
    reason: str = ""


def run(
    command: Sequence[str], input_bytes: bytes, *, timeout_s: float, should_stop: Callable[[], bool],
    output_chars: int, env: Mapping[str, str] | None = None, cwd: str | None = None, result_pipe: bool = False,
    watch: Callable[[int], str | None] | None = None,
) -> Finished:  # fmt: skip
    """Run `command` in a session of its own, feed it, collect what it says.

    result_pipe appends the number of a descriptor to the command on which the child can write a result. watch is
    called with the child's process id every 50 ms and stops the child with the reason it returns.
    """
    deadline = time.monotonic() + timeout_s
    read_end = write_end = -1
    if result_pipe:
        read_end, write_end = os.pipe()
        command = [*command, str(write_end)]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=cwd,
            start_new_session=True, close_fds=True, pass_fds=(write_end,) if result_pipe else (),
        )  # fmt: skip
    except BaseException:
        for end in (read_end, write_end):
            if end >= 0:
                os.close(end)
        raise
    if result_pipe:
        os.close(write_end)
    try:
        return _Conversation(child, input_bytes, read_end, output_chars).follow(deadline, should_stop, watch)
    finally:
        _kill(child)
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if read_end >= 0:
            os.close(read_end)


def _kill(child: "subprocess.Popen[bytes]") -> None:
    # The group exists as long as one member lives, and its number cannot be reused before; the leader may be gone.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


class _Conversation:
    def __init__(self, child: "subprocess.Popen[bytes]", input_bytes: bytes, read_end: int, output_chars: int) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self.child = child
        self.pending = memoryview(input_bytes)
        self.output = BoundedText(output_chars)
        self.result = bytearray()
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stdin, self.stdout, self.read_end = child.stdin.fileno(), child.stdout.fileno(), read_end
        self.selector = selectors.DefaultSelector()
        os.set_blocking(self.stdin, False)
        self.selector.register(self.stdout, selectors.EVENT_READ)
        self.selector.register(self.stdin, selectors.EVENT_WRITE)
        if read_end >= 0:
            self.selector.register(read_end, selectors.EVENT_READ)

    def follow(
        self, deadline: float, should_stop: Callable[[], bool], watch: Callable[[int], str | None] | None
    ) -> Finished:
        next_look = 0.0
        try:
            while True:
                now = time.monotonic()
                if now >= next_look:  # also when it prints without a pause
                    next_look = now + POLL_S
                    if should_stop():
                        return self._finished(None, "cancelled")
                    if reason := watch(self.child.pid) if watch else None:
                        return self._finished(None, "stopped", reason)
                if now >= deadline:
                    return self._finished(None, "timeout")
                ended = self.child.poll() is not None
                # A grandchild may hold the pipes open: once the child has ended, only what lies in them is read.
                ready = self.selector.select(0 if ended else max(0.0, min(POLL_S, deadline - now)))
                if not self._exchange(ready) and ended:
                    return self._finished(self.child.returncode, None)
        finally:
            self.selector.close()

    def _exchange(self, ready: list[tuple[selectors.SelectorKey, int]]) -> bool:
        """Move bytes; False when nothing was there to read."""
        read = False
        for key, _ in ready:
            if key.fd == self.stdin:
                self._feed()
                continue
            data = os.read(key.fd, _CHUNK_BYTES)
            if not data:
                self.selector.unregister(key.fd)
                if key.fd == self.stdout:
                    # wait for the end without spinning, and without waiting for the next look
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.child.wait(0.005)
            elif key.fd == self.stdout:
                read = True
                self.output.write(self.decoder.decode(data))
            elif len(self.result) < _RESULT_BYTES:
                read = True
                self.result += data
        return read

    def _feed(self) -> None:
        try:
            written = os.write(self.stdin, self.pending[:_CHUNK_BYTES]) if self.pending else 0
            self.pending = self.pending[written:]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.pending = self.pending[:0]
        if not self.pending:
            self.selector.unregister(self.stdin)
            assert self.child.stdin is not None
            self.child.stdin.close()

    def _finished(self, exit_code: int | None, problem: str | None, reason: str = "") -> Finished:
        return Finished(exit_code, problem, self.output, bytes(self.result), reason)


def describe_end(exit_code: int) -> str:
    """In words how a process ended."""
    if exit_code >= 0:
        return f"the process ended with exit code {exit_code}"
    try:
        return f"the process was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"the process was killed by signal {-exit_code}"
