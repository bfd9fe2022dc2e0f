"""What one operation promises, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True, slots=True)
class Op(Generic[P]):
    """One operation: its meaning and how exact every implementation of it must be.

    reference: the plain-PyTorch implementation, in the dtype of its input.
    tolerance: per dtype, the largest error against a float64 truth, in units of eps(dtype) * max|truth|.
    """

    name: str
    reference: Callable[P, Tensor]
    tolerance: Mapping[torch.dtype, float]
