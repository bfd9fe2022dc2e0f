"""Where and when results were obtained."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "ritocco", "diffusers", "transformers", "accelerate", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where and when a row was obtained.

    machine: name of the processor, or of the GPU and its power limit. cores: logical processors. driver: of
    the GPU, empty on a CPU. versions: of Python and the packages that matter, empty where not installed
    (without accelerate, diffusers fills its networks with random numbers before it loads them).
    git_sha: of the sources, `-dirty` where tracked ones (but results) differ. utc: ISO 8601, seconds.
    """

    machine: str
    cores: int
    driver: str
    versions: dict[str, str]
    git_sha: str
    utc: str


def environment(device: str) -> Environment:
    """This machine, now. device: as torch writes it."""
    driver, held = "", dict[str, str]()
    machine = _processor()
    if device.startswith("cuda"):
        import torch

        machine = torch.cuda.get_device_name(device)
        held = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
        driver, limit = _nvidia(torch.device(device).index or 0)
        machine = f"{machine}, {limit}" if limit else machine
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


def _nvidia(index: int) -> tuple[str, str]:
    query = "--query-gpu=driver_version,power.limit"
    driver, _, limit = _output("nvidia-smi", query, "--format=csv,noheader", "-i", str(index)).partition(", ")
    return driver, limit
