"""Group normalisation, alone (before a transformer) and followed by SiLU (before every convolution)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ritocco_kernels.contract import Op


def groupnorm_reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Affine group norm. [Wu & He 2018, arXiv:1803.08494, Eq. 1 to 3]

    x: [N,C,H,W], any floating dtype and memory format; C is a multiple of `groups`.
    weight, bias: [C], the dtype of x. eps: added to the variance.
    Returns [N,C,H,W] in the dtype of x (contiguous in float32); mean and variance are taken in float32.
    """
    if x.dtype == torch.float32:
        # PyTorch's channels_last norm on a CPU takes the variance as E[x^2] - E[x]^2 of plain sums: where the
        # mean is ten deviations, the result is off by 200 to 2500 eps.
        x = x.contiguous()
    return F.group_norm(x, groups, weight, bias, eps)


def groupnorm_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU of `groupnorm_reference`, same arguments and result. [Elfwing et al. 2017, arXiv:1702.03118]"""
    return F.silu(groupnorm_reference(x, weight, bias, groups, eps), inplace=True)


def shifted_groupnorm_silu_reference(
    x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """`groupnorm_silu_reference` of x + shift; shift: [N,C], the dtype of x."""
    return groupnorm_silu_reference(x + shift[:, :, None, None], weight, bias, groups, eps)


def joined_groupnorm_silu_reference(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`groupnorm_silu_reference` of x with the channels of skip behind its own, and what it is of.

    x: [N,C,H,W], skip: [N,D,H,W], of one dtype. weight, bias: [C+D]. Returns two of [N,C+D,H,W].
    """
    joined = torch.cat([x, skip], dim=1)
    return groupnorm_silu_reference(joined, weight, bias, groups, eps), joined


GROUPNORM = Op(
    name="groupnorm",
    reference=groupnorm_reference,
    tolerance={torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0},
)

GROUPNORM_SILU = Op(
    name="groupnorm_silu",
    reference=groupnorm_silu_reference,
    # Two roundings: the norm's and SiLU's, whose slope reaches 1.1.
    tolerance={torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0},
)

JOINED_GROUPNORM_SILU = Op(
    name="joined_groupnorm_silu",
    reference=joined_groupnorm_silu_reference,
    tolerance=GROUPNORM_SILU.tolerance,
)

SHIFTED_GROUPNORM_SILU = Op(
    name="shifted_groupnorm_silu",
    reference=shifted_groupnorm_silu_reference,
    # Three: the sum's as well, in units of the norm's result.
    tolerance={torch.float32: 8.0, torch.bfloat16: 4.0, torch.float16: 4.0},
)
