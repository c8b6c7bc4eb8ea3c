"""The memory's file: its tables, its migrations, how it is opened, and what SQLite's errors mean to a person."""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from agentlab.errors import MemoryStoreError, StorageError

APPLICATION_ID = 0x41474C4D  # "AGLM": tells a memory from any other SQLite file
BUSY_S = 60
CHUNK_BITS = 12  # a chunk's id is its memory's row id shifted by this, plus its number


# One script per schema version, run in order; a published one is never edited, a change is a new one.
MIGRATIONS = (
    """
    CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE memories(
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        memory_id TEXT NOT NULL UNIQUE,
        generation INTEGER NOT NULL,
        memory_type TEXT NOT NULL CHECK (memory_type IN ('conversation', 'knowledge', 'pattern', 'preference')),
        content TEXT NOT NULL,
        signature BLOB NOT NULL,
        importance REAL NOT NULL,
        created_at REAL NOT NULL,
        session_id TEXT,
        source TEXT NOT NULL CHECK (source IN ('person', 'agent', 'tool')),
        source_name TEXT NOT NULL,
        tags TEXT NOT NULL,
        metadata TEXT NOT NULL,
        checksum INTEGER NOT NULL,
        validation_count INTEGER NOT NULL,
        access_count INTEGER NOT NULL,
        last_accessed REAL
    );
    CREATE INDEX memories_generation ON memories(generation);
    CREATE INDEX memories_signature ON memories(signature);
    CREATE INDEX memories_session ON memories(session_id) WHERE session_id IS NOT NULL;
    CREATE TABLE chunks(
        id INTEGER PRIMARY KEY,
        start INTEGER NOT NULL,
        "end" INTEGER NOT NULL,
        terms TEXT NOT NULL,
        vector BLOB NOT NULL,
        checksum INTEGER NOT NULL
    );
    CREATE VIRTUAL TABLE text_index USING fts5(
        terms, content='chunks', content_rowid='id', tokenize='unicode61 remove_diacritics 0'
    );
    CREATE TABLE sources(
        derived TEXT NOT NULL, source TEXT NOT NULL, PRIMARY KEY (derived, source)
    ) WITHOUT ROWID;
    CREATE INDEX sources_source ON sources(source);
    CREATE TABLE knowledge(
        knowledge_id TEXT PRIMARY KEY,
        title TEXT NOT NULL,
        domain TEXT NOT NULL,
        confidence REAL NOT NULL,
        last_updated REAL NOT NULL,
        relationships TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE sessions(
        session_id TEXT PRIMARY KEY,
        user_id TEXT NOT NULL,
        start_time REAL NOT NULL,
        last_activity REAL NOT NULL,
        active_memories TEXT NOT NULL,
        preferences TEXT NOT NULL,
        summary TEXT NOT NULL,
        summarised INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE turns(
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation_id TEXT NOT NULL UNIQUE,
        session_id TEXT NOT NULL,
        timestamp REAL NOT NULL,
        user_input TEXT NOT NULL,
        agent_response TEXT NOT NULL,
        context_used TEXT NOT NULL,
        importance_score REAL NOT NULL,
        tags TEXT NOT NULL,
        metadata TEXT NOT NULL,
        memory_ids TEXT NOT NULL,
        echoes TEXT NOT NULL
    );
    CREATE INDEX turns_session ON turns(session_id, id);
    CREATE TABLE tombstones(
        memory_id TEXT PRIMARY KEY,
        row INTEGER NOT NULL,
        generation INTEGER NOT NULL,
        kind TEXT NOT NULL,
        forgotten_at REAL NOT NULL,
        reason TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX tombstones_generation ON tombstones(generation);
    INSERT INTO meta VALUES ('generation', '0'), ('epoch', '0'), ('purge', '0');
    """,
    """
    ALTER TABLE turns ADD COLUMN retold TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE turns ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE sessions ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE knowledge ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE sources ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE tombstones ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE aliases(
        memory_id TEXT PRIMARY KEY, stands_for TEXT NOT NULL, checksum INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX aliases_stands_for ON aliases(stands_for);
    UPDATE tombstones SET row = 0 WHERE row IN (SELECT id FROM memories);
    """,
    """
    CREATE TABLE tellings(
        memory_id TEXT NOT NULL, session_id TEXT NOT NULL, times INTEGER NOT NULL, tags TEXT NOT NULL,
        source TEXT NOT NULL, source_name TEXT NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (memory_id, session_id)
    ) WITHOUT ROWID;
    CREATE INDEX tellings_session ON tellings(session_id);
    """,
    "",  # signatures that tell more apart, see `respelling`
    "",  # and more again
)
VERSION = len(MIGRATIONS)
_SPELT = 5  # the version from which signatures and terms are as `words` makes them today
_SEALED = 2  # the version from which the rows beside the memories have checksums, those that `sealed` covers today


