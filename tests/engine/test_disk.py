"""Files on disk: where the cache is, whole writes, and what is swept."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from ritocco.disk import cache_root, sweep, write_whole
from ritocco.errors import BackendError


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RITOCCO_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("RITOCCO_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "ritocco"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_root() == tmp_path / "local" / "ritocco"


def test_a_cache_that_runtimes_could_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RITOCCO_CACHE", "/x/\udcff")
    said = r"'/x/\udcff': no UTF-8, so runtimes can't open it; set RITOCCO_CACHE"
    with pytest.raises(BackendError, match=re.escape(said)):
        cache_root()


def test_a_file_is_written_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kept"
    write_whole(file, b"first")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"second")
    assert file.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [file]


def test_what_was_not_written_to_for_long_is_swept(tmp_path: Path) -> None:
    two_days_ago = time.time() - 2 * 24 * 60 * 60
    for name in ("old", "used", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x", encoding="utf-8")
    (tmp_path / "old.txt").write_text("x", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("old/file", "old", "used", "old.txt", "link"):
        os.utime(tmp_path / name, (two_days_ago, two_days_ago), follow_symlinks=False)
    sweep(tmp_path, "*", days=3)
    assert len(list(tmp_path.iterdir())) == 5
    sweep(tmp_path, "o*", days=1)
    sweep(tmp_path, "[!o]*", days=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "used"]
    assert (tmp_path / "new" / "file").is_file()
    sweep(tmp_path / "not there", "*", days=1)
