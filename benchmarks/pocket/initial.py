"""Weights to start from, so that a short run learns what matters.

An autoencoder starts as the best-known poor one: block means, interpolated. Group norms divide away what a
picture's colour is told by, so one that starts at random spends most of a short run on learning colour. Here
channels 0 to 2 of the residual stream carry the picture from end to end; the two norms on that way see
constants of known size beside it, which makes them nearly linear, and every residual branch starts at zero
(as in Goyal et al. 2017, arXiv:1706.02677, section 5.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RGB = 3
CONSTANT = 3.0  # magnitude of the channels that share a group with the picture
SHIFT = 3.0  # where SiLU is nearly straight
LATENT_GAIN = 2.0  # pictures have a standard deviation of about a half; latents are wanted near one


@torch.no_grad()
def start_as_block_means(model: Any) -> None:
    """Set the weights of an `AutoencoderKL` so that it encodes means of 8 x 8 pixels and decodes smoothly.

    The fourth latent channel and all other channels keep their random weights.
    """
    encoder, decoder = model.encoder, model.decoder
    for half in (encoder, decoder):
        start_at_zero(half)
        for name, module in half.named_modules():
            if name.endswith("conv_shortcut") and module is not None:
                _carry(module, torch.ones(1, 1))
    _carry(encoder.conv_in, _centre())
    for block in encoder.down_blocks[:-1]:
        _carry(block.downsamplers[0].conv, F.pad(torch.full((2, 2), 0.25), (0, 1, 0, 1)))
    _hold(encoder.conv_norm_out, encoder.down_blocks[-1].resnets[0].conv_shortcut)
    _read(encoder.conv_out, LATENT_GAIN)
    _carry(model.quant_conv, torch.ones(1, 1))
    _carry(model.post_quant_conv, torch.ones(1, 1))
    _carry(decoder.conv_in, _centre() / LATENT_GAIN)
    tent = torch.tensor([1.0, 2.0, 1.0]) / 4
    for block in decoder.up_blocks[:-1]:
        _carry(block.upsamplers[0].conv, torch.outer(tent, tent))
    _hold(decoder.conv_norm_out, decoder.up_blocks[-1].resnets[0].conv_shortcut)
    _read(decoder.conv_out, 1.0)


@torch.no_grad()
def start_at_zero(network: Any) -> None:
    """Set the last convolution of every residual branch to zero."""
    for name, module in network.named_modules():
        if name.endswith(".conv2"):
            module.weight.zero_()
            module.bias.zero_()


def _centre() -> Tensor:
    return F.pad(torch.ones(1, 1), (1, 1, 1, 1))


def _carry(conv: Any, kernel: Tensor) -> None:
    """Make channels 0 to 2 of a convolution's output its input's, each filtered by `kernel` [k,k]."""
    conv.weight[:RGB] = 0.0
    conv.bias[:RGB] = 0.0
    for i in range(RGB):
        conv.weight[i, i] = kernel


def _hold(norm: Any, before: Any) -> None:
    """Make `norm` nearly linear in the picture: `before` fills the rest of its group with constants."""
    size = norm.num_channels // norm.num_groups
    signs = torch.ones(size - RGB)
    signs[1::2] = -1.0
    signs[: (size - RGB) % 2] = 0.0  # an odd one out would move the mean
    before.weight[RGB:size] = 0.0
    before.bias[RGB:size] = signs * CONSTANT
    norm.weight[:RGB] = CONSTANT * (signs.square().sum() / size).sqrt()
    norm.bias[:RGB] = SHIFT


def _read(conv: Any, gain: float) -> None:
    """Undo SiLU at SHIFT to first order while reading channels 0 to 2."""
    at = torch.tensor(SHIFT, requires_grad=True)
    with torch.enable_grad():
        value = F.silu(at)
        (slope,) = torch.autograd.grad(value, at)
    _carry(conv, _centre() * (gain / slope))
    conv.bias[:RGB] = -value.detach() * gain / slope
