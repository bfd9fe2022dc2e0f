"""The transactions of a prediction's life, as `server.store` makes them, on SQLite and on PostgreSQL.

The statements are the store's own: PostgreSQL gets them through an adapter of their marks and types. With
`pictures` the bytes of pictures lie in the database, as servers without a common folder need it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ritocco.prediction import new_id
from ritocco.server import database
from ritocco.server.database import Database
from ritocco.server.files import Files
from ritocco.server.store import Outcome, Record, Store
from ritocco_bench.processes import BenchError

if TYPE_CHECKING:
    import psycopg

BINARIES = Path("/usr/lib/postgresql/15/bin")
MANY = 1 << 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Lived:
    """predictions: whose lives were written. transactions: those that write, of each. written_bytes: to the
    log, of each; 0 where that is not known. stored_bytes: what the folder or database grew by, of each.
    """

    predictions: int
    seconds: float
    transactions: float
    written_bytes: float
    stored_bytes: float

    @property
    def per_second(self) -> float:
        """Predictions."""
        return self.predictions / self.seconds


def live(store: Store, input: dict[str, Any], output: bytes) -> None:
    """Everything that is written of a prediction that succeeds, as `server.jobs` has it written, and read
    once by its client.
    """
    id = new_id()
    asked = Record(
        id=id, input=input, version="0" * 64, base="http://localhost/v1", stream=new_id(), digest=id
    )
    store.accept(asked)
    store.get(id)
    store.prepare(id)
    store.prepared(id)
    store.start(id)
    file = store.files.write(output, name="out-0.png", content_type="image/png", prediction=id, place=0)
    store.finish(id, Outcome(status="succeeded", logs="Using seed: 1\n" * 8, metrics={"total": 1.0}), [file])
    store.get(id)
    store.files.outputs(id)


def sqlite(input: dict[str, Any], output: bytes, *, clients: int, seconds: float) -> Lived:
    """In a folder of its own, by so many threads of one process, as one server does."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), waiting=MANY)
        live(store, input, output)
        counted = _transactions(store.database, lambda: live(store, input, output))
        before = _size(Path(folder))
        count, took = _repeated([store] * clients, input, output, seconds)
        grown = _size(Path(folder)) - before
        store.close()
    return Lived(
        predictions=count,
        seconds=took,
        transactions=counted,
        written_bytes=0.0,
        stored_bytes=grown / count,
    )


def postgres(
    url: str, input: dict[str, Any], output: bytes, *, clients: int, seconds: float, pictures: bool
) -> Lived:
    """By so many threads with a connection each. Raises BenchError without psycopg."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        first = opened.enter_context(_Postgres.opened(url))
        first.make()
        connections = [first, *(opened.enter_context(_Postgres.opened(url)) for _ in range(clients - 1))]
        stores = [_shared(one, Path(folder) / str(n), pictures) for n, one in enumerate(connections)]
        live(stores[0], input, output)
        before = first.committed
        live(stores[0], input, output)
        counted = first.committed - before
        log, size = first.log_position(), first.size()
        count, took = _repeated(stores, input, output, seconds)
        return Lived(
            predictions=count,
            seconds=took,
            transactions=counted,
            written_bytes=(first.log_position() - log) / count,
            stored_bytes=(first.size() - size) / count,
        )


@contextmanager
def server(binaries: Path = BINARIES) -> Iterator[str]:
    """A PostgreSQL of its own on a socket, with the settings that it comes with; its URL. As root it runs as
    the user `postgres`, since it refuses to be root's. Raises BenchError where it is not installed.
    """
    if not (binaries / "initdb").is_file():
        raise BenchError(f"{binaries} has no initdb; install PostgreSQL 15, or name its folder by --postgres")
    with tempfile.TemporaryDirectory() as folder:
        user = "postgres" if os.geteuid() == 0 else ""
        prefix = ["runuser", "-u", user, "--"] if user else []
        Path(folder).chmod(0o755)
        data, sockets = Path(folder) / "data", Path(folder) / "sockets"
        for made in (data, sockets):
            made.mkdir(mode=0o700)
            if user:
                _run("chown", user, str(made))
        _run(*prefix, f"{binaries}/initdb", "-D", str(data), "-U", "bench", "-A", "trust", "-E", "UTF8")
        options = f"-c listen_addresses= -c unix_socket_directories={sockets} -c max_connections=100"
        control = [*prefix, f"{binaries}/pg_ctl", "-D", str(data), "-w"]
        _run(*control, "-l", str(data / "log"), "-o", options, "start")
        try:
            yield f"postgresql:///postgres?host={sockets}&user=bench"
        finally:
            _run(*control, "-m", "immediate", "stop")


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, cwd="/")
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", "") or ""
        raise BenchError(f"{' '.join(command)} failed: {said.strip() or error}") from error


def _repeated(stores: list[Store], input: dict[str, Any], output: bytes, seconds: float) -> tuple[int, float]:
    """Each store in a thread of its own; how many lives, in how many seconds. Raises what one of them did."""
    begun = time.perf_counter()
    until, counts, errors = begun + seconds, [0] * len(stores), list[BaseException]()

    def work(place: int) -> None:
        try:
            while time.perf_counter() < until:
                live(stores[place], input, output)
                counts[place] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts), time.perf_counter() - begun


def _transactions(held: Database, work: Callable[[], None]) -> int:
    """How many transactions that write there are in it."""
    count = 0

    def seen(statement: str) -> None:
        nonlocal count
        count += statement == "COMMIT"

    with held.write() as db:
        db.set_trace_callback(seen)
    count = 0  # that one's own COMMIT
    work()
    with held.write() as db:
        db.set_trace_callback(None)
    return count


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


class _Row(dict[Any, Any]):
    """By name and by place, as SQLite's."""

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class _Connection:
    """What the store asks of SQLite's connection."""

    def __init__(self, held: psycopg.Connection[Any]) -> None:
        self._held = held

    def execute(self, asked: str, values: Any = ()) -> Any:
        return _Cursor(self._held.execute(_marks(asked), values))

    def executemany(self, asked: str, values: Any) -> None:
        with self._held.cursor() as cursor:
            cursor.executemany(_marks(asked), values)


