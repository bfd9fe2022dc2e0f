"""What a graph computes in float32 whatever its dtype.

A group norm's variance passes float16's largest number, 65504, where activations reach 256, as those of the
VAE decoder do. ONNX's LayerNormalization takes its statistics in float32 by its own default; its
InstanceNormalization, which a group norm becomes, has no such attribute: so it stands between two casts.
Attention scores need none: their two factors are scaled before the product.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from ritocco_kernels.ops import REFERENCE


def _groupnorm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """See `groupnorm_reference`; no cast is written where x is float32."""
    return F.group_norm(x.float(), groups, weight.float(), bias.float(), eps).to(x.dtype)


def _groupnorm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.silu(_groupnorm(x, weight, bias, groups, eps))


GRAPH_OPS = replace(REFERENCE, groupnorm=_groupnorm, groupnorm_silu=_groupnorm_silu)
"""Plain PyTorch, for export."""
