"""What a convolution leaves to whoever comes next: its bias, and the residual beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from ritocco_kernels.contract import Op


def add_bias_reference(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x + bias + residual.

    x, residual: [N,C,H,W], any floating dtype. bias: [C], the same dtype. Returns a tensor like x.
    """
    return x + bias[:, None, None] + residual


ADD_BIAS = Op(
    name="add_bias",
    reference=add_bias_reference,
    # Two sums, each rounded; the first can be twice the result.
    tolerance={torch.float32: 2.0, torch.bfloat16: 2.0, torch.float16: 2.0},
)
