"""torch's allocator of CUDA memory: when what it keeps and nobody uses goes back to the driver."""

from __future__ import annotations

import logging
import threading

import torch

from ritocco.shown import said

_log = logging.getLogger(__name__)

capturing = threading.Lock()
"""Held while work is captured anywhere in this process: the allocator gives nothing back meanwhile."""


def give_back_unused() -> None:
    """Of all devices, once nothing is being captured. What can't go, as a device is lost or a capture never
    came to its end, stays, and a warning says so.
    """
    with capturing:
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            _log.warning("torch keeps memory that nobody uses (%s)", said(error))
