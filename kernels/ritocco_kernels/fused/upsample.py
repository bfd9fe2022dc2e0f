"""The nearest neighbour at twice the size, channels_last: each number is read once, written four times."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ritocco_kernels.fused.layout import power_of_two, require

_TILE = 1024  # numbers that a program reads
_CHANNELS = 256  # of them side by side, at most


@triton.jit
def _upsample(x_ptr, out_ptr, width, channels, CELLS: tl.constexpr, WIDTH: tl.constexpr):
    """A part of one row of cells, into two rows."""
    row = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)[:, None]
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)[None, :]
    held = (cell < width) & (channel < channels)
    x = tl.load(x_ptr + row * width * channels + cell * channels + channel, mask=held)
    upper_ptr = out_ptr + row * 4 * width * channels + cell * 2 * channels + channel
    lower_ptr = upper_ptr + 2 * width * channels
    tl.store(upper_ptr, x, mask=held)
    tl.store(upper_ptr + channels, x, mask=held)
    tl.store(lower_ptr, x, mask=held)
    tl.store(lower_ptr + channels, x, mask=held)


@triton_op("ritocco::upsample", mutates_args=())
def upsample(x: Tensor) -> Tensor:
    """`upsample_reference` of a channels_last tensor. Raises ValueError for another."""
    require("x", x, format=torch.channels_last)
    n, channels, height, width = x.shape
    out = torch.empty(
        n, channels, 2 * height, 2 * width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if x.numel():
        side = min(power_of_two(channels), _CHANNELS)
        cells = min(power_of_two(width), max(_TILE // side, 1))
        grid = (n * height, triton.cdiv(width, cells), triton.cdiv(channels, side))
        wrap_triton(_upsample)[grid](x, out, width, channels, CELLS=cells, WIDTH=side, num_warps=4)
    return out
