"""The autoencoder between pixels and latents: diffusers' `AutoencoderKL`, inference only.

[Kingma & Welling 2013, arXiv:1312.6114; Rombach et al. 2022, arXiv:2112.10752, appendix G]
"""

from __future__ import annotations

from torch import Tensor, nn

from ritocco.nets.blocks import Downsample, ResnetBlock, SpatialAttention, Upsample, norm_silu
from ritocco.nets.specs import VAESpec
from ritocco_kernels.ops import REFERENCE, Ops

__all__ = ["VAE", "VAESpec"]

_EPS = 1e-6


def _resnet(spec: VAESpec, channels_in: int, channels_out: int, ops: Ops) -> ResnetBlock:
    return ResnetBlock(channels_in, channels_out, groups=spec.groups, eps=_EPS, ops=ops)


class Stage(nn.Module):
    """Resnets at one resolution, then a halving (`down`), a doubling (`up`) or nothing (None)."""

    def __init__(
        self, spec: VAESpec, channels_in: int, channels: int, count: int, move: str | None, ops: Ops
    ) -> None:
        super().__init__()
        inputs = [channels_in] + [channels] * (count - 1)
        self.resnets = nn.ModuleList(_resnet(spec, each, channels, ops) for each in inputs)
        self.downsamplers = nn.ModuleList([Downsample(channels, trailing=True)] if move == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(channels, ops)] if move == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        """[N,channels_in,H,W] -> [N,channels,H',W']."""
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Middle(nn.Module):
    """Resnet, attention over all cells (in checkpoints that have it), resnet."""

    def __init__(self, spec: VAESpec, ops: Ops) -> None:
        super().__init__()
        width = spec.channels[-1]
        self.attentions = nn.ModuleList(
            [SpatialAttention(width, groups=spec.groups, eps=_EPS, ops=ops)] if spec.mid_attention else []
        )
        self.resnets = nn.ModuleList(_resnet(spec, width, width, ops) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,h,w] -> [N,C,h,w]."""
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Pixels to the posterior's moments, before `quant_conv`."""

    def __init__(self, spec: VAESpec, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        widths = spec.channels
        self.conv_in = nn.Conv2d(spec.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(
                spec,
                widths[max(level - 1, 0)],
                width,
                spec.layers,
                None if level == len(widths) - 1 else "down",
                ops,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = Middle(spec, ops)
        self.conv_norm_out = nn.GroupNorm(spec.groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * spec.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N,3,H,W] -> [N,2*latent_channels,H/8,W/8]: mean, then log variance."""
        x = self.conv_in(pixels)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        out: Tensor = self.conv_out(norm_silu(self.ops, self.conv_norm_out, x))
        return out


class Decoder(nn.Module):
    """Latents to pixels, after `post_quant_conv`."""

    def __init__(self, spec: VAESpec, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        widths = spec.channels[::-1]
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(spec, ops)
        self.up_blocks = nn.ModuleList(
            Stage(
                spec,
                widths[max(position - 1, 0)],
                width,
                spec.layers + 1,
                None if position == len(widths) - 1 else "up",
                ops,
            )
            for position, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(spec.groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], spec.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """[N,latent_channels,h,w] -> [N,3,8h,8w]."""
        x = self.conv_in(latents)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        out: Tensor = self.conv_out(norm_silu(self.ops, self.conv_norm_out, x))
        return out


class VAE(nn.Module):
    """The network. Parameters are frozen and named as in diffusers' checkpoints.

    `8` in the shapes stands for `spec.factor`.
    """

    def __init__(self, spec: VAESpec, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.spec = spec
        moments = 2 * spec.latent_channels
        self.encoder = Encoder(spec, ops)
        self.decoder = Decoder(spec, ops)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if spec.quant_conv else None
        self.post_quant_conv = (
            nn.Conv2d(spec.latent_channels, spec.latent_channels, 1) if spec.post_quant_conv else None
        )
        self.requires_grad_(False)

    def encode_mean(self, pixels: Tensor) -> Tensor:
        """Scaled posterior mean. pixels: [N,3,H,W] in [-1,1], H and W multiples of 8 -> [N,4,H/8,W/8].

        diffusers samples the posterior at this place; the mean makes a picture a function of its inputs.
        """
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean: Tensor = moments[:, : self.spec.latent_channels] * self.spec.scaling_factor
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [N,4,h,w], scaled as the UNet's -> pixels [N,3,8h,8w], about [-1,1], not clamped."""
        unscaled = latents / self.spec.scaling_factor
        if self.post_quant_conv is not None:
            unscaled = self.post_quant_conv(unscaled)
        pixels: Tensor = self.decoder(unscaled)
        return pixels