def connect(path: Path, *, create: bool = True, known: bool = False) -> sqlite3.Connection:
    """An open connection to the memory at `path`, made or migrated where needed; only its owner may read a new one.

    The file is only touched when it is a memory of this or an older version; everything else is an error first.
    known: this process has it open already, so its beginning was checked and must not be read here (`handles`).
    """
    if not known:
        check_file(path, create)
        if path.exists() and (missing := _lastingly_missing(path)):
            raise damaged(path, f"it ends {missing} bytes too early")  # SQLite would not read any of it
    if not path.exists():
        with disk_access(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # the log takes the file's permissions
    with sqlite_errors(path):
        connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        # damaged text is told by its checksum, not by an exception in the middle of a result
        connection.text_factory = text_of
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def text_of(raw: bytes) -> str:
    """Text of the file, also where it is no UTF-8 any more."""
    return str(raw, "utf-8", "replace")


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN")  # one state of the file: another process may be making it just now
    application, version = _identity(connection)
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    connection.execute("COMMIT")
    if application != APPLICATION_ID and (application or tables):
        raise MemoryStoreError(f"{path} is an SQLite file of another program, not a memory; choose another path")
    if version > VERSION:
        raise MemoryStoreError(
            f"{path} was written by a newer agentlab: schema version {version}; allowed: up to {VERSION}"
        )
    if application != APPLICATION_ID:
        connection.execute("PRAGMA page_size = 4096")
    _write_ahead(connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA temp_store = MEMORY")  # a temporary file could keep what is forgotten
    connection.execute("PRAGMA cell_size_check = ON")
    if version < VERSION:
        migrate(connection)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the file to the newest schema in one transaction; several processes may try at once."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        _, version = _identity(connection)
        for script in MIGRATIONS[version:]:
            for statement in script.split(";"):
                if statement.strip():
                    connection.execute(statement)
        if version < _SEALED:
            from agentlab.memory.sealed import seal_all  # which needs this room for its errors

            seal_all(connection)
        if 0 < version < _SPELT:
            from agentlab.memory.respelling import respell_all

            respell_all(connection)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _identity(connection: sqlite3.Connection) -> tuple[int, int]:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    return application, connection.execute("PRAGMA user_version").fetchone()[0]


def _write_ahead(connection: sqlite3.Connection) -> None:
    # SQLite's busy handler does not wait for this switch when two processes create the file at once
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname not in ("SQLITE_BUSY", "SQLITE_LOCKED") or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def check_file(path: Path, create: bool) -> None:
    """Raise where `path` is a folder, nothing that may be made, or a file that does not begin as SQLite's do."""
    if path.is_dir():
        raise MemoryStoreError(f"{path} is a folder; give the path of a memory's file, like memory.db")
    if not path.exists():
        if not create:
            raise MemoryStoreError(f"no memory at {path}; `agentlab memory add` makes one")
        return
    if not path.is_file():
        raise MemoryStoreError(f"{path} is no file; give the path of a memory's file, like memory.db")
    with disk_access(path), open(path, "rb") as file:
        head = file.read(100)
    if not head and not create and not _filled_soon(path):
        raise MemoryStoreError(f"{path} is empty: what it held is lost; restore it from a copy, or delete it")
    if head and not head.startswith(b"SQLite format 3\x00"):
        raise MemoryStoreError(f"{path} is not a memory: it does not begin as an SQLite file; it was left untouched")
    if head and len(head) < 100:
        raise MemoryStoreError(f"{path} is damaged: it ends after {len(head)} bytes; restore it from a copy")


def _filled_soon(path: Path) -> bool:
    """Whether a file without a byte is a memory that another process makes just now."""
    for _ in range(5):
        time.sleep(0.05)
        if path.stat().st_size or path.with_name(path.name + "-wal").exists():
            return True
    return False


def missing_bytes(path: Path, file: BinaryIO | None = None) -> int:
    """How many bytes the file should be longer, by the page count in its header; 0 while a log holds newer pages.

    file: the file, where it is open already and must not be closed (`handles`).
    """
    log = path.with_name(path.name + "-wal")
    if log.exists() and log.stat().st_size:
        return 0
    with contextlib.nullcontext(file) if file is not None else open(path, "rb") as opened:
        opened.seek(0)
        head = opened.read(100)
    if len(head) < 100:
        return 0
    page = int.from_bytes(head[16:18], "big")
    return max(0, int.from_bytes(head[28:32], "big") * (65_536 if page == 1 else page) - path.stat().st_size)


def _lastingly_missing(path: Path) -> int:
    """`missing_bytes` that is not the work of another process that is writing the file just now."""
    for _ in range(3):
        if not (missing := missing_bytes(path)):
            return 0
        time.sleep(0.05)
    return missing


@contextlib.contextmanager
def disk_access(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot use {path}: {error.strerror}; choose another path or free it") from None


@contextlib.contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one sentence: damage, a full disk, a lock held too long, missing permission."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or ""
        if name.startswith(("SQLITE_IOERR_READ", "SQLITE_IOERR_SHORT_READ")):
            raise damaged(path, "it ends too early") from error
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
            raise StorageError(
                f"cannot write {path}: {_why(path, str(error))}; nothing of this step was stored and what was there "
                "before is kept; free space and do it again"
            ) from error
        # the statements are fixed, so a table or column that is missing was damaged away
        gone = name == "SQLITE_ERROR" and "no such" in str(error)
        if gone or name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "malformed" in str(error):
            raise damaged(path, str(error)) from error
        if name.startswith("SQLITE_CONSTRAINT"):
            raise MemoryStoreError(f"{path} has a record with that id already, or one does not fit: {error}") from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise StorageError(f"another process has been writing {path} for {BUSY_S} s; try again later") from error
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
            raise StorageError(f"cannot open {path} for writing: {error}; choose another path") from error
        raise
    except UnicodeDecodeError as error:
        raise damaged(path, "text that is not UTF-8") from error


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether SQLite says that the file's content is wrong, and not that it is locked, full or misused."""
    name = getattr(error, "sqlite_errorname", None) or ""
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR_SHORT_READ"))


def damaged(path: Path, what: str) -> MemoryStoreError:
    """The error for a file whose content is wrong; it says how to get the rest back."""
    return MemoryStoreError(
        f"{path} is damaged ({what}); `agentlab memory doctor {path} --repair` keeps it and makes a new one of what "
        "is readable"
    )


def _why(path: Path, message: str) -> str:
    with contextlib.suppress(OSError):
        space = os.statvfs(path.parent)
        if space.f_bavail * space.f_frsize < 1 << 20:
            return "the disk is full"
    return message
