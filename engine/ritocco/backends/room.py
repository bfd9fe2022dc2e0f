"""A device's memory: where it runs out, what was captured goes, and the work is tried once more."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from ritocco.backends.allocator import give_back_unused
from ritocco.errors import BackendError
from ritocco.shown import said

if TYPE_CHECKING:
    from ritocco.backends.recorded import Recorded

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class Forgetful(Protocol):
    """Something that keeps what it captured, and can do without."""

    def forget(self, but: Recorded | None = None) -> None:
        """Let go of all that was captured, or of all but one; it is captured again when it is needed."""


class Room:
    """The memory of one device. captured: who keeps some of it between calls, as long as they are there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.captured: weakref.WeakSet[Forgetful] = weakref.WeakSet()

    def make(self, but: Recorded | None = None) -> None:
        """Give back what was captured, or all but one, and what the allocator keeps for later."""
        _log.info("%s has little memory left: what was captured on it goes", self._device)
        for one in self.captured:
            one.forget(but)
        if self._device.type == "cuda":
            give_back_unused()

    def run(self, what: str, work: Callable[[], Result]) -> Result:
        """The result of `work`, which may be called twice. Raises BackendError, which says for what, where
        memory runs out both times.
        """
        try:
            return work()
        except torch.OutOfMemoryError:
            pass  # and the error goes, whose frames hold what was computed until then
        try:
            self.make()
            return work()
        except torch.OutOfMemoryError as error:
            raise self.too_small(what, error) from error

    def too_small(self, what: str, error: torch.OutOfMemoryError) -> BackendError:
        """What to raise."""
        rule = "ask for a smaller picture, or free some of it"
        return BackendError(f"{self._device} has not the memory for {what}: {rule} ({said(error)})")
