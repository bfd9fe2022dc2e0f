"""Recorded requests of many users: what was asked for, and when. For the benchmark of batching."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

FILE = Path("benchmarks/traces/mixed.jsonl")
REQUESTS, LEAST_STEPS, MOST_STEPS, SIZES = 32, 4, 100, 2
MEAN_STEPS = (LEAST_STEPS + MOST_STEPS) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One after the other. seed: what it was drawn with. steps: of each request. sizes: which of two. gaps:
    between one and the next, in units of their mean; the first comes after the first gap.
    """

    seed: int
    steps: tuple[int, ...]
    sizes: tuple[int, ...]
    gaps: tuple[float, ...]

    def arrivals(self, mean_gap: float) -> list[float]:
        """Seconds; 0 for all at once."""
        return [float(at) for at in np.cumsum(self.gaps) * mean_gap]


def draw(seed: int) -> Trace:
    """Steps from 4 to 100 and two sizes, all as likely; arrivals of a Poisson process."""
    rng = np.random.default_rng(seed)
    return Trace(
        seed=seed,
        steps=tuple(int(one) for one in rng.integers(LEAST_STEPS, MOST_STEPS + 1, REQUESTS)),
        sizes=tuple(int(one) for one in rng.integers(0, SIZES, REQUESTS)),
        gaps=tuple(round(float(one), 4) for one in rng.exponential(1.0, REQUESTS)),
    )


def read(file: Path = FILE) -> list[Trace]:
    """The traces of a file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [
        Trace(seed=one["seed"], steps=tuple(one["steps"]), sizes=tuple(one["sizes"]), gaps=tuple(one["gaps"]))
        for one in map(json.loads, lines)
    ]


def write(file: Path, traces: Sequence[Trace]) -> None:
    """One a line."""
    lines = [json.dumps(asdict(one), separators=(",", ":")) for one in traces]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
