"""Files on disk: where what can be made again is kept, writing whole, and clearing what was left behind."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from ritocco.errors import BackendError
from ritocco.shown import shown

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
