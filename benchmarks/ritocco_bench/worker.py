"""One variant in one process: `python -m ritocco_bench.worker JOB RESULT`, a JSON text and a file."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ritocco_bench.asked import exact_float32, synchronize
from ritocco_bench.peaks import Peaks, peak_bytes
from ritocco_bench.variants import described

ENDED = b""  # what is read from a socket whose other side is closed


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one process does.

    until: `loaded`; `first_step` of a fresh process; `picture`, its first one, more up to `warm`, then
    `runs`; or `end`, `runs` times after a warm-up of one step, or of `warm` whole requests where those are
    more than one. peaks: whether one more run looks at each phase's memory. schedulers: in place of `runs`,
    one run with each. size: height and width in pixels. painted: the file for what the last run painted, or
    that with each scheduler, see `painted.Painted`; or empty. turns: the descriptor of a socket, on which
    the process says that it is ready before each of its runs and once after them, and waits for a word.
    """

    variant: str
    model: str
    device: str
    dtype: str
    size: int
    steps: int
    outputs: int = 1
    runs: int = 1
    warm: int = 1
    until: str = "end"
    seed: int = 0
    painted: str = ""
    schedulers: tuple[str, ...] = ()
    backend: str = "torch"
    peaks: bool = False
    turns: int | None = None


@dataclass(kw_only=True, slots=True)
class Result:
    """What a process reports. loaded, stepped: `time.time()`; of the first step or picture.

    seconds: a dict of phases for each run. peaks: phase -> most memory in it.
    """

    loaded: float
    stepped: float = 0.0
    seconds: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int | None = None
    peaks: dict[str, int] = field(default_factory=dict)


class _Reached(Exception):  # noqa: N818 - no error
    """The first step is done."""


def perform(job: Job) -> Result:
    """Do a job in this process. Raises ValueError for a variant that is not one of `VARIANTS`."""
    side = described(job.variant).load(job)
    result = Result(loaded=time.time())
    if job.until == "loaded":
        return result
    if job.dtype == "float32":
        exact_float32(job.device)
    if job.until == "first_step":

        def reached() -> None:
            synchronize(job.device)
            result.stepped = time.time()
            raise _Reached

        try:
            side.run(job.steps, reached)
        except _Reached:
            return result
    for index in range(job.warm):
        side.run(job.steps if job.until == "picture" or job.warm > 1 else 1, lambda: None)
        if index == 0:
            result.stepped = time.time()
    if job.schedulers:
        each = []
        for scheduler in job.schedulers:
            result.seconds.append(side.run(job.steps, lambda: None, scheduler))
            each.append((side.decoded, side.pictures))
        _write(job.painted, each)
        return result
    for _ in range(job.runs):
        _await_turn(job.turns)
        result.seconds.append(side.run(job.steps, lambda: None))
    _await_turn(job.turns)
    result.peak_bytes = peak_bytes(job.device)
    if job.peaks:
        side.peaks = Peaks(job.device)
        side.run(job.steps, lambda: None)
        result.peaks = side.peaks.held
    if job.painted:
        _write(job.painted, [(side.decoded, side.pictures)])
    return result


def _write(file: str, each: list[tuple[Any, Any]]) -> None:
    import numpy as np

    from ritocco_bench.painted import Painted

    decoded, pictures = zip(*each, strict=True)
    Painted(decoded=np.stack(decoded), pictures=np.stack(pictures)).write(file)


def _await_turn(line: int | None) -> None:
    """Raises SystemExit where nobody is there to say it any more."""
    if line is not None:
        os.write(line, b"r")
        if os.read(line, 1) == ENDED:
            raise SystemExit("the process that was to give the word has ended")


def main() -> None:
    """The process: the job is the first argument, the result goes to the file that is the second."""
    result = perform(Job(**json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
