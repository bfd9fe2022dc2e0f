"""What the networks' parity tests share: weights that matter, and how far a result is from the truth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomise(module: nn.Module, seed: int) -> None:
    """Weights that matter: the libraries' own initialisation leaves norms at one and biases near zero.

    Matrices keep the scale of what passes through them; norms vary around one; embeddings are unit normal.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(one.weight) for one in module.modules() if isinstance(one, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim == 1:
                parameter.mul_(0.2).add_(1.0 if name.endswith("weight") else 0.0)
            elif id(parameter) not in embeddings:
                parameter.mul_(parameter[0].numel() ** -0.5)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """The largest difference, as a share of the largest value of the truth."""
    return float((result.float() - truth.float()).abs().max() / truth.float().abs().max())
