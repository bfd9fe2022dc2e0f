"""One variant in one process: `python -m ritocco_bench.worker JOB RESULT`, a JSON text and a file."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ritocco_bench.variants import VARIANTS, exact_float32, synchronize


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one process does.

    until: `first_step` of a fresh process; its first `picture`, then `runs` more; or `end`, `runs` times
    after a warm-up of one step, or of `warm` whole requests where those are more than one. schedulers: in
    place of `runs`, one run with each. size: height and width in pixels. decoded: where the last run's
    decoded floats go, those of each scheduler, as .npy; or empty.
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
    decoded: str = ""
    schedulers: tuple[str, ...] = ()
    backend: str = "torch"


@dataclass(kw_only=True, slots=True)
class Result:
    """What a process reports. loaded, stepped: `time.time()`; of the first step or picture.

    seconds: a dict of phases for each run."""

    loaded: float
    stepped: float = 0.0
    seconds: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int | None = None


class _Reached(Exception):  # noqa: N818 - no error
    """The first step is done."""


def perform(job: Job) -> Result:
    """Do a job in this process. Raises ValueError for a variant that is not one of `VARIANTS`."""
    if job.variant not in VARIANTS:
        raise ValueError(f"variant is {job.variant!r}; it must be one of {', '.join(VARIANTS)}")
    side = VARIANTS[job.variant](job)
    result = Result(loaded=time.time())
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
    for _ in range(job.warm):
        side.run(job.steps if job.until == "picture" or job.warm > 1 else 1, lambda: None)
    result.stepped = time.time()
    if job.schedulers:
        import numpy as np

        pictures = []
        for scheduler in job.schedulers:
            result.seconds.append(side.run(job.steps, lambda: None, scheduler))
            pictures.append(side.decoded)
        np.save(job.decoded, np.stack(pictures))
        return result
    result.seconds = [side.run(job.steps, lambda: None) for _ in range(job.runs)]
    result.peak_bytes = peak_bytes(job.device)
    if job.decoded:
        import numpy as np

        np.save(job.decoded, side.decoded)
    return result


def peak_bytes(device: str) -> int | None:
    """Most memory of this process so far: allocated on a GPU, else resident; None where unknown (Windows)."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # `ru_maxrss` of a child begins with its parent's
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return None


def main() -> None:
    """The process: the job is the first argument, the result goes to the file that is the second."""
    result = perform(Job(**json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
