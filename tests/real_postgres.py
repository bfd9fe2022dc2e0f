"""A real PostgreSQL in a folder of its own, which tests stop and start."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

both_stores = pytest.mark.parametrize(
    "place", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
"""Once on a data folder, once on a PostgreSQL database; see the fixture `place`."""
PASSWORD = "a-password-that-no-log-may-hold"
_BINARIES = "/usr/lib/postgresql/*/bin"  # Debian's
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": 200,
}


class RealPostgres:
    """port: on 127.0.0.1, with a password."""

    def __init__(self, folder: Path) -> None:
        self._bin, self._folder, self._numbers = _binaries(), folder, count()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        secret = folder / "password"
        secret.write_text(PASSWORD, encoding="utf-8")
        if os.geteuid() == 0:  # as whom it refuses to run
            user = pwd.getpwnam("postgres")
            for path in (folder, secret):
                os.chown(path, user.pw_uid, user.pw_gid)
        how = (
            "--auth=scram-sha-256",
            f"--pwfile={secret}",
            "--username=ritocco",
            "--encoding=UTF8",
            "--no-sync",
        )
        self._run("initdb", "--locale=C", *how)
        self.start()

    def start(self) -> None:
        """Returns once it takes connections."""
        options = " ".join(f"-c {name}={value}" for name, value in (_SETTINGS | {"port": self.port}).items())
        log = str(self._folder / "log")
        self._run("pg_ctl", "-w", "-l", log, "-o", f"{options} -k {self._folder}", "start")

    def stop(self, *, at_once: bool = False) -> None:
        """at_once: as if it were killed."""
        self._run("pg_ctl", "-w", "-m", "immediate" if at_once else "fast", "stop")

    def url(self, database: str) -> str:
        return f"postgresql://ritocco:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty one."""
        name = f"test_{next(self._numbers)}_{secrets.token_hex(4)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def _run(self, command: str, *arguments: str) -> None:
        asked = [str(self._bin / command), "-D", str(self._folder / "data"), *arguments]
        if os.geteuid() == 0:
            asked = ["runuser", "-u", "postgres", "--", *asked]
        # Its server would hold a pipe open.
        with (self._folder.parent / f"{self._folder.name}.out").open("ab+") as said:
            done = subprocess.run(asked, stdout=said, stderr=said, cwd=self._folder, check=False)
            said.seek(0)
            assert done.returncode == 0, said.read().decode(errors="replace")[-2000:]


def _binaries() -> Path:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/").glob(_BINARIES[1:]))
    assert folders, f"these tests need PostgreSQL's server: no initdb in PATH, nor in {_BINARIES}"
    return folders[-1]


@contextmanager
def real_postgres() -> Iterator[RealPostgres]:
    """One that runs; everything of it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ritocco-postgres-") as outer:
        Path(outer).chmod(0o755)
        folder = Path(outer) / "it"
        folder.mkdir(mode=0o700)
        made = RealPostgres(folder)
        try:
            yield made
        finally:
            made.stop(at_once=True)
