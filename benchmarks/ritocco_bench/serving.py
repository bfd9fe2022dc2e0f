"""`ritocco serve` as a process of its own, with the embedded model unless an option says otherwise."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TOKEN = "correct-horse-battery-staple"  # noqa: S105 - of servers that live for a test
_LISTENING = re.compile(r"listening on (http://\S+)")


@dataclass
class Served:
    """url: where it listens. log: what it wrote to stderr so far."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)
    _reader: threading.Thread | None = None

    def read(self) -> None:
        """Until it listens; the rest is read beside."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := _LISTENING.match(line):
                self.url = found[1]
                break
        self._reader = threading.Thread(
            target=lambda: self.log.extend(self.process.stderr or ()), daemon=True
        )
        self._reader.start()
        assert self.url, "".join(self.log)

    def close(self) -> None:
        """Once it ended."""
        assert self._reader is not None
        assert self.process.stderr is not None
        self._reader.join(30)
        self.process.stderr.close()

    def end(self, number: int) -> int:
        """Send it a signal and wait; its status."""
        self.process.send_signal(number)
        status = self.process.wait(60)
        self.close()
        return status


@contextmanager
def served(
    folder: Path, *options: object, script: str | None = None, database: str | None = None
) -> Iterator[Served]:
    """A server on a free port, with TOKEN, its data in the folder; killed at the end if it still runs.

    script: Python that runs `ritocco.cli.main` itself. database: URL of the one that holds its data instead.
    """
    folder.mkdir(exist_ok=True)
    tokens = folder / "tokens.txt"
    tokens.write_text(f"{TOKEN}\n", encoding="utf-8")
    given = ["--port", 0, "--token-file", tokens, *options]
    if database is None:
        given += ["--data", folder / "data"]
    begin = ["-m", "ritocco"] if script is None else ["-c", script]
    command = [sys.executable, *begin, "serve", *map(str, given)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if database is not None:
        env["RITOCCO_DATABASE"] = database
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    made = Served(process)
    try:
        made.read()
        yield made
    finally:
        if process.poll() is None:
            made.end(signal.SIGKILL)
