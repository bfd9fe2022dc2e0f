"""How far the host runs ahead of a GPU."""

from __future__ import annotations

from collections import deque

import torch

MOST = 2
"""Steps that are queued and not done, so that stopping takes effect at once."""


class StepsAhead:
    """The steps of one batch that its device may not have done yet. On a CPU there are none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: deque[torch.cuda.Event] = deque()

    def wait(self) -> None:
        """Before a step is queued: until one more makes `MOST` at most."""
        while len(self._ends) >= MOST:
            self._ends.popleft().synchronize()

    def queued(self) -> None:
        """Behind a step: note where it ends."""
        if self._device.type != "cuda":
            return
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record(torch.cuda.current_stream(self._device))
        self._ends.append(end)
