"""What the fused operations allocate, without numbers: to learn what a GPU will hold where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from ritocco_kernels.ops import Ops


def _image(x: Tensor, *, channels: int, scale: int = 1) -> Tensor:
    n, _, height, width = x.shape
    shape = (n, channels, scale * height, scale * width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _norm(x: Tensor, *_: object) -> Tensor:
    return _image(x, channels=x.shape[1])


def _joined(x: Tensor, skip: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    channels = x.shape[1] + skip.shape[1]
    return _image(x, channels=channels), _image(x, channels=channels)


def _gated(projected: Tensor) -> Tensor:
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)


def _two(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _upsampled(x: Tensor) -> Tensor:
    return _image(x, channels=x.shape[1], scale=2)


HOLLOW = Ops(
    groupnorm=_norm,
    groupnorm_silu=_norm,
    shifted_groupnorm_silu=_norm,
    joined_groupnorm_silu=_joined,
    geglu=_gated,
    layernorm=_like,
    add_layernorm=_two,
    add_bias=_norm,
    upsample=_upsampled,
    late=True,
)
"""Shapes, dtypes and layouts of the fused table, and none of its work."""
