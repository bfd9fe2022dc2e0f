"""The SQLite file under the data folder: one process at a time, one writer, readers beside it.

WAL with `synchronous=FULL`: what a transaction wrote is on the disk when it returns, so a prediction that was
accepted outlives a lost process and a lost machine. [sqlite.org/wal.html, sqlite.org/pragma.html]
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ritocco.disk import hold
from ritocco.errors import BackendError, RitoccoError

FORMAT = 2
_SCHEMA = """
CREATE TABLE predictions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    key TEXT UNIQUE,
    digest TEXT NOT NULL,
    status TEXT NOT NULL,
    version TEXT NOT NULL,
    base TEXT NOT NULL,
    stream TEXT NOT NULL UNIQUE,
    webhook TEXT,
    webhook_events TEXT,
    webhook_due INTEGER NOT NULL DEFAULT 0,
    logs TEXT NOT NULL DEFAULT '',
    error TEXT,
    created_at TEXT NOT NULL,
    started_at TEXT,
    completed_at TEXT,
    metrics TEXT NOT NULL DEFAULT '{}',
    data_removed INTEGER NOT NULL DEFAULT 0,
    ended REAL,
    attempts INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX unfinished ON predictions (status) WHERE status IN ('starting', 'processing');
CREATE INDEX due ON predictions (seq) WHERE webhook_due;
CREATE INDEX ended ON predictions (ended) WHERE ended IS NOT NULL;
-- Apart, since pictures come as data URIs of megabytes, and every update of a row writes all of it.
CREATE TABLE inputs (id TEXT PRIMARY KEY, json TEXT NOT NULL);
-- Cut ones, so that lists and streams pass megabytes by.
CREATE TABLE IF NOT EXISTS briefs (id TEXT PRIMARY KEY, json TEXT NOT NULL);
CREATE TABLE files (
    id TEXT PRIMARY KEY,
    prediction TEXT,
    place INTEGER,
    name TEXT NOT NULL,
    content_type TEXT NOT NULL,
    size INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    metadata TEXT NOT NULL DEFAULT '{}',
    created_at TEXT NOT NULL,
    created REAL NOT NULL
);
CREATE INDEX outputs ON files (prediction, place) WHERE prediction IS NOT NULL;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_FROM_1 = """
ALTER TABLE predictions ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
CREATE TABLE IF NOT EXISTS briefs (id TEXT PRIMARY KEY, json TEXT NOT NULL);
"""


class StorageError(RitoccoError):
    """Nothing can be stored or read: the disk is full, or gone."""


class AwayError(StorageError):
    """The database can't be reached, and may come back. What was under way is done, or not."""


class Rows(Protocol):
    """What a statement gave. A row has its columns' names as keys."""

    @property
    def rowcount(self) -> int:
        """Rows that were changed."""

    def fetchone(self) -> Any:
        """The next row, or None."""

    def fetchall(self) -> list[Any]:
        """The rows that are left."""

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """Statements in the SQL that SQLite and PostgreSQL share, with `?` for values."""

    def execute(self, statement: str, values: Sequence[Any] = ..., /) -> Rows:
        """One."""

    def executemany(self, statement: str, values: Sequence[Sequence[Any]], /) -> object:
        """One for each of the values."""


class AnyDatabase(Protocol):
    """Where predictions and files are. refused: whether the last write failed."""

    @property
    def refused(self) -> bool:
        """Whether the last write failed."""

    def write(self) -> AbstractContextManager[Connection]:
        """A transaction: all of it is stored afterwards, or none. Raises StorageError."""

    def read(self) -> AbstractContextManager[Connection]:
        """What was committed last. Raises StorageError."""

    def close(self) -> None:
        """Let go of it. Again does nothing."""


def setting(database: AnyDatabase, name: str, default: str) -> str:
    """A value that is kept; the default is, where none was."""
    with database.write() as db:
        db.execute("INSERT INTO settings VALUES (?, ?) ON CONFLICT DO NOTHING", (name, default))
        return str(db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()["value"])


class Database:
    """Two connections, each behind a lock: sqlite3's may be used from any thread, by one at a time."""

    def __init__(self, folder: Path) -> None:
        """Opens or makes a folder. Raises BackendError where another process or a later version has it."""
        with ExitStack() as opened:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._held = opened.enter_context(closing(hold(folder, "--data")))
                self._writer = opened.enter_context(closing(_connect(folder / "ritocco.sqlite")))
                self._prepare(folder)
                self._reader = opened.enter_context(closing(_connect(folder / "ritocco.sqlite")))
            except (OSError, sqlite3.Error) as error:
                raise BackendError(f"--data is {str(folder)!r}, which can't be used: {error}") from error
            self._opened = opened.pop_all()
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._closed = False
        self.refused = False
        """Whether the last write failed."""

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is on the disk afterwards, or none. Raises StorageError."""
        with self._writing:
            self._refuse_closed()
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    yield self._writer
                    self._writer.execute("COMMIT")
                except BaseException:
                    if self._writer.in_transaction:
                        self._writer.execute("ROLLBACK")
                    raise
                self.refused = False
            except sqlite3.DatabaseError as error:
                if not _is_the_disks(error):
                    raise
                self.refused = True
                raise StorageError(f"nothing can be stored: {error}") from error

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """What was committed last. Raises StorageError."""
        with self._reading:
            self._refuse_closed()
            try:
                yield self._reader
            except sqlite3.DatabaseError as error:
                if not _is_the_disks(error):
                    raise
                raise StorageError(f"nothing can be read: {error}") from error

    def close(self) -> None:
        """Lets go of the folder."""
        with self._writing, self._reading:
            if not self._closed:
                self._closed = True
                self._opened.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StorageError("the server has stopped")

    def _prepare(self, folder: Path) -> None:
        found = int(self._writer.execute("PRAGMA user_version").fetchone()[0])
        if found > FORMAT:
            raise BackendError(
                f"--data is {str(folder)!r}, of format {found}; this version of ritocco reads formats up to "
                f"{FORMAT}"
            )
        if found < FORMAT:
            change = _FROM_1 if found else _SCHEMA
            self._writer.executescript(f"BEGIN; {change} PRAGMA user_version = {FORMAT}; COMMIT;")


def _is_the_disks(error: sqlite3.DatabaseError) -> bool:
    """Full, gone, or with a file on it that is damaged; the classes beside are our own mistakes."""
    return type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError)


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=30)
    connection.row_factory = sqlite3.Row
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")  # of what is damaged, the rest
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection
