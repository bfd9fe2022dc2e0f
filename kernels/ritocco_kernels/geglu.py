"""The gated activation of the transformer's feed-forward layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ritocco_kernels.contract import Op


def geglu_reference(projected: Tensor) -> Tensor:
    """First half times the exact (erf) GELU of the second half. [Shazeer 2020, arXiv:2002.05202, Eq. 6]

    projected: [...,2F], any floating dtype: values, then gates, as in diffusers' GEGLU.
    Returns [...,F] in the same dtype.
    """
    values, gates = projected.chunk(2, dim=-1)
    return F.gelu(gates).mul_(values)


GEGLU = Op(
    name="geglu",
    reference=geglu_reference,
    # Two roundings: GELU's and the product's.
    tolerance={torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0},
)
