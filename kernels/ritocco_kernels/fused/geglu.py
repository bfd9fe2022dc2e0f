"""The gated activation in one pass: 2F numbers in, F out, for every token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ritocco_kernels.fused.layout import power_of_two, require

_BLOCK = 1024  # numbers of the result that a program makes
_LEAST_WIDTH = 64


@triton.jit
def _geglu(projected_ptr, out_ptr, tokens, inner, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    held = (token < tokens) & (at < inner)
    values_ptr = projected_ptr + token * 2 * inner + at
    values = tl.load(values_ptr, mask=held, other=0.0).to(tl.float32)
    gates = tl.load(values_ptr + inner, mask=held, other=0.0).to(tl.float32)
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
        tokens = out.numel() // inner
        # As many of a token side by side as leave no lane without work, where those are enough.
        width = min(inner & -inner, _BLOCK)
        width = width if width >= _LEAST_WIDTH else min(power_of_two(inner), _BLOCK)
        together = _BLOCK // width
        grid = (triton.cdiv(tokens, together), triton.cdiv(inner, width))
        wrap_triton(_geglu)[grid](
            projected, out, tokens, inner, TOKENS=together, WIDTH=width, num_warps=4
        )  # fmt: skip
    return out
