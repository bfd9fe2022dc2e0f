"""The gated activation in one pass: 2F numbers in, F out, for every token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ritocco_kernels.fused.layout import power_of_two, require

_BLOCK = 2048


@triton.jit
def _geglu(projected_ptr, out_ptr, inner, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = at < inner
    values = tl.load(projected_ptr + token * 2 * inner + at, mask=held, other=0.0).to(tl.float32)
    gates = tl.load(projected_ptr + token * 2 * inner + inner + at, mask=held, other=0.0).to(tl.float32)
    y = values * gates * 0.5 * (1.0 + tl.erf(gates * 0.7071067811865476))
    tl.store(out_ptr + token * inner + at, y.to(out_ptr.dtype.element_ty), mask=held)


@triton_op("ritocco::geglu", mutates_args=())
def geglu(projected: Tensor) -> Tensor:
    """`geglu_reference` of a contiguous tensor, the product in float32. Raises ValueError for another."""
    require("projected", projected)
    inner = projected.shape[-1] // 2
    if projected.shape[-1] != 2 * inner:
        raise ValueError(f"projected is {tuple(projected.shape)}; its last side must be even")
    out = projected.new_empty(*projected.shape[:-1], inner)
    if out.numel():
        block = min(power_of_two(inner), _BLOCK)
        grid = (out.numel() // inner, triton.cdiv(inner, block))
        wrap_triton(_geglu)[grid](projected, out, inner, BLOCK=block, num_warps=8 if block > 512 else 4)
    return out
