"""Group normalisation in channels_last, alone or with SiLU, and with a shift of the input before it.

Bytes that have to move: the input once in, the result once out. Where the cells of a group fit a program's
registers, that is what moves (`_whole`); else the input is read twice, once for the statistics (`_moments`)
and once to be normalised (`_apply`); the second time mostly from the cache. An input in two parts, one's
channels behind the other's, is read where they lie, and joined on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ritocco_kernels.fused.layout import FLOATS, power_of_two, require, require_vectors

_WHOLE = 16384  # most elements of a group, padded, that one program keeps
_MOST_PARTS = 32  # of the cells of a picture, whose moments every program of the second pass merges


class _Tiles(NamedTuple):
    """How the two passes cut the input up.

    channels: side by side in a tile, or a whole group where that is wider. elements: of a tile. programs: of
    the statistics at best.
    """

    channels: int
    elements: int
    warps: int
    programs: int


# Of 16 pictures of 320 x 64 x 64 an H200 took 66 us with `_MANY` and 80 with `_FEW`; of two 17 and 11.
_FEW = _Tiles(channels=64, elements=8192, warps=8, programs=264)
_MANY = _Tiles(channels=128, elements=4096, warps=4, programs=792)
_MANY_FROM = 16


@triton.jit
def _normalised(x, mean, rstd, weight, bias, silu: tl.constexpr):
    y = (x - mean) * rstd * weight + bias
    if silu:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _loaded(x_ptr, skip_ptr, row, channel, held, own, channels, joined: tl.constexpr):
    """Numbers of `held` places, float32: row * channels + channel of x, or of x and skip side by side."""
    if joined:
        mine = channel < own
        x = tl.load(x_ptr + row * own + channel, mask=held & mine, other=0.0)
        other = channels - own
        rest = tl.load(skip_ptr + row * other + (channel - own), mask=held & (channel >= own), other=0.0)
        return tl.where(mine, x, rest).to(tl.float32)
    return tl.load(x_ptr + row * channels + channel, mask=held, other=0.0).to(tl.float32)


@triton.jit
def _whole(
    x_ptr, skip_ptr, joined_ptr, own, shift_ptr, shift_stride, weight_ptr, bias_ptr, out_ptr,
    cells, channels, groups, eps,
    joined: tl.constexpr, shifted: tl.constexpr, silu: tl.constexpr, CELLS: tl.constexpr,
    PER_GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program for each picture and group: mean and variance in two passes over registers."""
    picture, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    cell = tl.arange(0, CELLS)[:, None]
    within = tl.arange(0, WIDTH)[None, :]
    channel = group * PER_GROUP + within
    held = (cell < cells) & (within < PER_GROUP)
    at = picture.to(tl.int64) * cells * channels + cell * channels + channel
    x_ptr += picture.to(tl.int64) * cells * own
    skip_ptr += picture.to(tl.int64) * cells * (channels - own)
    x = _loaded(x_ptr, skip_ptr, cell, channel, held, own, channels, joined)
    if joined:
        tl.store(joined_ptr + at, x.to(joined_ptr.dtype.element_ty), mask=held)
    if shifted:
        shift = tl.load(shift_ptr + picture * shift_stride + channel, mask=within < PER_GROUP, other=0.0)
        x = tl.where(held, x + shift.to(tl.float32), 0.0)
    count = 1.0 * cells * PER_GROUP
    mean = tl.sum(tl.sum(x, axis=1), axis=0) / count
    centred = tl.where(held, x - mean, 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=1), axis=0) / count
    rstd = 1.0 / tl.sqrt(variance + eps)
    weight = tl.load(weight_ptr + channel, mask=within < PER_GROUP, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=within < PER_GROUP, other=0.0).to(tl.float32)
    y = _normalised(x, mean, rstd, weight, bias, silu)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=held)


