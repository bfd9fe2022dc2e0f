"""What a device has free, and the budget that follows from it where nobody names one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ritocco.byte_sizes import mib_down, mib_up
from ritocco.errors import BackendError
from ritocco.plans import smallest_takes

if TYPE_CHECKING:
    import torch

    from ritocco.checkpoint import Checkpoint
    from ritocco.plans import Planner

RESERVE_BYTES = 768 << 20
"""Left free, but never more than half: for what an allocator reserves beyond what it hands out."""

CAPTURED_TIMES = 4
"""What a GPU reserves beside the weights with graphs and cuDNN's search, in times of what a plan, which has
neither, counts beside them: 3.4 were seen for one size, and 0.4 are for seven more that stay captured
(docs/memory.md)."""

_MOST_PIXELS, _MOST_ROWS = 1024 * 1024, 8 * 128 * 128  # of the schema: of a picture, of the UNet's cells
# Values at once, in widths of the first levels: twice and more what the largest requests take.
_PICTURES, _LAYERS = 8, 8
_BESIDE = 256 << 20
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_SHARED_POOL = (0, 0)  # of torch's allocator; graphs have pools of their own


def free_bytes(device: torch.device) -> int | None:
    """Of a CUDA device what the driver has free, and what torch keeps of it without a use; of a CPU what the
    system or a container's limit leaves; None where neither tells.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] + _kept_by_torch(device)
    told = [one for one in (_available(), _left_in_container()) if one is not None]
    return min(told, default=None)


def ample_bytes(checkpoint: Checkpoint, weights: int, itemsize: int, *, captured: bool = False) -> int:
    """More than any request of the schema takes, told without a rehearsal, which takes seconds.

    weights: bytes of all networks in the dtype that they are used in, whose numbers take `itemsize` bytes.
    captured: with what graphs and search keep, see `captured_bytes`.
    """
    from ritocco.nets.specs import UNetSpec, VAESpec

    unet, vae = UNetSpec.from_config(checkpoint.unet), VAESpec.from_config(checkpoint.vae)
    decoded = _PICTURES * max(vae.channels[:2]) * _MOST_PIXELS
    denoised = _LAYERS * (max(unet.layers) + 2) * unet.channels[0] * _MOST_ROWS
    computed = itemsize * max(decoded, denoised)
    # Twice of twice and more is `CAPTURED_TIMES` of what they take.
    return weights + weights // 4 + (CAPTURED_TIMES // 2 if captured else 1) * computed + _BESIDE


def captured_bytes(most: int, weights: int) -> int:
    """A bound on what a GPU's runtime reserves, with its graphs and cuDNN's search, for requests that take
    `most` without them. weights: of all networks.
    """
    return weights + CAPTURED_TIMES * max(0, most - weights)


def default_budget(
    planner: Planner, ample: int, free: int | None, captured_weights: int | None = None
) -> int | None:
    """Bytes, where the largest request of the schema might not fit with all networks in memory; else None.

    planner: of networks that come and go. ample: see `ample_bytes`. captured_weights: bytes of all networks,
    on a device where a runtime without a budget has graphs and search (see `captured_bytes`). Where the
    reserve would leave less than the smallest request takes, it shrinks. Raises BackendError where that is
    more than what is free.
    """
    if free is None:
        return None
    reserve = min(RESERVE_BYTES, free // 2)
    if free - reserve >= ample:
        return None
    try:
        most = planner.most()
        if captured_weights is not None:
            most = captured_bytes(most, captured_weights)
        if most <= free - reserve:
            return None
        least = planner.least()
    except BackendError:  # there are no plans of this device and dtype
        return None
    if least > free:
        raise BackendError(
            f"{mib_down(free)} are free, of which {mib_up(reserve)} would be kept in reserve; "
            f"{smallest_takes(least)}. memory_budget= loads it all the same, and keeps to what it names"
        )
    return max(free - reserve, least)


def _kept_by_torch(device: torch.device) -> int:
    """What its allocator holds of a CUDA device, and nobody uses; nobody else gets the pools of graphs."""
    import torch

    if torch.cuda.get_allocator_backend() != "native":  # others tell of no segments
        return 0
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return sum(
        one["total_size"] - one["active_size"]
        for one in segments
        if one["device"] == (device.index or 0) and tuple(one["segment_pool_id"]) == _SHARED_POOL
    )


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
