"""The transactions of a prediction's life, as `server.store` makes them, on SQLite and on PostgreSQL.

With `pictures` the bytes of pictures lie in the database, as servers that share one have them; else in a
folder.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from ritocco.prediction import new_id
from ritocco.server.contents import Folder
from ritocco.server.files import Files
from ritocco.server.store import Outcome, Record, Store
from ritocco_bench.processes import BenchError

if TYPE_CHECKING:
    import psycopg

BINARIES = Path("/usr/lib/postgresql/15/bin")
MANY = 1 << 40
_LOG = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
_BYTES = "SELECT pg_database_size(current_database())"


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
        counted = _transactions(store, lambda: live(store, input, output))
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
    """By so many threads, each a server of its own. Raises BenchError without psycopg."""
    try:
        import psycopg

        from ritocco.server.shared_store import SharedStore
    except ImportError as error:
        raise BenchError("PostgreSQL is reached by psycopg; pip install 'ritocco[postgres]'") from error
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        asked = opened.enter_context(psycopg.connect(url, autocommit=True))
        asked.execute("DROP SCHEMA IF EXISTS ritocco CASCADE")
        stores: list[Store] = []
        for place in range(clients):
            stores.append(store := SharedStore(url, waiting=MANY))
            opened.callback(store.close)
            if not pictures:
                store.files = Files(store.database, Folder(folder / str(place)))
        counted = _transactions(stores[0], lambda: live(stores[0], input, output))
        log, size = (_number(asked, each) for each in (_LOG, _BYTES))
        count, took = _repeated(stores, input, output, seconds)
        return Lived(
            predictions=count,
            seconds=took,
            transactions=counted,
            written_bytes=(_number(asked, _LOG) - log) / count,
            stored_bytes=(_number(asked, _BYTES) - size) / count,
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


def _transactions(store: Store, work: Callable[[], None]) -> int:
    """How many transactions that write there are in it."""
    real, count = store.database.write, 0

    @contextmanager
    def counted() -> Iterator[Any]:
        nonlocal count
        count += 1
        with real() as db:
            yield db

    with patch.object(store.database, "write", counted):
        work()
    return count


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _number(asked: psycopg.Connection[Any], query: str) -> int:
    row = asked.execute(query).fetchone()
    return int(row[0]) if row else 0