@triton.jit
def _moments(
    x_ptr, skip_ptr, own, shift_ptr, shift_stride, moments_ptr, cells, channels, part_cells, parts,
    joined: tl.constexpr, shifted: tl.constexpr, CELLS: tl.constexpr, TILES: tl.constexpr,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each group over a part of the cells.

    A program takes TOGETHER groups side by side. Sums are of distances from the part's first cell, so that a
    mean far from zero costs no digits.
    """
    picture, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, WIDTH)
    channel = block * TOGETHER * PER_GROUP + lane
    wanted = (lane < TOGETHER * PER_GROUP) & (channel < channels)
    first = part * part_cells
    last = tl.minimum(first + part_cells, cells)
    x_ptr += picture.to(tl.int64) * cells * own
    skip_ptr += picture.to(tl.int64) * cells * (channels - own)
    origin = _loaded(x_ptr, skip_ptr, first, channel, wanted, own, channels, joined)
    sums = tl.zeros((CELLS, WIDTH), tl.float32)
    squares = tl.zeros((CELLS, WIDTH), tl.float32)
    for tile in range(TILES):
        cell = first + tile * CELLS + tl.arange(0, CELLS)
        held = (cell < last)[:, None] & wanted[None, :]
        x = _loaded(x_ptr, skip_ptr, cell[:, None], channel[None, :], held, own, channels, joined)
        away = tl.where(held, x - origin[None, :], 0.0)
        sums += away
        squares += away * away
    count = (last - first).to(tl.float32)
    sum_of_channel = tl.sum(sums, axis=0)
    mean_of_channel = origin + sum_of_channel / count
    if shifted:
        shift = tl.load(shift_ptr + picture * shift_stride + channel, mask=wanted, other=0.0)
        mean_of_channel += shift.to(tl.float32)
    squares_of_channel = tl.sum(squares, axis=0) - sum_of_channel * sum_of_channel / count
    # From channels to groups.
    # [Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", Eq. 2.1]
    group = tl.arange(0, GROUPS)
    member = (lane[:, None] // PER_GROUP == group[None, :]) & wanted[:, None]
    mean = tl.sum(tl.where(member, mean_of_channel[:, None], 0.0), axis=0) / PER_GROUP
    apart = tl.where(member, mean_of_channel[:, None] - mean[None, :], 0.0)
    spread = tl.where(member, squares_of_channel[:, None], 0.0) + count * apart * apart
    groups = channels // PER_GROUP
    mine = block * TOGETHER + group
    known = (group < TOGETHER) & (mine < groups)
    at = ((picture * groups + mine) * parts + part) * 2
    tl.store(moments_ptr + at, mean, mask=known)
    tl.store(moments_ptr + at + 1, tl.sum(spread, axis=0), mask=known)


@triton.jit
def _apply(
    x_ptr, skip_ptr, joined_ptr, own, shift_ptr, shift_stride, weight_ptr, bias_ptr, moments_ptr, out_ptr,
    cells, channels, part_cells, parts, eps,
    joined: tl.constexpr, shifted: tl.constexpr, silu: tl.constexpr, CELLS: tl.constexpr,
    PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The moments of the parts into one, then one tile of the result: x * factor + offset, per channel; and
    of the joined input.
    """
    picture, block = tl.program_id(0), tl.program_id(2)
    lane = tl.arange(0, WIDTH)
    channel = block * TOGETHER * PER_GROUP + lane
    wanted = (lane < TOGETHER * PER_GROUP) & (channel < channels)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    held = (cell < cells)[:, None] & wanted[None, :]
    x_ptr += picture.to(tl.int64) * cells * own
    skip_ptr += picture.to(tl.int64) * cells * (channels - own)
    # Under way while the moments come in.
    x = _loaded(x_ptr, skip_ptr, cell[:, None], channel[None, :], held, own, channels, joined)

    groups = channels // PER_GROUP
    group = tl.arange(0, GROUPS)
    mine = block * TOGETHER + group
    part = tl.arange(0, PARTS)[None, :]
    known = ((group < TOGETHER) & (mine < groups))[:, None] & (part < parts)
    at = ((picture * groups + mine[:, None]) * parts + part) * 2
    means = tl.load(moments_ptr + at, mask=known, other=0.0)
    squares = tl.load(moments_ptr + at + 1, mask=known, other=0.0)
    part_count = tl.maximum(tl.minimum(cells - part * part_cells, part_cells), 0) * PER_GROUP
    counts = tl.where(known, part_count, 0).to(tl.float32)
    total = 1.0 * cells * PER_GROUP
    mean = tl.sum(means * counts, axis=1) / total
    apart = means - mean[:, None]
    rstd = 1.0 / tl.sqrt(tl.sum(squares + apart * apart * counts, axis=1) / total + eps)

    member = lane[:, None] // PER_GROUP == group[None, :]
    mean_of_channel = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1)
    factor = tl.sum(tl.where(member, rstd[None, :], 0.0), axis=1)
    factor *= tl.load(weight_ptr + channel, mask=wanted, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=wanted, other=0.0).to(tl.float32)
    if shifted:
        shift = tl.load(shift_ptr + picture * shift_stride + channel, mask=wanted, other=0.0)
        mean_of_channel -= shift.to(tl.float32)
    place = picture.to(tl.int64) * cells * channels + cell[:, None] * channels + channel[None, :]
    if joined:
        tl.store(joined_ptr + place, x.to(joined_ptr.dtype.element_ty), mask=held)
    y = (x - mean_of_channel[None, :]) * factor[None, :] + bias[None, :]
    if silu:
        y = y * tl.sigmoid(y)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=held)


