"""A residual sum and the layer norm behind it, twice in every transformer block; and the norm alone, once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ritocco_kernels.contract import Op


def layernorm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Affine layer norm. [Ba et al. 2016, arXiv:1607.06450, Eq. 4]

    x: [...,C], any floating dtype. weight, bias: [C], the same dtype. eps: added to the variance. Returns a
    tensor like x; mean and variance are taken in float32.
    """
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layernorm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum, and `layernorm_reference` of it.

    x, residual: [...,C]; x is used up: it may be overwritten. Returns two tensors like x.
    """
    total = x.add_(residual)
    return total, layernorm_reference(total, weight, bias, eps)


LAYERNORM = Op(
    name="layernorm",
    reference=layernorm_reference,
    tolerance={torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0},
)


ADD_LAYERNORM = Op(
    name="add_layernorm",
    reference=add_layernorm_reference,
    # Of the norm, against the norm of the rounded sum; the sum itself is rounded once.
    tolerance={torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0},
)