class _Cursor:
    """lastrowid: not known here."""

    lastrowid = None

    def __init__(self, held: psycopg.Cursor[Any]) -> None:
        self._held, self.rowcount = held, held.rowcount

    def fetchone(self) -> Any:
        return self._held.fetchone()

    def fetchall(self) -> Any:
        return self._held.fetchall()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._held)


class _Postgres:
    """A `Database` with one connection."""

    refused = False

    def __init__(self, held: psycopg.Connection[Any]) -> None:
        self._held, self.committed = held, 0

    @classmethod
    @contextmanager
    def opened(cls, url: str) -> Iterator[_Postgres]:
        try:
            import psycopg
        except ImportError as error:
            raise BenchError(
                "PostgreSQL is reached by psycopg; pip install 'psycopg[binary]>=3.2'"
            ) from error

        def rows(cursor: Any) -> Callable[[Any], _Row]:
            names = [one.name for one in cursor.description or ()]
            return lambda values: _Row(zip(names, values, strict=True))

        with psycopg.connect(url, autocommit=True, row_factory=rows) as held:
            yield cls(held)

    @contextmanager
    def write(self) -> Iterator[_Connection]:
        with self._held.transaction():
            yield _Connection(self._held)
        self.committed += 1

    @contextmanager
    def read(self) -> Iterator[_Connection]:
        yield _Connection(self._held)

    def make(self) -> None:
        """The tables, empty."""
        with self._held.transaction():
            for name in ("predictions", "inputs", "briefs", "files", "settings", "contents"):
                self._held.execute(f"DROP TABLE IF EXISTS {name}")
            self._held.execute(_schema())
            self._held.execute("CREATE TABLE contents (id TEXT PRIMARY KEY, data BYTEA NOT NULL)")

    def log_position(self) -> int:
        found = self._held.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn AS at").fetchone()
        return int(found["at"]) if found else 0

    def size(self) -> int:
        found = self._held.execute("SELECT pg_database_size(current_database()) AS bytes").fetchone()
        return int(found["bytes"]) if found else 0


class _Contents(Files):
    """Bytes in the database."""

    def _write(self, name: str, data: bytes | memoryview) -> None:
        with self._database.write() as db:
            db.execute("INSERT INTO contents VALUES (?, ?)", (name, bytes(data)))


def _shared(held: _Postgres, folder: Path, pictures: bool) -> Store:
    """The store's own methods, on PostgreSQL."""
    store = Store.__new__(Store)
    store.database = cast(Database, held)
    store.files = (_Contents if pictures else Files)(store.database, folder)
    store._waiting = MANY
    return store


def _schema() -> str:
    """SQLite's, in PostgreSQL's types."""
    made = database._SCHEMA.replace("INTEGER PRIMARY KEY AUTOINCREMENT", "BIGSERIAL PRIMARY KEY")
    made = re.sub(
        r"(webhook_due|data_removed) INTEGER NOT NULL DEFAULT 0", r"\1 BOOLEAN NOT NULL DEFAULT FALSE", made
    )
    return re.sub(r"\bREAL\b", "DOUBLE PRECISION", made)


def _marks(asked: str) -> Any:
    return asked.replace("%", "%%").replace("?", "%s")
