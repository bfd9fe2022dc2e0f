"""The gate in front of every number: both variants must decode the same picture from the same request."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ritocco_bench.asked import SCHEDULER
from ritocco_bench.worker import Job, Result

Execute = Callable[[Job], tuple[Result, float]]
"""Runs a job; returns its result and the `time.time()` at which its process was started."""

SIZE = 64
STEPS = 2
LARGEST_ERROR = 1e-4
SLACK = 2.0
MOST_DB = 200.0


class ParityError(RuntimeError):
    """The variants do not paint the same picture, so their times say nothing. Names what was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """That the gate was passed: a row can't be made without one. On decoded floats of the same request.

    error: largest difference in float32 over the largest magnitude. psnr_db: of ritocco in the measured dtype
    against that truth, the peak being the truth's own range; 200 where nothing differs.
    """

    error: float
    psnr_db: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Both variants' decoded floats with one scheduler.

    error: in float32, the largest difference over the largest magnitude. ours_db, theirs_db: PSNR of each in
    the measured dtype against diffusers in float32. problem: why the two do not paint the same picture, or
    None.
    """

    scheduler: str
    error: float
    ours_db: float
    theirs_db: float
    problem: str | None


def compare(job: Job, run: Execute) -> list[Comparison]:
    """Both variants in float32 and in the job's dtype, with each of its schedulers.

    A problem is a float32 error over 1e-4, and in the job's dtype a distance from the float32 truth (root
    mean square) that is more than twice diffusers' own.
    """
    with tempfile.TemporaryDirectory() as folder:

        def decode(variant: str, dtype: str) -> npt.NDArray[np.float64]:
            file = Path(folder) / f"{variant}-{dtype}.npy"
            run(replace(job, variant=variant, dtype=dtype, decoded=str(file), until="end"))
            decoded: npt.NDArray[np.float64] = np.load(file).astype(np.float64)
            return decoded

        truth, exact = decode("diffusers", "float32"), decode("ritocco", "float32")
        wide = job.dtype == "float32"
        ours, theirs = (exact, truth) if wide else (decode(v, job.dtype) for v in ("ritocco", "diffusers"))
    return [
        _judged(job, name, *each)
        for name, *each in zip(job.schedulers, truth, exact, ours, theirs, strict=True)
    ]


def _judged(job: Job, scheduler: str, *pictures: npt.NDArray[np.float64]) -> Comparison:
    truth, exact, ours, theirs = pictures
    error, problem = float(np.abs(exact - truth).max() / np.abs(truth).max()), None
    if not error <= LARGEST_ERROR:
        problem = f"float32: relative error {error:.2e}; at most {LARGEST_ERROR:.0e} is allowed"
    elif job.dtype != "float32" and not _rms(ours - truth) <= SLACK * _rms(theirs - truth):
        problem = (
            f"{job.dtype}: {_rms(ours - truth):.2e} from the float32 truth, diffusers "
            f"{_rms(theirs - truth):.2e}; at most {SLACK:g} times that is allowed"
        )
    return Comparison(
        scheduler=scheduler,
        error=error,
        ours_db=_psnr(ours, truth),
        theirs_db=_psnr(theirs, truth),
        problem=problem,
    )


def gate(job: Job, run: Execute) -> Parity:
    """`compare` on a small picture. Raises ParityError for a problem."""
    small = replace(job, size=SIZE, steps=STEPS, outputs=1, warm=1, schedulers=(SCHEDULER,))
    (found,) = compare(small, run)
    if found.problem is not None:
        raise ParityError(found.problem)
    return Parity(error=found.error, psnr_db=found.ours_db)


def distance(
    found: npt.NDArray[np.floating[Any]], truth: npt.NDArray[np.floating[Any]], *, least_db: float, name: str
) -> Parity:
    """How far a decoded picture lies from the truth. Raises ParityError under `least_db`."""
    ours, exact = found.astype(np.float64), truth.astype(np.float64)
    passed = Parity(error=float(np.abs(ours - exact).max() / np.abs(exact).max()), psnr_db=_psnr(ours, exact))
    if not passed.psnr_db >= least_db:
        raise ParityError(
            f"{name}: {passed.psnr_db:.1f} dB from torch in float32; {least_db:g} dB are needed"
        )
    return passed


def _rms(values: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _psnr(ours: npt.NDArray[np.float64], truth: npt.NDArray[np.float64]) -> float:
    error = _rms(ours - truth)
    return min(MOST_DB, 20 * math.log10(float(np.ptp(truth)) / error)) if error else MOST_DB
