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


def require_vectors(channels: int, **vectors: Tensor) -> None:
    """Raises ValueError where one is not a number for each channel, side by side, in a dtype of `FLOATS`."""
    for name, vector in vectors.items():
        require(name, vector)
        require_shape(name, vector, (channels,))


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a tensor is of another shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be {shape}")


def power_of_two(n: int) -> int:
    """The least power of two that is `n` or more."""
    return 1 << max(n - 1, 0).bit_length()
