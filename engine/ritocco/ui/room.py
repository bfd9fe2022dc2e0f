"""What people upload to the page: a private folder, bounded, emptied at start and end, expired between."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ritocco.errors import RequestError

_LEAST = 64 << 10
"""Bytes that a file counts for, so that there are not too many of them."""


class Room:
    """path: absolute, without links."""

    def __init__(self, data: Path | None, *, most_bytes: int) -> None:
        """data: the server's data folder, under which it lies; None takes a temporary folder. most_bytes: of
        all files together, of which each counts for 64 KiB at least.
        """
        self._most, self._trimming = most_bytes, threading.Lock()
        self._temporary = None if data is not None else tempfile.TemporaryDirectory(prefix="ritocco-ui-")
        path = data / "ui" if data is not None else Path(self._temporary.name if self._temporary else "")
        self.path = path.resolve()
        self._empty()
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def holds(self, path: str) -> bool:
        """Whether it is the absolute path of a file of ours, that no link leads to elsewhere."""
        if "\x00" in path or not Path(path).is_absolute():
            return False
        try:
            found = Path(path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return False
        return found.is_file() and found.is_relative_to(self.path)

    def inside(self, path: str) -> Path:
        """The file. Raises RequestError for what is none of ours, or gone."""
        if not self.holds(path):
            raise RequestError("the file is not here any more; load it again", field="input.image")
        file = Path(path).resolve()
        with suppress(OSError):  # the time of use; the other one says since when it is here
            os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
        return file

    def trim(self) -> None:
        """Remove what was not used for longest, until the rest has at most `most_bytes`."""
        with self._trimming:
            held = sorted(self._used())
            size = sum(counted for _, counted, _ in held)
            for _, counted, file in held:
                if size <= self._most:
                    return
                size -= counted
                with suppress(OSError):
                    file.unlink()
                with suppress(OSError):  # others may be in it
                    file.parent.rmdir()

    def clean(self, retention_s: float) -> None:
        """Remove what is older than so many seconds."""
        before = time.time() - retention_s
        with suppress(OSError):
            for file in list(self.path.rglob("*")):
                with suppress(OSError):
                    if file.lstat().st_mtime >= before:
                        continue
                    if file.is_dir():
                        file.rmdir()  # which refuses where something is in it
                    else:
                        file.unlink()

    def close(self) -> None:
        """Remove everything."""
        self._empty()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _used(self) -> Iterator[tuple[float, int, Path]]:
        """When a file was used last, what it counts for, and the file."""
        for file in self.path.rglob("*"):
            with suppress(OSError):
                found = file.lstat()
                if not stat.S_ISDIR(found.st_mode):
                    yield max(found.st_atime, found.st_mtime), max(found.st_size, _LEAST), file

    def _empty(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
