"""Benchmark jobs without their processes, and rows of made-up times."""

from __future__ import annotations

import time
import warnings
from functools import cache

from ritocco_bench import environment, report, worker


def in_process(job: worker.Job) -> tuple[worker.Result, float]:
    """`processes.execute` without the process: quick, as the imports are shared."""
    started = time.time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return worker.perform(job), started


def row(variant: str, phase: str = "total", each: tuple[float, ...] = (10.0, 20.0, 40.0)) -> report.Row:
    """A row of made-up times."""
    return report.Row(
        case="64x64",
        model="tiny",
        device="cpu",
        dtype="float32",
        variant=variant,
        phase=phase,
        p20_ms=min(each),
        p50_ms=each[1],
        p80_ms=max(each),
        samples=len(each),
        each_ms=each,
        peak_bytes=3 << 20 if phase == "total" else None,
        parity_error=1e-6,
        parity_psnr_db=90.0,
        environment=_here(),
    )


@cache
def _here() -> environment.Environment:
    """One for all rows, as of one run: each call has a time of its own."""
    return environment.environment("cpu")
