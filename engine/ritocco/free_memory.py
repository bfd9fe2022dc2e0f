"""What a device has free, and the budget that follows from it where nobody names one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ritocco.errors import BackendError

if TYPE_CHECKING:
    import torch

    from ritocco.plans import Planner

RESERVE_BYTES = 768 << 20
"""Left free: what an allocator reserves beyond what it hands out, and on a GPU what graphs and cuDNN's search
keep (docs/gpu.md: up to 650 MiB for a picture of 512 x 512)."""

_AMPLE = 3  # times the weights: twice what the largest request of the full-size model takes beside them
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Of a CUDA device what the driver has free; of a CPU what the system or a container's limit leaves; None
    where neither tells.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    told = [one for one in (_available(), _left_in_container()) if one is not None]
    return min(told, default=None)


def default_budget(planner: Planner, weights: int, free: int | None) -> int | None:
    """Bytes, where the largest request of the schema might not fit with all networks in memory; else None.

    planner: without a budget. weights: bytes of all networks in the dtype that they are used in.
    """
    if free is None or free >= _AMPLE * weights + RESERVE_BYTES:
        return None
    left = max(1, free - RESERVE_BYTES)
    try:
        return None if planner.largest().least <= left else left
    except BackendError:  # there are no plans of this device and dtype
        return None


def _available() -> int | None:
    if not _MEMINFO.is_file():
        return None
    lines = _MEMINFO.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_container() -> int | None:
    """Of cgroup v2: its limit less what can't be taken back. [Linux, admin-guide/cgroup-v2, memory.max]"""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text(encoding="utf-8"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines()
        files = sum(int(line.split()[1]) for line in stat if line.split()[0] == "inactive_file")
        return max(0, int(limit) - used + files)
    except (OSError, ValueError):
        return None
