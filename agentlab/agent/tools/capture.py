"""What one thread prints, without touching what others print."""

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from agentlab.agent.tools.rendering import BoundedText

# A context variable and not the thread's id: asyncio tasks and asyncio.to_thread carry it along.
_CURRENT: ContextVar[BoundedText | None] = ContextVar("agentlab_capture", default=None)
_LOCK = threading.Lock()
_active = 0


class _Router:
    """Stands for sys.stdout or sys.stderr: who captures gets its own text, everybody else the real stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        target = _CURRENT.get()
        if target is None:
            return int(self.stream.write(text) or 0)
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        target.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if _CURRENT.get() is None:
            self.stream.flush()

    def close(self) -> None:
        if _CURRENT.get() is None:  # who captures has nothing of its own to close
            self.stream.close()

    def detach(self) -> Any:
        return self.stream.detach() if _CURRENT.get() is None else self.buffer

    @property
    def buffer(self) -> Any:
        return self.stream.buffer if _CURRENT.get() is None else _Bytes(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Bytes:
    def __init__(self, router: _Router) -> None:
        self._router = router

    def write(self, data: Any) -> int:
        self._router.write(bytes(data).decode(errors="replace"))
        return len(data)

    def flush(self) -> None:
        """Nothing is kept back."""


# `print` in another thread holds the stream that it writes to without counting as its owner, so a router that were
# freed when the capturing ends would take the process down. Streams are few; the ones used last are kept.
_KEPT: deque[_Router] = deque(maxlen=64)


def _router(stream: Any) -> _Router:
    """The router of this stream, the same one every time."""
    router = next((one for one in _KEPT if one.stream is stream), None)
    if router is None:
        router = _Router(stream)
    else:
        _KEPT.remove(router)
    _KEPT.append(router)
    return router


@contextlib.contextmanager
def captured(into: BoundedText) -> Iterator[None]:
    """What the current context prints to sys.stdout and sys.stderr goes `into` the text.

    The two streams are wrapped while somebody captures and restored by the last one. Not captured: what C code or a
    child process writes to the file descriptors, and what threads print that the captured code starts.
    """
    global _active  # noqa: PLW0603 - one pair of streams per process, one counter for it
    with _LOCK:
        _active += 1
        for name in ("stdout", "stderr"):
            # another part of the program may have put its own stream there meanwhile
            if not isinstance(getattr(sys, name), _Router):
                setattr(sys, name, _router(getattr(sys, name)))
    token = _CURRENT.set(into)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        with _LOCK:
            _active -= 1
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if not _active and isinstance(stream, _Router):
                    setattr(sys, name, stream.stream)
