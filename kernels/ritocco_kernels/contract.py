"""What one operation promises, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec

import torch

P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True, slots=True)
class Op(Generic[P]):
    """One operation: its meaning and how exact every implementation of it must be.

    reference: the plain-PyTorch implementation, in the dtype of its input; a tensor or two.
    tolerance: per dtype, the largest error against a float64 truth, in units of eps(dtype) * max|truth|.
    """

    name: str
    reference: Callable[P, Any]
    tolerance: Mapping[torch.dtype, float]
