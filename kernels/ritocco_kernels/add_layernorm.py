"""A residual sum and the layer norm behind it, twice in every transformer block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ritocco_kernels.contract import Op


def add_layernorm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum, and its affine layer norm. [Ba et al. 2016, arXiv:1607.06450, Eq. 4]

    x, residual: [...,C], any floating dtype; x is used up: it may be overwritten. weight, bias: [C], the same
    dtype. eps: added to the variance. Returns two tensors like x; mean and variance are taken in float32.
    """
    total = x.add_(residual)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


ADD_LAYERNORM = Op(
    name="add_layernorm",
    reference=add_layernorm_reference,
    # Of the norm, against the norm of the rounded sum; the sum itself is rounded once.
    tolerance={torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0},
)
