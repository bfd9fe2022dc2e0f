"""The most memory that this process had resident, by the kernel's own count.

It holds what no allocator of ours sees: Python, its libraries, code that is compiled, pages of mapped files,
and what the C library keeps of freed memory. [proc_pid_status(5), VmHWM; proc_pid_clear_refs(5), 5]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

RESERVE_BYTES: Mapping[str, int] = MappingProxyType({"float32": 32 << 20, "bfloat16": 40 << 20})
"""dtype -> of a process beyond torch's allocator: code and primitives of oneDNN, threads, Python's objects,
pictures on the host. No bound: with the embedded model 14 to 36 MiB were seen in float32, 37 to 42 in
bfloat16; with the full-size one 63 to 149, and 62 to 132."""

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int | None:
    """Since the process began or `restart`; None where the system does not tell."""
    return _told("VmHWM")


def resident_bytes() -> int | None:
    """Now; None where the system does not tell."""
    return _told("VmRSS")


def restart() -> bool:
    """Count from what is held now on. Whether the system does."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


class HighWater:
    """Of each phase, as `Tracker`: phase -> bytes in `most`, beyond what the process held when this was made.

    most: None where the system does not tell.
    """

    def __init__(self) -> None:
        self.most: dict[str, int] | None = {}
        self._before = resident_bytes()
        self._phase: str | None = None

    def begin(self, phase: str) -> None:
        """What comes belongs to this phase; a name that comes again is the same phase."""
        self.end()
        if not restart():
            self.most = None
        self._phase = phase

    def end(self) -> None:
        """The phase is over."""
        peak = peak_bytes()
        if peak is None or self._before is None:
            self.most = None
        if (
            self.most is not None
            and self._phase is not None
            and peak is not None
            and self._before is not None
        ):
            self.most[self._phase] = max(self.most.get(self._phase, 0), peak - self._before)
        self._phase = None


def _told(name: str) -> int | None:
    """In bytes; `ru_maxrss` of a child begins with its parent's."""
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
