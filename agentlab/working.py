"""Long work in this process: a thread, its events in a queue, a way to end it, and its end."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from agentlab.events import Event


class Work:
    """Work that hands its events on and can be ended from any thread.

    `items` brings each event after `record` has taken it and, last, None or the exception with which the work ended.
    `should_stop` turns true when it is interrupted or the stop file appears.
    """

    def __init__(self, record: Callable[[Event], None] = lambda event: None, stop_file: Path | None = None) -> None:
        self.items: queue.Queue[Event | BaseException | None] = queue.Queue()
        self._record = record
        self._stop_file = stop_file
        self._interrupted = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.current_thread()  # until `start`: work that its maker does himself

    def start(self, do: Callable[[Callable[[Event], None], Callable[[], bool]], object]) -> None:
        """Call `do(emit, should_stop)` in a thread."""

        def work() -> None:
            try:
                do(self._emit, self.should_stop)
                self.items.put(None)
            except BaseException as error:  # handed to the consumer, who raises it
                self.items.put(error)
            finally:
                self._ended.set()

        self._thread = threading.Thread(target=work, name="work", daemon=True)
        self._thread.start()

    def _emit(self, event: Event) -> None:
        self._record(event)
        self.items.put(event)

    def should_stop(self) -> bool:
        """Whether it shall end after its current step."""
        return self._interrupted.is_set() or (self._stop_file is not None and self._stop_file.exists())

    def interrupt(self) -> None:
        """Ask it to end; it goes on until its current step is done."""
        self._interrupted.set()

    def end(self) -> None:
        """Ask it to end and wait until it has; in its own thread only ask."""
        self.interrupt()
        if self._thread is not threading.current_thread():
            self._ended.wait()

    def done(self) -> None:
        """Its maker, who did it himself, says that it has ended."""
        self._ended.set()
