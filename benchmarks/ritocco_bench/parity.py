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


def gate(job: Job, run: Execute) -> Parity:
    """Both variants on a small picture, in float32 and in the measured dtype.

    Raises ParityError where float32 differs by more than 1e-4, or where ritocco's distance from the float32
    truth in the measured dtype (root mean square) is more than twice diffusers' own.
    """
    with tempfile.TemporaryDirectory() as folder:

        def decode(variant: str, dtype: str) -> npt.NDArray[np.float64]:
            file = Path(folder) / f"{variant}-{dtype}.npy"
            small = replace(job, size=SIZE, steps=STEPS, outputs=1, runs=1, until="end")
            run(replace(small, variant=variant, dtype=dtype, decoded=str(file)))
            decoded: npt.NDArray[np.float64] = np.load(file).astype(np.float64)
            return decoded

        truth, exact = decode("diffusers", "float32"), decode("ritocco", "float32")
        error = float(np.abs(exact - truth).max() / np.abs(truth).max())
        if not error <= LARGEST_ERROR:
            raise ParityError(f"float32: relative error {error:.2e}; at most {LARGEST_ERROR:.0e} is allowed")
        if job.dtype == "float32":
            return Parity(error=error, psnr_db=_psnr(exact, truth))
        ours, theirs = decode("ritocco", job.dtype), decode("diffusers", job.dtype)
        if not _rms(ours - truth) <= SLACK * _rms(theirs - truth):
            raise ParityError(
                f"{job.dtype}: {_rms(ours - truth):.2e} from the float32 truth, diffusers "
                f"{_rms(theirs - truth):.2e}; at most {SLACK:g} times that is allowed"
            )
        return Parity(error=error, psnr_db=_psnr(ours, truth))


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
