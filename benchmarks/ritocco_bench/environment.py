"""Where and when results were obtained."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("torch", "triton", "ritocco", "diffusers", "transformers", "accelerate", "safetensors", "numpy")
SOURCES = ("ritocco_kernels", "ritocco", "ritocco_export", "ritocco_bench")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where and when a row was obtained.

    machine: name of the processor, or of the GPU and its power limit. cores: logical processors. driver: of
    the GPU, empty on a CPU. versions: of Python and the packages that matter, empty where not installed
    (without accelerate, diffusers fills its networks with random numbers before it loads them).
    git_sha: of the sources, `-dirty` where tracked ones (but results) differ. utc: ISO 8601, seconds.
    sources: 12 hex digits of what the four packages' Python files say, committed or not. power_limit_w,
    sm_clock_mhz, memory_clock_mhz: of the GPU as it was found, before the work; None on a CPU, where
    nvidia-smi does not tell, and in older rows.
    """

    machine: str
    cores: int
    driver: str
    versions: dict[str, str]
    git_sha: str
    utc: str
    sources: str = ""
    power_limit_w: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None


def environment(device: str) -> Environment:
    """This machine, now. device: as torch writes it."""
    driver, held = "", dict[str, str]()
    limit = sm_clock = memory_clock = None
    machine = _processor()
    if device.startswith("cuda"):
        import torch

        machine = torch.cuda.get_device_name(device)
        held = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
        driver, limit, sm_clock, memory_clock = _nvidia(torch.device(device).index or 0)
        machine = machine if limit is None else f"{machine}, {limit:.2f} W"
    return Environment(
        machine=machine,
        cores=os.cpu_count() or 0,
        driver=driver,
        versions={
            "python": platform.python_version(),
            **held,
            **{name: _version(name) for name in PACKAGES},
        },
        git_sha=_git_sha(),
        utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        sources=_sources(),
        power_limit_w=limit,
        sm_clock_mhz=sm_clock,
        memory_clock_mhz=memory_clock,
    )


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
    changed = ("git", "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results")
    return sha + "-dirty" if sha and _output(*changed) else sha


def _sources() -> str:
    digest = hashlib.sha256()
    for package in SOURCES:
        found = find_spec(package)
        for root in () if found is None else found.submodule_search_locations or ():
            for file in sorted(Path(root).rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(root).as_posix()}".encode() + b"\0")
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _nvidia(index: int) -> tuple[str, float | None, float | None, float | None]:
    """The driver; W, MHz and MHz, each None where it is not told."""
    query = "--query-gpu=driver_version,power.limit,clocks.sm,clocks.mem"
    told = _output("nvidia-smi", query, "--format=csv,noheader,nounits", "-i", str(index)).split(", ")
    driver, limit, sm_clock, memory_clock = told if len(told) == 4 else ("", "", "", "")
    return driver, _number(limit), _number(sm_clock), _number(memory_clock)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
