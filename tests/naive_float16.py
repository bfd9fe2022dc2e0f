"""Layers as one would write them who keeps nothing in float32: every intermediate number is rounded to the
dtype of the inputs. What the tests of float16's range compare with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 65504.0
EPS = torch.finfo(torch.float16).eps
WRONG = 0.2  # of the largest value: what these are off by at least, past the range, where they are not NaN


def drawn(*shape: int, seed: int, scale: float = 1.0, most: float = 60000.0) -> Tensor:
    """float16: normal, times scale, not beyond most."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (scale * made).clamp(-most, most).half()


def off(result: Tensor, truth: Tensor) -> float:
    """The largest error as a share of the largest value; infinity where a number is not finite."""
    if not result.isfinite().all():
        return float("inf")
    return float((result.double() - truth).abs().max() / truth.abs().max())


def naive_norm(x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


def naive_groupnorm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    normed = naive_norm(x.reshape(len(x), groups, -1), eps).reshape(x.shape)
    return normed * weight[:, None, None] + bias[:, None, None]


def naive_layernorm(
    x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    return naive_norm(x, eps) * weight + bias


def naive_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) * 0.5


def naive_quick_gelu(x: Tensor) -> Tensor:
    power = (1.702 * x).exp()
    return x * (power / (1 + power))


def naive_linear(x: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(len(x), len(weight), dtype=x.dtype)
    for column in range(x.shape[1]):
        total = total + x[:, column, None] * weight[:, column]
    return total


def naive_conv(x: Tensor, weight: Tensor) -> Tensor:
    columns: Tensor = F.unfold(x, 3, padding=1)
    return naive_linear(columns[0].T, weight.flatten(1)).T.reshape(1, -1, *x.shape[2:])


def naive_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = queries @ keys.mT * queries.shape[-1] ** -0.5
    out: Tensor = scores.softmax(dim=-1) @ values
    return out
