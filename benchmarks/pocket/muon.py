"""Muon: momentum made orthogonal, for weights that are matrices.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), scaled so that an update has the size of one
of Adam's, and Adam's rates apply: Liu et al. 2025, arXiv:2502.16982, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
SCALE = 0.2


class Muon(torch.optim.Optimizer):
    """For float32 weights of two or more dimensions; a convolution's [O,I,h,w] is the matrix [O,I*h*w]."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients. Processes of one group share the work and get the same update."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            update = torch.zeros(sum(weight.numel() for weight in weights), dtype=torch.bfloat16)
            parts = torch.split(update, [weight.numel() for weight in weights])
            loads = [0] * world
            for weight, part in zip(weights, parts, strict=True):
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, 1 - group["momentum"])
                turn = loads.index(min(loads))
                loads[turn] += weight.numel()
                if turn == rank:
                    ahead = weight.grad.lerp(mean, group["momentum"]).flatten(1)
                    part.copy_((orthogonal(ahead) * (SCALE * max(ahead.shape) ** 0.5)).flatten())
            if world > 1:
                dist.all_reduce(update)
            for weight, part in zip(weights, parts, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(part.view_as(weight), alpha=-group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values between about 0.7 and 1.2."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / (wide.norm() + 1e-7)).to(torch.bfloat16)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    out: Tensor = (x if wide is matrix else x.T).to(matrix.dtype)
    return out
