"""The folder of what people upload to the page: private, emptied at start and end, expired between."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ritocco.errors import RequestError


class Room:
    """path: absolute, without links."""

    def __init__(self, data: Path | None) -> None:
        """data: the server's data folder, under which it lies; None takes a temporary folder."""
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
        return Path(path).resolve()

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

    def _empty(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
