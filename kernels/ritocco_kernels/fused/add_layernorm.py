"""A residual sum and the layer norm behind it in one pass: two tensors in, two out; and the norm alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ritocco_kernels.fused.layout import power_of_two, require, require_vectors


@triton.jit
def _add_layernorm(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, tokens, width, eps,
    added: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    held = (token < tokens) & (channel < width)
    at = token * width + channel
    x = tl.load(x_ptr + at, mask=held, other=0.0).to(tl.float32)
    if added:
        x += tl.load(residual_ptr + at, mask=held, other=0.0).to(tl.float32)
        # What is normalised is the sum as it is kept: rounded.
        kept = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, kept, mask=held)
        x = kept.to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(held, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    weight = tl.load(weight_ptr + channel, mask=channel < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channel < width, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight + bias
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=held)


@triton_op("ritocco::add_layernorm", mutates_args=())
def add_layernorm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layernorm_reference` of contiguous tensors. Raises ValueError for others, and for two shapes."""
    for name, tensor in (("x", x), ("residual", residual)):
        require(name, tensor)
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)} and residual {tuple(residual.shape)}; they must be alike")
    require_vectors(x.shape[-1], weight=weight, bias=bias)
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch((x, residual, weight, bias, total, out), eps, added=True)
    return total, out


@triton_op("ritocco::layernorm", mutates_args=())
def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layernorm_reference` of contiguous tensors. Raises ValueError for others, and for other lengths."""
    require("x", x)
    require_vectors(x.shape[-1], weight=weight, bias=bias)
    out = torch.empty_like(x)
    _launch((x, x, weight, bias, out, out), eps, added=False)
    return out


def _launch(tensors: tuple[Tensor, ...], eps: float, *, added: bool) -> None:
    """tensors: as the kernel takes them."""
    x = tensors[0]
    if not x.numel():
        return
    width = x.shape[-1]
    padded, tokens = power_of_two(width), x.numel() // width
    together = max(2048 // padded, 1)
    wrap_triton(_add_layernorm)[(triton.cdiv(tokens, together),)](
        *tensors, tokens, width, eps,
        added=added, TOKENS=together, WIDTH=padded, num_warps=4 if padded <= 2048 else 8,
    )  # fmt: skip
