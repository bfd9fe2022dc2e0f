"""What the machine can do at most: products and copies, measured by torch on the device at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 5
ON_CPU, ON_GPU = (4096, 1 << 27), (8192, 1 << 29)
"""Rows of the product, numbers of the copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """matmul_flop_per_s: of a large product in the dtype, on random data. copy_bytes_per_s: of a large copy,
    reads and writes counted.
    """

    matmul_flop_per_s: float
    copy_bytes_per_s: float


def ceilings(device: str, dtype: str) -> Ceilings:
    """Medians of REPEATS. dtype: as torch writes it; what `auto` is has to be known by now."""
    on_gpu = device.startswith("cuda")
    side, numbers = ON_GPU if on_gpu else ON_CPU
    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    product = torch.empty_like(a)
    rate = 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=product), on_gpu)
    x = torch.ones(numbers, device=device)
    y = torch.empty_like(x)
    moved = 2 * numbers * 4 / _seconds(lambda: torch.mul(x, 1.0, out=y), on_gpu)
    return Ceilings(matmul_flop_per_s=rate, copy_bytes_per_s=moved)


def _seconds(call: Callable[[], object], on_gpu: bool) -> float:
    """Of a call, the median, after one that is not counted."""
    call()
    return statistics.median((_on_gpu if on_gpu else _on_cpu)(call) for _ in range(REPEATS))


def _on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_gpu(call: Callable[[], object]) -> float:
    begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(5):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 5 / 1000
