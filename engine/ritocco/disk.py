"""Files on disk: where what can be made again is kept, writing whole, and clearing what was left behind."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ritocco.errors import BackendError
from ritocco.shown import shown

if TYPE_CHECKING:
    import sqlite3

_DAY = 24 * 60 * 60


def cache_root() -> Path:
    """Where what can be made again is kept: RITOCCO_CACHE, else the platform's folder for caches.

    Raises BackendError for a name that the runtimes, which put files there, can't open.
    """
    root = _cache_root()
    if not is_utf8(root):
        raise BackendError(
            f"{shown(str(root))}: no UTF-8, so runtimes can't open it; set RITOCCO_CACHE to another folder"
        )
    return root


def is_utf8(path: Path) -> bool:
    """Whether a name can be told to libraries in C++, which take UTF-8 alone."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _cache_root() -> Path:
    if named := os.environ.get("RITOCCO_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "ritocco"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ritocco"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ritocco"


def write_whole(file: Path, data: bytes | memoryview) -> None:
    """Write a file that is there whole, or as it was before."""
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def hold(folder: Path, option: str, *, hidden: bool = False) -> sqlite3.Connection:
    """The folder is this process's until the result is closed or the process ends, however it ends: SQLite's
    locks, which every system has, go with it.

    option: that named the folder, for the message. Raises BackendError where another process has it, or
    nothing can be written there.
    """
    import sqlite3

    file = folder / (".in-use.sqlite" if hidden else "in-use.sqlite")
    held: sqlite3.Connection | None = None
    try:
        held = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=0)
        held.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        if held is not None:
            held.close()
        why = "another process is using" if "locked" in str(error) else f"can't be used: {error}"
        raise BackendError(f"{option} is {str(folder)!r}, which {why}") from error
    return held


def sweep(folder: Path, pattern: str, *, days: float) -> None:
    """Delete the files and folders of a name in which nothing was written for so long; what can't be, stays.

    pattern: as of `Path.glob`.
    """
    with suppress(OSError):
        for path in folder.glob(pattern):
            with suppress(OSError):
                if time.time() - _written(path) > days * _DAY:
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()


def _written(path: Path) -> float:
    """When anything in it was, in seconds since the epoch."""
    inside = list(path.rglob("*")) if path.is_dir() and not path.is_symlink() else []
    return max(one.lstat().st_mtime for one in [path, *inside])
