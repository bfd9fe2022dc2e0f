"""The table of operations that the networks call.

A network takes an `Ops` table: plain PyTorch on a CPU and in an exported graph, fused kernels where they run.
So no custom operator ever reaches a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ritocco_kernels.add_bias import ADD_BIAS
from ritocco_kernels.add_layernorm import ADD_LAYERNORM, LAYERNORM
from ritocco_kernels.geglu import GEGLU
from ritocco_kernels.groupnorm_silu import (
    GROUPNORM,
    GROUPNORM_SILU,
    JOINED_GROUPNORM_SILU,
    SHIFTED_GROUPNORM_SILU,
)
from ritocco_kernels.upsample import UPSAMPLE


@dataclass(frozen=True, kw_only=True, slots=True)
class Ops:
    """The implementations that one network uses.

    groupnorm, groupnorm_silu(x [N,C,H,W], weight [C], bias [C], groups, eps) -> [N,C,H,W]
    shifted_groupnorm_silu(x [N,C,H,W], shift [N,C], weight [C], bias [C], groups, eps) -> [N,C,H,W]
    joined_groupnorm_silu(x [N,C,H,W], skip [N,D,H,W], weight [C+D], bias [C+D], groups, eps)
        -> norm of both side by side, and both, [N,C+D,H,W] each
    geglu(projected [...,2F]) -> [...,F]
    layernorm(x [...,C], weight [C], bias [C], eps) -> [...,C]
    add_layernorm(x [...,C], residual [...,C], weight [C], bias [C], eps) -> sum and norm, [...,C] each
    add_bias(x [N,C,H,W], bias [C], residual [N,C,H,W]) -> [N,C,H,W]
    upsample(x [N,C,H,W]) -> [N,C,2H,2W]
    late: whether a block leaves to the operation behind what that has in its hands anyway: a convolution its
    bias (`shifted_groupnorm_silu`, `add_bias`), an up block the join of its inputs (`joined_groupnorm_silu`).
    Where it does not, a convolution adds its bias at no cost, and what was joined is freed before the norm.
    """

    groupnorm: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    groupnorm_silu: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    shifted_groupnorm_silu: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
    joined_groupnorm_silu: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
    geglu: Callable[[Tensor], Tensor]
    layernorm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    add_layernorm: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    add_bias: Callable[[Tensor, Tensor, Tensor], Tensor]
    upsample: Callable[[Tensor], Tensor]
    late: bool


REFERENCE = Ops(
    groupnorm=GROUPNORM.reference,
    groupnorm_silu=GROUPNORM_SILU.reference,
    shifted_groupnorm_silu=SHIFTED_GROUPNORM_SILU.reference,
    joined_groupnorm_silu=JOINED_GROUPNORM_SILU.reference,
    geglu=GEGLU.reference,
    layernorm=LAYERNORM.reference,
    add_layernorm=ADD_LAYERNORM.reference,
    add_bias=ADD_BIAS.reference,
    upsample=UPSAMPLE.reference,
    late=False,
)
"""Plain PyTorch, for a CPU and for export."""
