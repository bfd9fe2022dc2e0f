"""How tensors lie in memory, as kernels see it, and the refusal of what they don't take."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def require(name: str, tensor: Tensor, *, format: torch.memory_format = torch.contiguous_format) -> None:
    """Raises ValueError where a tensor is of no dtype that kernels take, or lies otherwise than `format`."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    if not tensor.is_contiguous(memory_format=format):
        wanted = str(format).removeprefix("torch.")
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} is laid out {tensor.stride()}; not {wanted}")


def power_of_two(n: int) -> int:
    """The least power of two that is `n` or more."""
    return 1 << max(n - 1, 0).bit_length()
