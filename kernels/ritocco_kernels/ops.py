"""The table of operations that the networks call.

A network takes an `Ops` table: plain PyTorch on a CPU and in an exported graph, fused kernels where they run.
So no custom operator ever reaches a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ritocco_kernels.geglu import GEGLU
from ritocco_kernels.groupnorm_silu import GROUPNORM, GROUPNORM_SILU


@dataclass(frozen=True, kw_only=True, slots=True)
class Ops:
    """The implementations that one network uses.

    groupnorm, groupnorm_silu(x [N,C,H,W], weight [C], bias [C], groups, eps) -> [N,C,H,W]
    geglu(projected [...,2F]) -> [...,F]
    """

    groupnorm: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    groupnorm_silu: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    geglu: Callable[[Tensor], Tensor]


REFERENCE = Ops(groupnorm=GROUPNORM.reference, groupnorm_silu=GROUPNORM_SILU.reference, geglu=GEGLU.reference)
"""Plain PyTorch, for a CPU and for export."""
