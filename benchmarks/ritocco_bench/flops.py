"""How much a request has to compute, counted on networks without weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ritocco.checkpoint import Checkpoint
from ritocco.nets.specs import UNetSpec
from ritocco.nets.unet import UNet
from ritocco.nets.vae import VAE
from ritocco.parameters import build

TOKENS = 77


def flops(checkpoint: Checkpoint, *, size: int, outputs: int) -> dict[str, float]:
    """FLOP (a product and a sum are two) of matrix products, convolutions and attention.

    size: pixels a side. Keys: `step`, a guided step of all outputs with every layer computed for both
    prompts, as everybody counts, whatever is shared; `encode`, of one picture; `decode`, of all.
    """
    spec = UNetSpec.from_config(checkpoint.unet)
    cells, rows = size // 8, 2 * outputs
    with torch.device("meta"):
        unet, vae = build("unet", checkpoint.unet), build("vae", checkpoint.vae)
        assert isinstance(unet, UNet)
        assert isinstance(vae, VAE)
        sample = torch.empty(rows, spec.in_channels, cells, cells)
        context = torch.empty(rows, TOKENS, spec.context_dim)
        step = _counted(unet, sample, torch.empty(rows), context)
        encode = _counted(_Method(vae.encode_mean), torch.empty(1, 3, size, size))
        decode = _counted(_Method(vae.decode), torch.empty(outputs, spec.out_channels, cells, cells))
    return {"step": step, "encode": encode, "decode": decode}


class _Method(nn.Module):
    def __init__(self, method: object) -> None:
        super().__init__()
        self._method = method

    def forward(self, x: Tensor) -> Tensor:
        return self._method(x)  # type: ignore[operator,no-any-return]


def _counted(module: nn.Module, *inputs: Tensor) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return float(counter.get_total_flops())
