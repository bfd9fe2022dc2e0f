"""A convolution's bias and the residual behind it in one pass: two tensors in, one out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ritocco_kernels.fused.layout import require, require_vectors

_BLOCK = 2048


@triton.jit
def _add_bias(x_ptr, bias_ptr, residual_ptr, out_ptr, count, channels, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < count
    y = tl.load(x_ptr + at, mask=held, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + at % channels, mask=held, other=0.0).to(tl.float32)
    y += tl.load(residual_ptr + at, mask=held, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=held)


@triton_op("ritocco::add_bias", mutates_args=())
def add_bias(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """`add_bias_reference` of channels_last tensors, the sum in float32. Raises ValueError for others."""
    for name, tensor in (("x", x), ("residual", residual)):
        require(name, tensor, format=torch.channels_last)
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)} and residual {tuple(residual.shape)}; they must be alike")
    require_vectors(x.shape[1], bias=bias)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel():
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        wrap_triton(_add_bias)[grid](x, bias, residual, out, x.numel(), x.shape[1], BLOCK=_BLOCK, num_warps=8)
    return out
