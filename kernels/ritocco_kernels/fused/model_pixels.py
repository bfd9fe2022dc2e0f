"""Bytes to the network's numbers and back, one pass each: a picture crosses to the device as bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ritocco_kernels.fused.layout import require

_BLOCK = 1024
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken away, it rounds to the nearest, half to even


@triton.jit
def _to_model_pixels(pixels_ptr, mask_ptr, out_ptr, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < count
    y = 2.0 * tl.div_rn(tl.load(pixels_ptr + at, mask=held, other=0).to(tl.float32), 255.0) - 1.0
    if MASKED:
        y = tl.where(tl.load(mask_ptr + at // 3, mask=held, other=0) != 0, 0.0, y)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=held)


@triton.jit
def _from_model_pixels(
    decoded_ptr, pixels_ptr, mask_ptr, out_ptr, broken_ptr,
    count, each, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < count
    x = tl.load(decoded_ptr + at, mask=held, other=0.0).to(tl.float32)
    finite = tl.abs(x) <= 3.4028234663852886e38  # false for NaN as well
    unit = tl.maximum(tl.where(finite, x, 0.0) * 0.5 + 0.5, 0.0)
    # The minimum stands between product and sum, which a compiler would make one operation of, rounded once.
    y = ((tl.minimum(unit * 255.0, 255.0) + _ROUND) - _ROUND).to(tl.uint8)
    if KEPT:
        here = at % each
        kept = tl.load(pixels_ptr + here, mask=held, other=0)
        y = tl.where(tl.load(mask_ptr + here // 3, mask=held, other=0) != 0, y, kept)
    tl.store(out_ptr + at, y, mask=held)
    odd = tl.sum(tl.where(held & (finite == 0), 1, 0), axis=0)
    # Every block that stores writes the same, so their order does not matter.
    tl.store(broken_ptr, 1, mask=odd > 0)


@triton_op("ritocco::to_model_pixels", mutates_args=())
def to_model_pixels(pixels: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`to_model_pixels_reference` of contiguous tensors. Raises ValueError for others."""
    n, height, width, channels = pixels.shape
    _require_bytes("pixels", pixels, torch.uint8, (n, height, width, 3))
    if mask is not None:
        _require_bytes("mask", mask, torch.bool, (n, height, width))
    out = torch.empty(
        (n, channels, height, width),
        dtype=dtype,
        device=pixels.device,
        memory_format=torch.channels_last,
    )
    if out.numel():
        held = pixels if mask is None else mask.view(torch.uint8)
        wrap_triton(_to_model_pixels)[(triton.cdiv(out.numel(), _BLOCK),)](
            pixels, held, out, out.numel(), MASKED=mask is not None, BLOCK=_BLOCK, num_warps=4
        )
    return out


@triton_op("ritocco::from_model_pixels", mutates_args=())
def from_model_pixels(decoded: Tensor, pixels: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`from_model_pixels_reference`; decoded: channels_last. Raises ValueError for other layouts and shapes.

    Numbers that are not finite count as 0. The second result is int32 [1]: 0, or 1 where one was not.
    """
    require("decoded", decoded, format=torch.channels_last)
    n, channels, height, width = decoded.shape
    if channels != 3 or (pixels is None) != (mask is None):
        raise ValueError(f"decoded is {tuple(decoded.shape)}, of 3 channels; pixels and mask go together")
    out = decoded.new_empty((n, height, width, 3), dtype=torch.uint8)
    broken = decoded.new_zeros(1, dtype=torch.int32)
    held = [out, out]
    if pixels is not None and mask is not None:
        _require_bytes("pixels", pixels, torch.uint8, (height, width, 3))
        _require_bytes("mask", mask, torch.bool, (height, width))
        held = [pixels, mask.view(torch.uint8)]
    if out.numel():
        wrap_triton(_from_model_pixels)[(triton.cdiv(out.numel(), _BLOCK),)](
            decoded, *held, out, broken, out.numel(), height * width * 3,
            KEPT=pixels is not None, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out, broken


def _require_bytes(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        found = f"{tensor.dtype} {tuple(tensor.shape)} laid out {tensor.stride()}"
        raise ValueError(f"{name} is {found}; it must be {dtype} {shape}, contiguous")
