"""Files: uploads and outputs. A row comes after its bytes and goes before them: none is half there.

But on a full disk, which has no room for the change of a row, old files go first; see `Store.clean`.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ritocco.prediction import new_id, timestamp
from ritocco.server.contents import Contents
from ritocco.server.damage import columns, moment, parsed
from ritocco.server.database import AnyDatabase, Connection, StorageError

_PROBE_BYTES = 1 << 20
_TYPE = re.compile(r"[ -~]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file that is there whole.

    id: 130 random bits, and the name of its bytes; whoever knows it may read an output. prediction, place:
    whose output it is, and which; None for an upload. size: bytes. name: what the client called it, for show
    only. metadata: the client's own, JSON text of an object.
    """

    id: str
    name: str
    content_type: str
    size: int
    sha256: str
    created_at: str
    metadata: str = "{}"
    prediction: str | None = None
    place: int | None = None


class Files:
    """Rows of `files`, and their bytes."""

    def __init__(self, database: AnyDatabase, contents: Contents) -> None:
        self._database, self._contents = database, contents
        self.refused = False
        """Whether the last write failed."""

    def write(
        self,
        data: bytes | memoryview,
        *,
        name: str,
        content_type: str,
        metadata: str = "{}",
        prediction: str | None = None,
        place: int | None = None,
    ) -> StoredFile:
        """Bytes to a new file, stored afterwards; `record` makes it known. Raises StorageError."""
        made = StoredFile(
            id=new_id(),
            name=name,
            content_type=content_type,
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            created_at=timestamp(),
            metadata=metadata,
            prediction=prediction,
            place=place,
        )
        self._write(made.id, data)
        return made

    def _write(self, name: str, data: bytes | memoryview) -> None:
        try:
            self._contents.write(name, data)
        except StorageError:
            self.refused = True
            raise
        self.refused = False

    def try_writing(self) -> None:
        """A file of a picture's size, and away with it. Raises StorageError."""
        name = new_id()
        self._write(name, bytes(_PROBE_BYTES))
        self.unlink([name])

    def record(self, *files: StoredFile) -> None:
        """Make files known, or delete them. Raises StorageError."""
        try:
            with self._database.write() as db:
                insert_files(db, files)
        except StorageError:
            self.unlink([one.id for one in files])
            raise

    def find(self, id: str) -> StoredFile | None:
        """The file of an id, or None."""
        with self._database.read() as db:
            row = db.execute(f"SELECT {_COLUMNS} FROM files WHERE id = ?", (id,)).fetchone()
        return None if row is None else _stored(row)

    def uploads(self, most: int) -> list[StoredFile]:
        """Clients' files, the latest first."""
        asked = f"SELECT {_COLUMNS} FROM files WHERE prediction IS NULL ORDER BY created DESC LIMIT ?"
        with self._database.read() as db:
            return [_stored(row) for row in db.execute(asked, (most,))]

    def outputs(self, prediction: str) -> list[StoredFile]:
        """A prediction's pictures, in their order."""
        asked = f"SELECT {_COLUMNS} FROM files WHERE prediction = ? ORDER BY place"
        with self._database.read() as db:
            return [_stored(row) for row in db.execute(asked, (prediction,))]

    def path(self, file: StoredFile) -> Path | None:
        """Where its bytes are; None where in no file."""
        return self._contents.path(file.id)

    def read(self, file: StoredFile) -> bytes:
        """Its bytes. Raises StorageError where they are gone."""
        return self._contents.read(file.id)

    def delete(self, id: str) -> bool:
        """Forget an upload and delete it; False where there is none."""
        with self._database.write() as db:
            gone = db.execute("DELETE FROM files WHERE id = ? AND prediction IS NULL", (id,)).rowcount
        if gone:
            self.unlink([id])
        return bool(gone)

    def there(self, file: StoredFile) -> bool:
        """Whether its bytes are."""
        return self._contents.there(file.id)

    def expire(self, before: float) -> None:
        """Delete the uploads made before a time in seconds since the epoch."""
        with self._database.write() as db:
            gone = "DELETE FROM files WHERE prediction IS NULL AND created < ? RETURNING id"
            ids = [row["id"] for row in db.execute(gone, (before,)).fetchall()]
        self.unlink(ids)

    def unlink(self, ids: Sequence[str]) -> None:
        """Delete the bytes of files that nobody knows any more."""
        self._contents.delete(ids)

    def sweep(self) -> None:
        """Delete what an interrupted process left: bytes without a row."""
        with self._database.read() as db:
            known = {row["id"] for row in db.execute("SELECT id FROM files")}
        self._contents.sweep(known)


_NAMES = ("id", "name", "content_type", "size", "sha256", "created_at", "metadata", "prediction", "place")
_COLUMNS = ", ".join(_NAMES)


def _stored(row: Any) -> StoredFile:
    held = columns(row)
    held["created_at"] = moment(held["created_at"])
    if parsed(held["metadata"], dict) is None:
        held["metadata"] = "{}"
    if not isinstance(held["size"], int):
        held["size"] = 0
    if not _TYPE.fullmatch(held["content_type"]):
        held["content_type"] = "application/octet-stream"
    return StoredFile(**held)


def insert_files(db: Connection, files: Sequence[StoredFile]) -> None:
    """Rows of files, inside a transaction of the caller's."""
    rows = [(*(getattr(one, name) for name in _NAMES), time.time()) for one in files]
    marks = ", ".join("?" * (len(_NAMES) + 1))
    db.executemany(f"INSERT INTO files ({_COLUMNS}, created) VALUES ({marks})", rows)
