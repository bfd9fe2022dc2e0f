"""What became of each picture: a line of JSON each, appended when its files are on the disk.

A line has name, image, mask, status (`succeeded` or `failed`), outputs (names of files in the same folder),
error, input (with the seed), options, version, key, seconds, completed_at. The last line of a name counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ritocco.errors import RequestError
from ritocco.shown import said

NAME = "manifest.jsonl"


class Manifest:
    """Of one folder, for one process at a time, and one thread."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there. A last line that a lost process left in its middle is cut off.

        Raises RequestError where another line is none of ours, OSError where the folder can't be used.
        """
        self._folder, file = folder, folder / NAME
        self._lines: dict[str, dict[str, Any]] = {}
        self._stream = file.open("ab+")
        try:
            self._read(file)
        except BaseException:
            self._stream.close()
            raise

    def done(self, name: str, key: str) -> bool:
        """Whether a picture was painted from just this, and its files are there."""
        return is_done(self._folder, self._lines.get(name), key)

    def line(self, name: str) -> dict[str, Any] | None:
        """The last line of a picture."""
        return self._lines.get(name)

    def append(self, line: dict[str, Any]) -> None:
        """On the disk when this returns. Raises OSError, and then nothing was appended."""
        try:
            data = json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n"
        except UnicodeEncodeError:  # a file's name that is no UTF-8
            data = json.dumps(line).encode("ascii") + b"\n"
        end = self._stream.seek(0, os.SEEK_END)
        try:
            self._stream.write(data)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError:
            self._stream.truncate(end)
            raise
        self._lines[line["name"]] = line

    def __enter__(self) -> Manifest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def _read(self, file: Path) -> None:
        self._stream.seek(0)
        whole = 0
        for number, data in enumerate(self._stream, 1):
            if not data.endswith(b"\n"):
                self._stream.truncate(whole)
                break
            whole += len(data)
            try:
                line = json.loads(data.decode("utf-8", "surrogateescape"))
                if not (isinstance(line["name"], str) and isinstance(line["outputs"], list)):
                    raise TypeError("no line of a manifest")
                self._lines[line["name"]] = {"status": line["status"], **line}
            except (ValueError, KeyError, TypeError) as error:
                what = f"line {number} of {str(file)!r} is no JSON of this program's ({said(error)})"
                raise RequestError(f"--out: {what}; name another folder", field="out") from error


def is_done(folder: Path, line: Mapping[str, Any] | None, key: str) -> bool:
    """Whether a line says that a picture was painted from just this, and its files are there."""
    if line is None or line["status"] != "succeeded" or line.get("key") != key:
        return False
    return all((folder / output).is_file() for output in line["outputs"])
