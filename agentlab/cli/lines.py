"""The lines that were typed into chats, and what forgetting does with them."""

import contextlib
from pathlib import Path
from typing import Self

import click

from agentlab.config import home
from agentlab.errors import StorageError

_KEPT = 1000


class Lines:
    """Arrow keys and the lines typed before, where the terminal can; kept in the file `path`, None: in no file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._mark: int | None = None

    def __enter__(self) -> Self:
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)  # where whoever forgets meanwhile leaves word
        self._mark = _last_clearing(self.path)
        with contextlib.suppress(ImportError, OSError):
            import readline  # from now on `input` edits lines

            if self.path is not None and self.path.exists():
                readline.read_history_file(self.path)
            readline.set_history_length(_KEPT)
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is None or self._mark != _last_clearing(self.path):
            return  # somebody forgot meanwhile: what was typed here may tell it
        with contextlib.suppress(ImportError, OSError):
            import readline

            readline.write_history_file(self.path)
            if self._mark != _last_clearing(self.path):  # just now
                self.path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Drop all lines, those of earlier and of other open talks too: which of them tell what was forgotten cannot
        be known. Raises StorageError where they stay in the file.
        """
        with contextlib.suppress(ImportError):
            import readline

            readline.clear_history()
        if self.path is not None:
            drop(self.path)
            self._mark = _last_clearing(self.path)


def history_path() -> Path:
    """Where chats with a memory keep their typed lines."""
    return home() / "chat-history"


def drop(path: Path) -> None:
    """Delete the typed lines, and let talks that are open keep none of theirs. Raises StorageError."""
    try:
        if path.parent.is_dir():
            _clearing(path).touch()
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"the typed lines stay in {path} ({error.strerror}); delete it") from None


def say_what_stays() -> None:
    """Tell on stderr where forgetting reached beside the memory, and where it did not."""
    click.secho(
        "the typed lines of chats are dropped; not reached: exports and backups, traces in MLflow (--trace), data sets "
        "and adapters made of it",
        err=True,
        dim=True,
    )


def _clearing(path: Path) -> Path:
    """An empty file whose time of change is that of the last forgetting."""
    return path.with_name(f"{path.name}.cleared")


def _last_clearing(path: Path | None) -> int | None:
    """When lines were dropped last, in nanoseconds since 1970; None for never."""
    if path is not None:
        with contextlib.suppress(OSError):
            return _clearing(path).stat().st_mtime_ns
    return None
