"""The gate in front of every number: both variants must decode the same picture from the same request."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ritocco_bench.asked import SCHEDULER
from ritocco_bench.painted import Painted
from ritocco_bench.worker import Job, Result

Execute = Callable[[Job], tuple[Result, float]]
"""Runs a job; returns its result and the `time.time()` at which its process was started."""

SIZE = 64
STEPS = 2
LARGEST_ERROR = 1e-4
OTHER_BYTES = 0.1  # of pictures in float32; none by more than one
SLACK = 2.0
LARGEST_ROUNDING = 0.5  # bytes, root mean square; 0.29 where numbers are rounded to the nearest
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
    """Both variants' decoded floats and pictures with one scheduler.

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

    A problem is a float32 error over LARGEST_ERROR; a float32 picture of which more than OTHER_BYTES are not
    diffusers' bytes, or one by more than 1; in the job's dtype a distance from the float32 truth (root mean
    square, of the floats or of the bytes) that is more than twice diffusers' own; and pictures that are not
    what was decoded, rounded.
    """
    with tempfile.TemporaryDirectory() as folder:

        def paint(variant: str, dtype: str) -> Painted:
            file = Path(folder) / f"{variant}-{dtype}.npz"
            run(replace(job, variant=variant, dtype=dtype, painted=str(file), until="end"))
            return Painted.read(file)

        truth, exact = paint("diffusers", "float32"), paint("ritocco", "float32")
        wide = job.dtype == "float32"
        ours, theirs = (exact, truth) if wide else (paint(v, job.dtype) for v in ("ritocco", "diffusers"))
    every = (truth, exact, ours, theirs)
    return [
        _judged(job, name, *(one.request(index) for one in every))
        for index, name in enumerate(job.schedulers)
    ]


def _judged(
    job: Job, scheduler: str, truth: Painted, exact: Painted, ours: Painted, theirs: Painted
) -> Comparison:
    return Comparison(
        scheduler=scheduler,
        error=_error(exact, truth),
        ours_db=_psnr(ours, truth),
        theirs_db=_psnr(theirs, truth),
        problem=_wide_problem(exact, truth)
        or (None if job.dtype == "float32" else _low_problem(job.dtype, ours, theirs, truth)),
    )


def _wide_problem(exact: Painted, truth: Painted) -> str | None:
    """Why float32 is not diffusers' float32."""
    error = _error(exact, truth)
    if not error <= LARGEST_ERROR:
        return f"float32: relative error {error:.2e}; at most {LARGEST_ERROR:.0e} is allowed"
    apart = np.abs(_bytes_apart(exact, truth))
    other = np.count_nonzero(apart) / apart.size
    if not (apart.max() <= 1 and other <= OTHER_BYTES):
        return (
            f"float32: {other:.1%} of the pictures' bytes are not diffusers', by up to {apart.max():g}; "
            f"{OTHER_BYTES:.0%} may be another, by 1"
        )
    return _rounding_problem("float32", exact)


def _low_problem(dtype: str, ours: Painted, theirs: Painted, truth: Painted) -> str | None:
    """Why a low dtype is further from the truth than it has to be."""
    floats = (_rms(one.decoded - truth.decoded) for one in (ours, theirs))
    pictures = (_rms(_bytes_apart(one, truth)) for one in (ours, theirs))
    for what, (mine, peers) in (("", floats), ("'s pictures", pictures)):
        if not mine <= SLACK * peers:
            return (
                f"{dtype}: {mine:.2e} from the float32 truth{what}, diffusers {peers:.2e}; at most {SLACK:g} "
                "times that is allowed"
            )
    return _rounding_problem(dtype, ours)


def _rounding_problem(name: str, painted: Painted) -> str | None:
    """Why pictures are not what was decoded, rounded to bytes."""
    levels = 127.5 * (np.clip(painted.decoded, -1.0, 1.0) + 1.0)
    rounding = _rms(np.moveaxis(levels, -3, -1) - painted.pictures)
    if rounding <= LARGEST_ROUNDING:
        return None
    rule = f"{rounding:.2f} bytes from what was decoded; at most {LARGEST_ROUNDING:g} is allowed"
    return f"{name}: the pictures lie {rule}"


def gate(job: Job, run: Execute) -> Parity:
    """`compare` on a small picture. Raises ParityError for a problem."""
    small = replace(job, size=SIZE, steps=STEPS, outputs=1, warm=1, schedulers=(SCHEDULER,))
    (found,) = compare(small, run)
    if found.problem is not None:
        raise ParityError(found.problem)
    return Parity(error=found.error, psnr_db=found.ours_db)


def distance(found: Painted, truth: Painted, *, least_db: float, name: str) -> Parity:
    """How far decoded floats lie from the truth. Raises ParityError under `least_db`, and where the pictures
    are not what was decoded, rounded.
    """
    passed = Parity(error=_error(found, truth), psnr_db=_psnr(found, truth))
    if not passed.psnr_db >= least_db:
        raise ParityError(
            f"{name}: {passed.psnr_db:.1f} dB from torch in float32; {least_db:g} dB are needed"
        )
    if (problem := _rounding_problem(name, found)) is not None:
        raise ParityError(problem)
    return passed


def refuse_further(ours: Parity, theirs: Parity, *, name: str, peer: str) -> None:
    """Beside a variant of diffusers in the same low dtype. Raises ParityError where ours lies more than SLACK
    times as far from the truth, 6 dB.
    """
    slack = 20 * math.log10(SLACK)
    if not ours.psnr_db >= theirs.psnr_db - slack:
        raise ParityError(
            f"{name}: {ours.psnr_db:.1f} dB from the float32 truth, {peer} {theirs.psnr_db:.1f} dB; at most "
            f"{slack:.0f} dB less is allowed"
        )


def _error(found: Painted, truth: Painted) -> float:
    return float(np.abs(found.decoded - truth.decoded).max() / np.abs(truth.decoded).max())


def _bytes_apart(found: Painted, truth: Painted) -> npt.NDArray[np.float64]:
    return found.pictures.astype(np.float64) - truth.pictures


def _rms(values: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _psnr(found: Painted, truth: Painted) -> float:
    error = _rms(found.decoded - truth.decoded)
    return min(MOST_DB, 20 * math.log10(float(np.ptp(truth.decoded)) / error)) if error else MOST_DB
