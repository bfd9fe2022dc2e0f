"""Where the tests of GPU code run: on a CUDA device, else on the CPU, with Triton's interpreter."""

from __future__ import annotations

import os
import sys

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def interpret_kernels() -> None:
    """Without a GPU, have Triton interpret its kernels, which is settled when it is imported."""
    if not GPU and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
