"""All schedulers' step as one kernel, in place, with the noise made inside.

The noise of element i of table row r is `ritocco.noise.normal`'s: words 0 and 1 of the Philox counter
(i, r + 1, 0, 0) under the lane's seed, through Box-Muller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ritocco_kernels.fused.layout import FLOATS, require_shape
from ritocco_kernels.guided_step import NUMBERS

_BLOCK = 256
_COLUMNS = len(NUMBERS)


@triton.jit
def _guided_step(
    output_ptr, row_stride, channel_stride, cell_stride,
    latents_ptr, history_ptr, next_ptr, next_row_stride, next_channel_stride, next_cell_stride,
    numbers_ptr, integers_ptr, unconditional_ptr, conditional_ptr, broken_ptr,
    lanes, count, cells, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = at < count
    channel, cell = at // cells, at % cells
    numbers = numbers_ptr + lane * COLUMNS
    p, q, a = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    b0, b1, b2, b3 = (
        tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6),
    )  # fmt: skip
    c, push = tl.load(numbers + 7), tl.load(numbers + 8)
    guidance, scale = tl.load(numbers + 9), tl.load(numbers + 10)
    seed, row = tl.load(integers_ptr + lane * 2), tl.load(integers_ptr + lane * 2 + 1)

    where = channel * channel_stride + cell * cell_stride
    first = tl.load(unconditional_ptr + lane) * row_stride
    second = tl.load(conditional_ptr + lane) * row_stride
    base = tl.load(output_ptr + first + where, mask=held, other=0.0).to(tl.float32)
    asked = tl.load(output_ptr + second + where, mask=held, other=0.0).to(tl.float32)
    guided = base + guidance * (asked - base)

    mine = lane * count + at
    whole = lanes * count
    x = tl.load(latents_ptr + mine, mask=held, other=0.0)
    m1 = tl.load(history_ptr + mine, mask=held, other=0.0)
    m2 = tl.load(history_ptr + whole + mine, mask=held, other=0.0)
    m3 = tl.load(history_ptr + 2 * whole + mine, mask=held, other=0.0)
    m0 = p * x + q * guided
    moved = a * x + b0 * m0 + b1 * m1 + b2 * m2 + b3 * m3
    if c != 0.0:
        zero = tl.zeros((BLOCK,), tl.uint32)
        word0, word1, _, _ = tl.philox(seed, at.to(tl.uint32), zero + (row + 1).to(tl.uint32), zero, zero)
        z, _ = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(word0), tl.uint_to_uniform_float(word1))
        moved += c * z
    tl.store(latents_ptr + mine, moved, mask=held)
    stay = 1.0 - push
    tl.store(history_ptr + mine, push * m0 + stay * m1, mask=held)
    tl.store(history_ptr + whole + mine, push * m1 + stay * m2, mask=held)
    tl.store(history_ptr + 2 * whole + mine, push * m2 + stay * m3, mask=held)
    to = lane * next_row_stride + channel * next_channel_stride + cell * next_cell_stride
    tl.store(next_ptr + to, (scale * moved).to(next_ptr.dtype.element_ty), mask=held)
    finite = tl.abs(moved) <= 3.4028234663852886e38  # false for NaN as well
    odd = tl.sum(tl.where(held & (finite == 0), 1, 0), axis=0)
    broken = tl.load(broken_ptr + lane)
    # Every block of a launch writes the same row, so their order does not matter.
    tl.store(broken_ptr + lane, row, mask=(odd > 0) & (broken < 0))


@triton_op("ritocco::guided_step", mutates_args=("latents", "history", "following", "broken"))
def guided_step(
    output: Tensor,
    latents: Tensor,
    history: Tensor,
    following: Tensor,
    numbers: Tensor,
    integers: Tensor,
    unconditional: Tensor,
    conditional: Tensor,
    broken: Tensor,
) -> None:
    """`guided_step_reference`, in place.

    output: [M,4,h,w], any floating dtype, contiguous or channels_last. latents, history, numbers,
    unconditional, conditional: as in the reference; latents and history become the next ones. following:
    [N,4,h,w], contiguous or channels_last, takes the next input, in its dtype. integers: int64 [N,2], the
    seed's 64 bits and the table's row. broken: int64 [N], takes the row where a lane's latents first are not
    finite, and is -1 before. Raises ValueError for other shapes, dtypes and layouts; a row that output has
    not is not seen, since the host would have to wait for the device.
    """
    if output.ndim != 4:
        raise ValueError(f"output is {tuple(output.shape)}; it must be of four sides")
    require_shape("latents", latents, (len(latents), *output.shape[1:]))
    shape, n = tuple(latents.shape), len(latents)
    held = {
        "latents": (latents, shape),
        "history": (history, (3, *shape)),
        "numbers": (numbers, (n, _COLUMNS)),
    }
    for name, (tensor, wanted) in held.items():
        _require(name, tensor, torch.float32, wanted)
    rows = {"unconditional": unconditional, "conditional": conditional, "broken": broken}
    for name, tensor in rows.items():
        _require(name, tensor, torch.int64, (n,))
    _require("integers", integers, torch.int64, (n, 2))
    require_shape("following", following, shape)
    _, channels, height, width = shape
    count, cells = channels * height * width, height * width
    grid = (n, triton.cdiv(count, _BLOCK))
    wrap_triton(_guided_step)[grid](
        output, *_strides("output", output), latents, history, following, *_strides("following", following),
        numbers, integers, unconditional, conditional, broken, n, count, cells,
        COLUMNS=_COLUMNS, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def _require(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {dtype}")
    require_shape(name, tensor, shape)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of shape {shape} is laid out {tensor.stride()}; not contiguous")


def _strides(name: str, x: Tensor) -> tuple[int, int, int]:
    """Of row, channel and cell."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} is {x.dtype}; it must be one of {', '.join(map(str, FLOATS))}")
    _, channels, height, width = x.shape
    cells = height * width
    if x.is_contiguous():
        return channels * cells, cells, 1
    if x.is_contiguous(memory_format=torch.channels_last):
        return channels * cells, 1, channels
    raise ValueError(
        f"{name} of shape {tuple(x.shape)} is laid out {x.stride()}; neither contiguous nor channels_last"
    )
