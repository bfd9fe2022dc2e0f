"""Most memory of this process, altogether and in each phase."""

from __future__ import annotations

from ritocco import high_water


class Peaks:
    """Of each phase of a request.

    held: phase -> bytes, allocated on a GPU, else resident; nothing where the system does not tell.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._phase = ""
        self.held: dict[str, int] = {}

    def begin(self, phase: str) -> None:
        """Of what comes; what came before has ended."""
        self.end()
        self._phase = phase if _restart(self._device) else ""

    def end(self) -> None:
        """The phase is over."""
        peak = peak_bytes(self._device) if self._phase else None
        if peak is not None:
            self.held[self._phase] = max(self.held.get(self._phase, 0), peak)
        self._phase = ""


def peak_bytes(device: str) -> int | None:
    """Most memory of this process so far: allocated on a GPU, else resident; None where unknown (Windows)."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return high_water.peak_bytes()


def _restart(device: str) -> bool:
    """Count from what is held now on. Whether the system does."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    return high_water.restart()
