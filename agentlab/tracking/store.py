"""The MLflow store of a project: one SQLite file and the artifacts beside it, always by absolute path."""

import contextlib
import fcntl
import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from agentlab.errors import StorageError
from agentlab.files import disk_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK_WAIT_S = 3.0  # how long another writer is waited for; MLflow itself would wait 20 s at every call
_CREATE_WAIT_S = 120.0  # another process may be creating the database, which takes seconds on a slow disk
# Set by a surrounding MLflow project or run: they would send our values into somebody else's run or model.
_HIJACKING = ("MLFLOW_RUN_ID", "MLFLOW_ACTIVE_MODEL_ID", "_MLFLOW_ACTIVE_MODEL_ID")

_threads = threading.RLock()
_held: set[Path] = set()


def folder(root: Path) -> Path:
    """Where the database and every artifact of the project lie."""
    return root.resolve() / "mlruns"


def database(root: Path) -> Path:
    return folder(root) / "mlflow.db"


def uri(root: Path) -> str:
    """The tracking and registry URI; explicit, so that a leftover `mlruns/<digits>/meta.yaml` changes nothing."""
    return f"sqlite:///{database(root)}"


def configure(root: Path) -> "MlflowClient":
    """A client of the project's store, which is created on first use. Costs 1 to 2 s in a process without mlflow.

    Raises StorageError when the store cannot be opened or written.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name in _HIJACKING:
        os.environ.pop(name, None)
    with lock(root, _CREATE_WAIT_S):
        if database(root).exists():
            check(root)
        from mlflow import MlflowClient

        # What MLflow logs here it also raises, and migrations are no news.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        try:
            if not database(root).exists():
                _create(root)
            client = MlflowClient(uri(root), registry_uri=uri(root))
            client.search_experiments(max_results=1)
        except Exception as error:
            if not is_store_error(error):
                raise
            raise StorageError(_sentence(root, first_line(error))) from error
    return client


def _create(root: Path) -> None:
    """Build the database beside its place and rename it: a kill half-way through the migrations leaves nothing."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    building = folder(root) / ".mlflow.db.tmp"
    building.unlink(missing_ok=True)
    SqlAlchemyStore(f"sqlite:///{building}", str(folder(root))).engine.dispose()
    os.replace(building, database(root))


def check(root: Path) -> None:
    """Raise StorageError unless the store can be written now. Costs well under a millisecond."""
    path = database(root)
    if path.exists() and not os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise StorageError(_sentence(root, "no permission to write in its folder"))
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=LOCK_WAIT_S, isolation_level=None)
        ) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise StorageError(_sentence(root, first_line(error))) from error


def _sentence(root: Path, reason: str) -> str:
    if "not a database" in reason or "malformed" in reason:
        remedy = "move the file away: it is rebuilt from the runs' folders"
    elif "locked" in reason:
        remedy = "another process is writing to it; wait for it or end it"
    else:
        remedy = "make it writable and see that the disk has room"
    return f"cannot use the MLflow store {database(root)}: {reason}; {remedy}"


def is_store_error(error: BaseException) -> bool:
    """Whether an exception comes from the disk, the database or MLflow, rather than from a mistake in this program."""
    if isinstance(error, OSError | StorageError):
        return True
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"mlflow", "sqlalchemy", "alembic", "sqlite3"})


def first_line(error: BaseException) -> str:
    """What an error of the store says, in one line: SQL follows, and SQLAlchemy may put advice to programmers first."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = (line for line in lines if line and not line.startswith("(raised as a result of"))
    return next(said, type(error).__name__)[:500]


@contextlib.contextmanager
def lock(root: Path, wait_s: float = 30.0) -> Iterator[None]:
    """Hold the store's lock while something is looked up and created, so that two processes do not both create it.

    Re-entrant in one thread. The kernel releases it when the process dies.
    """
    path = folder(root) / "agentlab.lock"
    with _threads:
        if path in _held:
            yield
            return
        with disk_errors(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise StorageError(f"{path.parent} is a file; move it away: MLflow's store needs that folder") from None
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + wait_s
            while not _try_flock(handle):
                if time.monotonic() >= deadline:
                    raise StorageError(_sentence(root, f"locked for more than {wait_s:.0f} s"))
                time.sleep(0.02)
            _held.add(path)
            yield
        finally:
            _held.discard(path)
            os.close(handle)


def _try_flock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def ui_command(root: Path, port: int = 5000) -> list[str]:
    """The command line that shows the store in MLflow's web interface, on this machine only."""
    # fmt: off
    return [
        "env", "MLFLOW_DISABLE_TELEMETRY=true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false",
        sys.executable, "-m", "mlflow", "ui",
        "--backend-store-uri", uri(root), "--default-artifact-root", str(folder(root)),
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]
    # fmt: on
