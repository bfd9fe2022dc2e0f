"""Rows of results, the file they are appended to, and the table printed from them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ritocco_bench.environment import Environment


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One phase of one variant in one case.

    each_ms: the raw samples, in the order they were taken: a variant's n-th belongs to its peer's n-th.
    peak_bytes: of the whole process, resident (CUDA: allocated); None where a phase has no peak of its own.
    parity_error, parity_psnr_db: of the gate that was passed, see `parity.Parity`. flop: what the phase has
    to compute, as everybody counts it. matmul_flop_per_s, copy_bytes_per_s: what the machine reached in the
    same run, see `ceilings.Ceilings`; None in phases, and rows, without.
    """

    case: str
    model: str
    device: str
    dtype: str
    variant: str
    phase: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int
    each_ms: tuple[float, ...]
    peak_bytes: int | None
    parity_error: float
    parity_psnr_db: float
    environment: Environment
    flop: float | None = None
    matmul_flop_per_s: float | None = None
    copy_bytes_per_s: float | None = None

    @property
    def flop_per_s(self) -> float | None:
        """What was reached, by the median."""
        return None if self.flop is None or not self.p50_ms else 1000 * self.flop / self.p50_ms

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row that `to_json` wrote. Raises ValueError that names what is missing or unknown."""
        held: dict[str, Any] = json.loads(line)
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        unknown = held.keys() - {field.name for field in fields(cls)}
        if differing := (needed - held.keys()) | unknown:
            raise ValueError(f"not a row of this version: {', '.join(sorted(differing))}")
        for name in ("p20_ms", "p50_ms", "p80_ms"):
            if not isinstance(held[name], int | float):
                raise ValueError(f"{name} is no number")
        environment = Environment(**held.pop("environment"))
        return cls(**{**held, "each_ms": tuple(held["each_ms"])}, environment=environment)


def append_rows(file: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a JSONL file, made where it is missing; nothing in it is ever changed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write("".join(row.to_json() + "\n" for row in rows))


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text; below it the ratios of each phase: diffusers over ritocco, plain over hoisted."""
    head = (
        "case",
        "variant",
        "phase",
        "p50 s",
        "p20 s",
        "p80 s",
        "min s",
        "max s",
        "n",
        "peak MiB",
        "GFLOP/s",
    )
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        seconds = (row.p50_ms, row.p20_ms, row.p80_ms, min(row.each_ms), max(row.each_ms))
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        rate = "" if row.flop_per_s is None else f"{row.flop_per_s / 1e9:.0f}"
        numbers = (*(f"{one / 1000:.3f}" for one in seconds), str(row.samples), peak, rate)
        lines.append((row.case, row.variant, row.phase, *numbers))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*(line.rstrip() for line in text), *_ratios(rows)])


def ratios(ours: Row, theirs: Row) -> list[float]:
    """Their time over ours, pair by pair: above 1 where ours is faster."""
    return [b / a if a > 0 else math.inf for a, b in zip(ours.each_ms, theirs.each_ms, strict=True)]


def _ratios(rows: Sequence[Row]) -> list[str]:
    held = {(row.case, row.phase, row.variant): row for row in rows}
    lines = []
    for row in rows:
        name, _, kind = row.variant.rpartition("-")
        base = f"{name}-hoisted" if kind == "plain" else "ritocco"
        mine = held.get((row.case, row.phase, base))
        if row is mine or mine is None:
            continue
        each = ratios(mine, row)
        lines.append(
            f"{row.case} {row.phase}: {row.variant} / {base} {statistics.median(each):.2f} "
            f"({min(each):.2f} to {max(each):.2f}; pairs {' '.join(f'{one:.2f}' for one in each)})"
        )
    return lines