@triton_op("ritocco::groupnorm", mutates_args=())
def groupnorm_op(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """The registered operation behind the functions below."""
    n, channels = x.shape[:2]
    require("x", x, format=torch.channels_last)
    if groups < 1 or channels % groups:
        raise ValueError(f"x has {channels} channels; they must be a multiple of groups, which is {groups}")
    require_vectors(channels, weight=weight, bias=bias)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    given = x if shift is None else shift
    shifted, stride = shift is not None, given.stride(0)
    if shifted and (given.shape != (n, channels) or given.stride(1) != 1 or given.dtype not in FLOATS):
        raise ValueError(
            f"shift is {given.dtype} {tuple(given.shape)}, laid out {given.stride()}; "
            f"it must be {(n, channels)}, the channels side by side"
        )
    if x.numel():
        _launch(
            (x, x, out, channels),
            (given, stride, shifted),
            (weight, bias),
            out,
            groups=groups,
            eps=eps,
            silu=silu,
        )
    return out


def _launch(
    inputs: tuple[Tensor, Tensor, Tensor, int],
    shift: tuple[Tensor, int, bool],
    affine: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool,
) -> None:
    """Into `out` [N,C,H,W].

    inputs: x, skip, joined and the channels of x, which are C where it is all of the input. shift: it, the
    numbers from one picture's to the next, and whether there is one.
    """
    x, skip, joined, own = inputs
    given, stride, shifted = shift
    n, channels, cells = out.shape[0], out.shape[1], out.shape[2] * out.shape[3]
    per_group = channels // groups
    kind = {"joined": own < channels, "shifted": shifted, "PER_GROUP": per_group}
    size = power_of_two(cells) * power_of_two(per_group)
    if size <= _WHOLE:
        wrap_triton(_whole)[(n * groups,)](
            x, skip, joined, own, given, stride, *affine, out, cells, channels, groups, eps,
            silu=silu, CELLS=power_of_two(cells), WIDTH=power_of_two(per_group),
            num_warps=min(max(size // 1024, 1), 16), **kind,
        )  # fmt: skip
        return
    tiles = _MANY if n >= _MANY_FROM else _FEW
    together = max(tiles.channels // per_group, 1)  # groups of one program
    width = power_of_two(together * per_group)
    kind |= {"GROUPS": power_of_two(together), "TOGETHER": together, "WIDTH": width}
    blocks, tile = triton.cdiv(groups, together), max(tiles.elements // width, 1)
    parts = min(max(tiles.programs // (n * blocks), 1), triton.cdiv(cells, tile), _MOST_PARTS)
    part_cells = triton.cdiv(cells, parts)
    parts = triton.cdiv(cells, part_cells)
    moments = torch.empty(n, groups, parts, 2, dtype=torch.float32, device=x.device)
    wrap_triton(_moments)[(n, parts, blocks)](
        x, skip, own, given, stride, moments, cells, channels, part_cells, parts,
        CELLS=tile, TILES=triton.cdiv(part_cells, tile), num_warps=tiles.warps, **kind,
    )  # fmt: skip
    # Where programs are many, each takes more, so that the moments are merged less often.
    tile *= 2 if tiles is _MANY else 1
    wrap_triton(_apply)[(n, triton.cdiv(cells, tile), blocks)](
        x, skip, joined, own, given, stride, *affine, moments, out, cells, channels, part_cells, parts, eps,
        silu=silu, CELLS=tile, PARTS=power_of_two(parts), num_warps=tiles.warps, **kind,
    )  # fmt: skip


@triton_op("ritocco::joined_groupnorm_silu", mutates_args=())
def joined_groupnorm_silu(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`joined_groupnorm_silu_reference` of channels_last tensors. Raises ValueError for others, and for parts
    that do not fit together.
    """
    for name, tensor in (("x", x), ("skip", skip)):
        require(name, tensor, format=torch.channels_last)
    own, channels = x.shape[1], x.shape[1] + skip.shape[1]
    if (len(x), x.shape[2:], x.dtype) != (len(skip), skip.shape[2:], skip.dtype):
        found = f"x is {x.dtype} {tuple(x.shape)} and skip {skip.dtype} {tuple(skip.shape)}"
        raise ValueError(f"{found}; they may differ in their channels alone")
    if groups < 1 or channels % groups:
        raise ValueError(f"x and skip have {channels} channels; they must be a multiple of {groups} groups")
    require_vectors(channels, weight=weight, bias=bias)
    shape = (len(x), channels, *x.shape[2:])
    out, joined = (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for _ in range(2)
    )
    if out.numel():
        _launch((x, skip, joined, own), (x, 0, False), (weight, bias), out, groups=groups, eps=eps, silu=True)
    return out, joined


def groupnorm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """`groupnorm_reference` of a channels_last x. Raises ValueError for another layout, dtype or length."""
    out: Tensor = groupnorm_op(x, None, weight, bias, groups, eps, False)
    return out


def groupnorm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """`groupnorm_silu_reference` of a channels_last x. Raises ValueError as `groupnorm` does."""
    out: Tensor = groupnorm_op(x, None, weight, bias, groups, eps, True)
    return out


def shifted_groupnorm_silu(
    x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """`shifted_groupnorm_silu_reference` of a channels_last x, the sum in float32. Raises ValueError."""
    out: Tensor = groupnorm_op(x, shift, weight, bias, groups, eps, True)
    return out
