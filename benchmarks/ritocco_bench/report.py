"""Rows of results, the environment they were obtained in, and the table printed from them."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "ritocco", "diffusers", "transformers", "accelerate", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where and when a row was obtained.

    machine: name of the processor, or of the GPU and its power limit. cores: logical processors. driver: of
    the GPU, empty on a CPU. versions: of Python and the packages that matter, empty where not installed
    (without accelerate, diffusers fills its networks with random numbers before it loads them).
    git_sha: of the sources, with `-dirty` where tracked files differ. utc: ISO 8601, seconds.
    """

    machine: str
    cores: int
    driver: str
    versions: dict[str, str]
    git_sha: str
    utc: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One phase of one variant in one case.

    each_ms: the raw samples, in the order they were taken: a variant's n-th belongs to its peer's n-th.
    peak_bytes: of the whole process, resident (CUDA: allocated); None where a phase has no peak of its own.
    parity_error, parity_psnr_db: of the gate that was passed, see `cases.Parity`.
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

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row that `to_json` wrote. Raises ValueError that names what is missing or unknown."""
        held: dict[str, Any] = json.loads(line)
        if differing := {field.name for field in fields(cls)} ^ held.keys():
            raise ValueError(f"not a row of this version: {', '.join(sorted(differing))}")
        environment = Environment(**held.pop("environment"))
        return cls(**{**held, "each_ms": tuple(held["each_ms"])}, environment=environment)


def quantile(samples: Sequence[float], part: float) -> float:
    """The value below which `part` (0 to 1) of the samples lie, linear between neighbours, as NumPy's default."""
    ordered = sorted(samples)
    if not ordered or not 0 <= part <= 1:
        raise ValueError(f"quantile {part} of {len(ordered)} samples; it must be 0 to 1 of at least one")
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def append_rows(file: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a JSONL file, made where it is missing; nothing in it is ever changed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(row.to_json() + "\n" for row in rows)


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text; below it, for each phase of both variants, diffusers' time over ritocco's."""
    head = ("case", "variant", "phase", "p50 s", "p20 s", "p80 s", "min s", "max s", "n", "peak MiB")
    lines = [head]
    for row in rows:
        seconds = (row.p50_ms, row.p20_ms, row.p80_ms, min(row.each_ms), max(row.each_ms))
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        numbers = (*(f"{one / 1000:.3f}" for one in seconds), str(row.samples), peak)
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


def environment(device: str) -> Environment:
    """This machine, now. device: as torch writes it."""
    driver = ""
    machine = _processor()
    if device.startswith("cuda"):
        import torch

        machine = torch.cuda.get_device_name(device)
        driver, limit = _nvidia(torch.device(device).index or 0)
        machine = f"{machine}, {limit}" if limit else machine
    return Environment(
        machine=machine,
        cores=os.cpu_count() or 0,
        driver=driver,
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        git_sha=_git_sha(),
        utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _ratios(rows: Sequence[Row]) -> list[str]:
    ours = {(row.case, row.phase): row for row in rows if row.variant == "ritocco"}
    lines = []
    for row in rows:
        mine = ours.get((row.case, row.phase))
        if row.variant == "ritocco" or mine is None:
            continue
        each = ratios(mine, row)
        lines.append(
            f"{row.case} {row.phase}: {row.variant} / ritocco {statistics.median(each):.2f} "
            f"({min(each):.2f} to {max(each):.2f}; pairs {' '.join(f'{one:.2f}' for one in each)})"
        )
    return lines


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _git_sha() -> str:
    sha = _output("git", "rev-parse", "HEAD")
    return sha + "-dirty" if sha and _output("git", "status", "--porcelain", "-uno") else sha


def _nvidia(index: int) -> tuple[str, str]:
    query = "--query-gpu=driver_version,power.limit"
    driver, _, limit = _output("nvidia-smi", query, "--format=csv,noheader", "-i", str(index)).partition(", ")
    return driver, limit
