"""The bytes of files: in a folder, or in a table of the database, where several servers reach them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ritocco.disk import write_whole
from ritocco.server.database import AnyDatabase, StorageError

_ORPHAN_S = 60 * 60
_OURS = re.compile(r"[0-9a-z]{26}|\.[0-9a-z]{26}\.[0-9a-f]{16}\.part")  # of `new_id` and `write_whole`


class Contents(Protocol):
    """Bytes by name. A name is written once."""

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Stored when it returns. Raises StorageError."""

    def read(self, name: str) -> bytes:
        """All of it. Raises StorageError, also where it is gone."""

    def there(self, name: str) -> bool:
        """Whether it is."""

    def path(self, name: str) -> Path | None:
        """The file that holds it; None where none does."""

    def delete(self, names: Sequence[str]) -> None:
        """Those that nobody knows any more."""

    def sweep(self, known: Collection[str]) -> None:
        """Delete what an interrupted process left. known: all names that have a row."""


class Folder:
    """A file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"{folder}: {error}") from error

    def write(self, name: str, data: bytes | memoryview) -> None:
        """See Contents."""
        try:
            write_whole(self._folder / name, data)
            _sync_folder(self._folder)
        except OSError as error:
            raise StorageError(f"nothing can be stored: {error}") from error

    def read(self, name: str) -> bytes:
        """See Contents."""
        try:
            return self.path(name).read_bytes()
        except OSError as error:
            raise StorageError(f"a file can't be read: {error}") from error

    def there(self, name: str) -> bool:
        """See Contents. A full disk is freed of old files before their rows go."""
        return self.path(name).is_file()

    def path(self, name: str) -> Path:
        """See Contents."""
        return self._folder / name

    def delete(self, names: Sequence[str]) -> None:
        """See Contents. What can't be now goes at the next start."""
        for name in names:
            with suppress(OSError):
                self.path(name).unlink(missing_ok=True)

    def sweep(self, known: Collection[str]) -> None:
        """See Contents. Only while nothing is written. Files of other names are somebody else's, and stay."""
        with suppress(OSError):
            for path in self._folder.iterdir():
                if _OURS.fullmatch(path.name) and path.name not in known:
                    with suppress(OSError):
                        path.unlink()


class Table:
    """A row each. PostgreSQL holds at most 1 GiB in one, and settings keep far below.

    Bytes that have a row in `files` are never deleted here: whoever lost the connection while that row was
    written does not know of it.
    """

    def __init__(self, database: AnyDatabase) -> None:
        self._database = database

    def write(self, name: str, data: bytes | memoryview) -> None:
        """See Contents."""
        with self._database.write() as db:
            db.execute("INSERT INTO contents (id, data, created) VALUES (?, ?, ?)", (name, data, time.time()))

    def read(self, name: str) -> bytes:
        """See Contents."""
        with self._database.read() as db:
            row = db.execute("SELECT data FROM contents WHERE id = ?", (name,)).fetchone()
        if row is None:
            raise StorageError("a file can't be read: its bytes are gone")
        return bytes(row["data"])

    def there(self, name: str) -> bool:
        """See Contents."""
        with self._database.read() as db:
            return db.execute("SELECT 1 FROM contents WHERE id = ?", (name,)).fetchone() is not None

    def path(self, name: str) -> None:
        """See Contents."""

    def delete(self, names: Sequence[str]) -> None:
        """See Contents. What can't be now is swept."""
        if names:
            with suppress(StorageError), self._database.write() as db:
                db.executemany(f"DELETE FROM contents WHERE id = ? AND {_NOBODYS}", [(one,) for one in names])

    def sweep(self, known: Collection[str] = ()) -> None:
        """See Contents. Other servers write meanwhile, so only what is old goes."""
        with self._database.write() as db:
            old = time.time() - _ORPHAN_S
            db.execute(f"DELETE FROM contents WHERE created < ? AND {_NOBODYS}", (old,))


_NOBODYS = "NOT EXISTS (SELECT 1 FROM files WHERE files.id = contents.id)"


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is; Windows has no such call, nor the need."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
