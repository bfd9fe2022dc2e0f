"""Jobs in fresh processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

from ritocco_bench.worker import ENDED, Job, Result


class BenchError(RuntimeError):
    """A benchmark process failed, or a package that it needs is missing; the message ends with its words."""


class Process(AbstractContextManager["Process"]):
    """A job that runs, from the moment that this is made. Leaving it kills what still runs."""

    def __init__(self, job: Job) -> None:
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        variables |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"}
        self._folder = tempfile.TemporaryDirectory()
        self._answer, self._words = (Path(self._folder.name) / name for name in ("result.json", "stderr"))
        self._line, far = socket.socketpair()
        self._name = job.variant
        if job.turns is not None:
            job = replace(job, turns=far.fileno())
        command = [sys.executable, "-m", "ritocco_bench.worker", json.dumps(asdict(job)), str(self._answer)]
        self.started = time.time()
        with self._words.open("wb") as words:
            self._process = subprocess.Popen(
                command, env=variables, stdout=subprocess.DEVNULL, stderr=words, pass_fds=(far.fileno(),)
            )
        far.close()

    def __exit__(self, *_: object) -> None:
        self._line.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def ready(self) -> None:
        """Wait until it is loaded and warm, or done with the run before. Raises BenchError where it ended."""
        try:
            ended = self._line.recv(1) == ENDED
        except ConnectionError:
            ended = True
        if ended:
            self._refuse_ended()

    def go(self) -> None:
        """Let it do one run. Raises BenchError where it ended."""
        try:
            self._line.sendall(b"g")
        except ConnectionError:
            self._refuse_ended()

    def _refuse_ended(self) -> None:
        self.result()
        raise BenchError(f"{self._name}: ended before its runs were done")

    def result(self) -> Result:
        """Wait for its end. Raises BenchError with the last lines that it wrote."""
        status = self._process.wait()
        if status or not self._answer.is_file():
            words = self._words.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise BenchError(f"{self._name}: exit status {status}\n{words}")
        return Result(**json.loads(self._answer.read_text(encoding="utf-8")))


def execute(job: Job) -> tuple[Result, float]:
    """Run a job in a fresh process; its start as `time.time()`. Raises BenchError."""
    with Process(job) as process:
        return process.result(), process.started
