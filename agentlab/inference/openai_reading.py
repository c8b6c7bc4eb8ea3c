"""A streamed answer while it is read, and how another thread ends that at any time."""

import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Leash:
    """By it another thread ends a request, whether that waits to be tried again, for the answer, or for its rest."""

    def __init__(self) -> None:
        self._abandoned = threading.Event()
        self._connection: Any = None

    @property
    def abandoned(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self._abandoned.is_set()

    def pause(self, seconds: float) -> bool:
        """Wait; whether the request was abandoned meanwhile, or before."""
        return self._abandoned.wait(seconds)

    def follow(self, event: str, info: dict[str, Any]) -> None:
        """The `trace` of a request: the HTTP library calls it with all that it does, among which is each connection."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._connection = info["return_value"]
            if self.abandoned:
                self._cut()

    def abandon(self) -> None:
        """Want no more of it: the connection is closed at once, however silent it is. Harmless when repeated."""
        self._abandoned.set()
        self._cut()

    def _cut(self) -> None:
        if self._connection is not None:
            # A thread that waits for a socket does not notice that another one closes it, and keeps it open. Shut down
            # is the plain socket: the TLS around it belongs to the thread that reads.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._connection.get_extra_info("socket"), socket.SHUT_RDWR)


class Chunks:
    """The pieces of one streamed answer as dicts; `close` lets the server stop writing it."""

    def __init__(self, stream: Any, error: Callable[[Exception], Exception]) -> None:
        """error: what to raise for what the client raises."""
        self._stream = stream
        self._error = error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for chunk in self._stream:
                yield chunk.to_dict(warnings=False)  # what is of another form is met where it is read
        except Exception as error:  # the client's HTTP library raises its own kinds while a stream is read
            raise self._error(error) from None
        finally:
            self.close()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # it may be closed at the other end
            self._stream.close()


class Reading:
    """A streamed answer read on a thread of its own, so that whoever waits for it can stop waiting at any time."""

    def __init__(self, begin: Callable[[Leash], Chunks]) -> None:
        self.ended = False
        self._arrived: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
        self._leash = Leash()
        threading.Thread(target=self._read, args=(begin,), daemon=True).start()

    def _read(self, begin: Callable[[Leash], Chunks]) -> None:
        try:
            with contextlib.closing(begin(self._leash)) as chunks:
                for chunk in chunks:
                    if self._leash.abandoned:
                        return
                    self._arrived.put(chunk)
            self._arrived.put(None)
        except Exception as error:  # handed to whoever takes
            self._arrived.put(error)

    def take(self, wait_s: float) -> dict[str, Any] | None:
        """The next piece; None where none has come within `wait_s`, or none will (`ended`). Raises what broke."""
        try:
            found = self._arrived.get(timeout=wait_s)
        except queue.Empty:
            return None
        if isinstance(found, Exception):
            raise found
        self.ended = found is None
        return found

    def abandon(self) -> None:
        """Want no more of it; the connection is closed."""
        self._leash.abandon()
