"""A PostgreSQL database that several servers share. Needs the extra `ritocco[postgres]`.

Its tables are in a schema of its own, `ritocco`. Locks end with their transaction, and the database ends the
transaction of whoever stands still in it, so that a server that was stopped holds nobody up.
[postgresql.org/docs/15/explicit-locking.html, /runtime-config-client.html]
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg_pool import ConnectionPool

from ritocco.errors import BackendError
from ritocco.server.database import AwayError, StorageError
from ritocco.shown import plain, said

FORMAT = 1
MOST_CONNECTIONS = 10
"""Of one server, and one more."""
_SCHEMA = """
CREATE TABLE predictions (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
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
    ended DOUBLE PRECISION,
    attempts INTEGER NOT NULL DEFAULT 0,
    -- The server that runs it, or sends its last event; NULL where it was left to the others.
    owner TEXT,
    cancel_asked INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX unfinished ON predictions (status) WHERE status IN ('starting', 'processing');
CREATE INDEX due ON predictions (seq) WHERE webhook_due = 1;
CREATE INDEX ended ON predictions (ended) WHERE ended IS NOT NULL;
CREATE TABLE inputs (id TEXT PRIMARY KEY, json TEXT NOT NULL);
CREATE TABLE briefs (id TEXT PRIMARY KEY, json TEXT NOT NULL);
CREATE TABLE files (
    id TEXT PRIMARY KEY,
    prediction TEXT,
    place INTEGER,
    name TEXT NOT NULL,
    content_type TEXT NOT NULL,
    size BIGINT NOT NULL,
    sha256 TEXT NOT NULL,
    metadata TEXT NOT NULL DEFAULT '{}',
    created_at TEXT NOT NULL,
    created DOUBLE PRECISION NOT NULL
);
CREATE INDEX outputs ON files (prediction, place) WHERE prediction IS NOT NULL;
CREATE TABLE contents (id TEXT PRIMARY KEY, data BYTEA NOT NULL, created DOUBLE PRECISION NOT NULL);
-- Pictures are compressed already.
ALTER TABLE contents ALTER COLUMN data SET STORAGE EXTERNAL;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE servers (id TEXT PRIMARY KEY, seen TIMESTAMPTZ NOT NULL);
"""
Lock: TypeAlias = Literal["schema", "accept", "clean"]
_LOCKS: dict[Lock, int] = {"schema": 1, "accept": 2, "clean": 3}
_OURS = 0x7269746F  # of the locks that other applications may take in the same database
_CONNECT_S = 5.0
_BORROW_S = 5.0
_STATEMENT_S = 30.0
# What libpq does about a network that swallows packets; the URL may say otherwise.
_TCP = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 10_000}

_log = logging.getLogger(__name__)


class Statements:
    """See `Connection`: on one of PostgreSQL's."""

    def __init__(self, connection: psycopg.Connection[DictRow]) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> psycopg.Cursor[DictRow]:
        """One."""
        return self._connection.execute(_in_its_words(statement), _texts(values))

    def executemany(self, statement: str, values: Sequence[Sequence[Any]], /) -> None:
        """One for each of the values."""
        with self._connection.cursor() as cursor:
            cursor.executemany(_in_its_words(statement), [_texts(one) for one in values])

    def lock(self, lock: Lock) -> None:
        """Wait for a lock; it is held until the transaction ends."""
        self.execute("SELECT pg_advisory_xact_lock(?, ?)", (_OURS, _LOCKS[lock]))

    def try_lock(self, lock: Lock) -> bool:
        """The same without the wait; False where another server has it."""
        row = self.execute("SELECT pg_try_advisory_xact_lock(?, ?) AS got", (_OURS, _LOCKS[lock])).fetchone()
        return row is not None and bool(row["got"])


class Postgres:
    """A pool of connections, and one by which `beat` knows whether the database is there."""

    def __init__(self, url: str, *, idle_s: float = 10.0) -> None:
        """Connects, and makes the tables where there are none.

        idle_s: seconds after which the database ends a transaction in which nothing is done.
        Raises BackendError where it can't be reached or used, or is of a later version; no message says more
        of the URL than host, port and name.
        """
        self._where, self._conninfo, self._secret = _parsed(url)
        self._idle_s = idle_s
        self._beating: psycopg.Connection[DictRow] | None = None
        self._closed = False
        self._refused = False
        self.away = False
        """Whether the last beat failed; nothing else is tried then."""
        self._failed = threading.Event()
        try:
            with self._connect() as connection:
                self._prepare(connection)
        except psycopg.Error as error:
            why = self._said(error)
            raise BackendError(f"--database is {self._where}, which can't be used: {why}") from None
        self._pool: ConnectionPool[psycopg.Connection[DictRow]] = ConnectionPool(
            self._conninfo,
            kwargs={"autocommit": True, "row_factory": dict_row},
            configure=self._configure,
            check=ConnectionPool.check_connection,
            min_size=1,
            max_size=MOST_CONNECTIONS,
            timeout=_BORROW_S,
            reconnect_timeout=2.0,  # whoever asks next tries again
            name="ritocco",
            open=True,
        )

    @property
    def refused(self) -> bool:
        """Whether the last write failed, or the last beat."""
        return self._refused or self.away

    @contextmanager
    def write(self) -> Iterator[Statements]:
        """A transaction: all of it is stored afterwards, or none. Raises StorageError.

        After AwayError it may be either: where the connection was lost, nobody said whether it was done.
        """
        try:
            with self._borrowed() as connection, connection.transaction():
                yield Statements(connection)
        except StorageError:
            self._refused = True
            raise
        self._refused = False

    @contextmanager
    def read(self) -> Iterator[Statements]:
        """What was committed last. Raises StorageError."""
        with self._borrowed() as connection:
            yield Statements(connection)

    def beat(self, statement: str, values: Sequence[Any]) -> None:
        """Run a statement on a connection that is kept for it. Raises AwayError."""
        again = self._beating is not None  # it may be one of before the database's restart
        while True:
            try:
                if self._beating is None:
                    self._beating = self._connect()
                Statements(self._beating).execute(statement, values)
            except psycopg.Error as error:
                self._hang_up()
                if again:
                    again = False
                    continue
                if not self.away:
                    self.away = True
                    _log.error("database away", extra={"error": self._said(error)})
                raise AwayError(f"the database can't be reached: {self._said(error)}") from None
            if self.away:
                self._pool.check()
                self.away = False
                _log.warning("database back")
            return

    def close(self) -> None:
        """Closes every connection."""
        if not self._closed:
            self._closed = True
            self._pool.close(timeout=_CONNECT_S)
            self._hang_up()

    @contextmanager
    def _borrowed(self) -> Iterator[psycopg.Connection[DictRow]]:
        if self._closed:
            raise StorageError("the server has stopped")
        if self.away:
            raise AwayError("the database can't be reached")
        try:
            with self._pool.connection() as connection:
                yield connection
        except psycopg.Error as error:
            meaning = _meaning(error)
            if meaning is None:
                raise
            raise meaning(f"the database refuses: {self._said(error)}") from None

    def _connect(self) -> psycopg.Connection[DictRow]:
        connection = psycopg.connect(self._conninfo, autocommit=True, row_factory=dict_row)
        try:
            self._configure(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _configure(self, connection: psycopg.Connection[DictRow]) -> None:
        settings = (
            ("search_path", "ritocco"),
            ("statement_timeout", str(int(1000 * _STATEMENT_S))),
            ("idle_in_transaction_session_timeout", str(int(1000 * self._idle_s))),
        )
        for name, value in settings:
            connection.execute("SELECT set_config(%s, %s, false)", (name, value))

    def _hang_up(self) -> None:
        held, self._beating = self._beating, None
        if held is not None:
            with suppress(psycopg.Error):
                held.close()

    def _prepare(self, connection: psycopg.Connection[DictRow]) -> None:
        with connection.transaction():
            db = Statements(connection)
            db.lock("schema")
            if _one(db.execute("SELECT to_regnamespace('ritocco')::text AS it")) is None:
                db.execute("CREATE SCHEMA ritocco")
            if _one(db.execute("SELECT to_regclass('ritocco.settings')::text AS it")) is None:
                connection.execute(_SCHEMA)
                db.execute("INSERT INTO settings VALUES ('format', ?)", (str(FORMAT),))
            found = int(_one(db.execute("SELECT value AS it FROM settings WHERE name = 'format'")) or 0)
            if found != FORMAT:
                raise BackendError(
                    f"--database is {self._where}, of format {found}; this version of ritocco reads format "
                    f"{FORMAT}"
                )

    def _said(self, error: Exception) -> str:
        text = said(error)
        return text.replace(self._secret, "***") if self._secret else text


def _parsed(url: str) -> tuple[str, str, str]:
    """The database in words without secrets, how it is connected to, and the password.

    Raises BackendError, which says nothing of what it could not read.
    """
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise BackendError("--database can't be read; it must be postgresql://user@host:port/name") from None
    # What is not there, the environment may hold (PGHOST and such), or libpq's defaults.
    host, port, name = (plain(str(given.get(key) or "")) for key in ("host", "port", "dbname"))
    where = f"postgresql://{host}{port and f':{port}'}/{name}"
    defaults: dict[str, Any] = {"connect_timeout": int(_CONNECT_S), "application_name": "ritocco", **_TCP}
    return where, make_conninfo("", **(defaults | given)), str(given.get("password") or "")


def _in_its_words(statement: str) -> bytes:
    return statement.replace("%", "%%").replace("?", "%s").encode()


def _texts(values: Sequence[Any]) -> list[Any]:
    """PostgreSQL's texts hold no NUL."""
    return [one.replace("\0", "\ufffd") if isinstance(one, str) else one for one in values]


def _one(rows: psycopg.Cursor[DictRow]) -> Any:
    row = rows.fetchone()
    return None if row is None else row["it"]


def _meaning(error: psycopg.Error) -> type[StorageError] | None:
    """What the database's words mean to us; None for a mistake of our own.

    By SQLSTATE: a full disk, a damaged one; what ends connections or transactions, or a server that only
    reads, as after a failover. [postgresql.org/docs/15/errcodes-appendix.html]
    """
    kind = (error.sqlstate or "")[:2]
    if kind in ("53", "58", "XX") and error.sqlstate != "53300":  # too many connections
        return StorageError
    passing = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return AwayError if passing or kind in ("08", "25", "40", "57") else None
