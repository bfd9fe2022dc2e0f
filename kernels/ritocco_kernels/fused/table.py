"""The fused operations as the table that the networks take."""

from __future__ import annotations

from ritocco_kernels.fused.add_bias import add_bias
from ritocco_kernels.fused.add_layernorm import add_layernorm, layernorm
from ritocco_kernels.fused.geglu import geglu
from ritocco_kernels.fused.groupnorm_silu import (
    groupnorm,
    groupnorm_silu,
    joined_groupnorm_silu,
    shifted_groupnorm_silu,
)
from ritocco_kernels.fused.upsample import upsample
from ritocco_kernels.ops import Ops

FUSED = Ops(
    groupnorm=groupnorm,
    groupnorm_silu=groupnorm_silu,
    shifted_groupnorm_silu=shifted_groupnorm_silu,
    joined_groupnorm_silu=joined_groupnorm_silu,
    geglu=geglu,
    layernorm=layernorm,
    add_layernorm=add_layernorm,
    add_bias=add_bias,
    upsample=upsample,
    late=True,
)
"""Triton kernels, for CUDA devices and channels_last tensors."""
