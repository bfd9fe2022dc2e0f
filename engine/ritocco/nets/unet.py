"""The denoising UNet: diffusers' `UNet2DConditionModel` for Stable Diffusion 1 and 2, inference only.

[Rombach et al. 2022, arXiv:2112.10752]. A run asks the network many times with the same context, timesteps
and condition: what depends only on those is computed once, by the `hoist_*` methods; `step` does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritocco.nets.blocks import (
    Attention,
    Downsample,
    KeysValues,
    ResnetBlock,
    TransformerBlock,
    Upsample,
    group_norm,
    norm_silu,
    pack_linears,
    to_image,
    to_tokens,
)
from ritocco.nets.specs import UNetSpec
from ritocco_kernels.ops import REFERENCE, Ops

__all__ = ["UNet", "UNetSpec"]


class Walk:
    """Position of one pass through the UNet: the next time vector, the next keys and values, the open skips.

    It starts with N lanes. Nothing before the first cross-attention depends on the prompt, so there the pass
    widens from N lanes to M rows, once, skips and time vectors included.
    """

    def __init__(
        self, time: Tensor, widths: list[int], context: tuple[KeysValues, ...], rows: Tensor | None
    ) -> None:
        self.skips: list[Tensor] = []
        self._time, self._widths = time, widths
        self._times = list(torch.split(time, widths, dim=1))
        self._context = iter(context)
        self._rows = rows

    def next_time(self) -> Tensor:
        """The next resnet's [N or M,C]."""
        return self._times.pop(0)

    def next_context(self) -> KeysValues:
        """The next cross-attention's keys and values, M rows."""
        return next(self._context)

    def widen(self, tokens: Tensor, normed: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same tensors with M rows; called before every cross-attention, it acts at the first."""
        if self._rows is None:
            return tokens, normed, residual
        rows, self._rows = self._rows, None
        wide = torch.split(self._time.index_select(0, rows), self._widths, dim=1)
        self._times = list(wide[len(wide) - len(self._times) :])
        self.skips = [_select_rows(skip, rows) for skip in self.skips]
        return tokens.index_select(0, rows), normed.index_select(0, rows), _select_rows(residual, rows)


def _select_rows(x: Tensor, rows: Tensor) -> Tensor:
    if x.is_contiguous():
        return x.index_select(0, rows)
    # index_select writes its result contiguously; through this view that means channels_last.
    return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)


class Transformer(nn.Module):
    """diffusers' `Transformer2DModel`: transformer blocks over the cells."""

    def __init__(self, spec: UNetSpec, level: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        width = spec.channels[level]
        self.norm = nn.GroupNorm(spec.groups, width, 1e-6)
        self.proj_in = _projection(width, linear=spec.linear_projection)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, spec.heads[level], context_dim=spec.context_dim, ops=ops)
            for _ in range(spec.transformer_layers[level])
        )
        self.proj_out = _projection(width, linear=spec.linear_projection)

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        """x [N or M,C,H,W] -> [M,C,H,W]."""
        tokens = _project(self.proj_in, to_tokens(group_norm(self.ops, self.norm, x)))
        for block in self.blocks():
            tokens, normed, x = walk.widen(*block.attend_self(tokens), x)
            tokens = block.attend_context(tokens, normed, walk.next_context())
        return x + to_image(_project(self.proj_out, tokens), like=x)

    def blocks(self) -> Iterator[TransformerBlock]:
        """The transformer blocks, in call order."""
        return (cast(TransformerBlock, block) for block in self.transformer_blocks)


def _projection(width: int, *, linear: bool) -> nn.Linear | nn.Conv2d:
    return nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)


def _project(projection: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
    # A 1x1 convolution is the same product; on tokens it needs no change of layout.
    return F.linear(tokens, projection.weight.flatten(1), projection.bias)


class Stage(nn.Module):
    """One resolution of one branch (or the middle): resnets, each with a transformer or none with.

    The state names are those of diffusers' Down/Up/CrossAttn blocks.
    """

    def __init__(self, spec: UNetSpec, level: int, inputs: list[int], *, transformers: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.attentions = nn.ModuleList(Transformer(spec, level, ops) for _ in range(transformers))
        self.resnets = nn.ModuleList(
            ResnetBlock(
                channels_in,
                spec.channels[level],
                groups=spec.groups,
                eps=spec.eps,
                time_dim=spec.time_dim,
                ops=ops,
            )
            for channels_in in inputs
        )


class DownStage(Stage):
    """Down the left branch: every intermediate result becomes a skip."""

    def __init__(self, spec: UNetSpec, level: int, ops: Ops) -> None:
        width, layers = spec.channels[level], spec.layers[level]
        inputs = [spec.channels[max(level - 1, 0)]] + [width] * (layers - 1)
        super().__init__(spec, level, inputs, transformers=layers * spec.down_attention[level], ops=ops)
        last = level == len(spec.channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width, trailing=False)])

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        """x [B,C_in,H,W] -> [B,C,H/2,W/2] (the last stage keeps H and W)."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, walk.next_time())
            if self.attentions:
                x = self.attentions[index](x, walk)
            walk.skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            walk.skips.append(x)
        return x


class MidStage(Stage):
    """The middle: resnet, transformer, resnet at the coarsest resolution."""

    def __init__(self, spec: UNetSpec, ops: Ops) -> None:
        level = len(spec.channels) - 1
        super().__init__(spec, level, [spec.channels[level]] * 2, transformers=1, ops=ops)

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        """x [B,C,H,W] -> [M,C,H,W]."""
        x = self.resnets[0](x, walk.next_time())
        x = self.attentions[0](x, walk)
        out: Tensor = self.resnets[1](x, walk.next_time())
        return out


class UpStage(Stage):
    """Up the right branch: each resnet takes the newest skip beside its input."""

    def __init__(self, spec: UNetSpec, level: int, ops: Ops) -> None:
        channels, layers = spec.channels, spec.layers[level]
        below = channels[min(level + 1, len(channels) - 1)]
        inputs = [below] + [channels[level]] * layers
        skips = [channels[level]] * layers + [channels[max(level - 1, 0)]]
        joined = [a + b for a, b in zip(inputs, skips, strict=True)]
        super().__init__(spec, level, joined, transformers=(layers + 1) * spec.up_attention[level], ops=ops)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(channels[level], ops)])

    def forward(self, x: Tensor, walk: Walk) -> Tensor:
        """x [M,C_below,H,W] -> [M,C,2H,2W] (the finest stage keeps H and W)."""
        for index, resnet in enumerate(self.resnets):
            if self.ops.late:
                x = resnet(x, walk.next_time(), walk.skips.pop())
            else:
                x = torch.cat([x, walk.skips.pop()], dim=1)
                x = resnet(x, walk.next_time())
            if self.attentions:
                x = self.attentions[index](x, walk)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class TimestepEmbedding(nn.Module):
    """The two-layer perceptron behind the sinusoid."""

    def __init__(self, width: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, sinusoid: Tensor) -> Tensor:
        """[R,width] -> [R,time_dim]."""
        out: Tensor = self.linear_2(F.silu(self.linear_1(sinusoid)))
        return out


class UNet(nn.Module):
    """The network. Parameters are frozen and named as in diffusers' checkpoints.

    M: UNet rows. N: lanes; a guided lane has two rows (one per prompt), a lane at guidance 1 has one.
    """

    def __init__(self, spec: UNetSpec, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.spec = spec
        self.ops = ops
        levels = range(len(spec.channels))
        self.conv_in = nn.Conv2d(spec.in_channels, spec.channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(spec.channels[0], spec.time_dim)
        self.down_blocks = nn.ModuleList(DownStage(spec, level, ops) for level in levels)
        self.mid_block = MidStage(spec, ops)
        self.up_blocks = nn.ModuleList(UpStage(spec, level, ops) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(spec.groups, spec.channels[0], spec.eps)
        self.conv_out = nn.Conv2d(spec.channels[0], spec.out_channels, 3, padding=1)
        self._context_projection: Tensor | None = None
        self.requires_grad_(False)

    def pack(self) -> None:
        """Join projections of the same input into one product each: queries, keys and values of every
        self-attention, and the keys and values of all cross-attentions.
        """
        blocks = [block for transformer in self._transformers() for block in transformer.blocks()]
        for block in blocks:
            block.attn1.pack()
        layers = [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
        self._context_projection, _ = pack_linears(layers)

    def unpack(self) -> None:
        """Let go of what `pack` made; the layers' parameters are the caller's to put back."""
        for transformer in self._transformers():
            for block in transformer.blocks():
                block.attn1.unpack()
        self._context_projection = None

    def bound_feed_forward(self, most: int) -> None:
        """Let no feed-forward layer hold more than `most` bytes of values and gates at once."""
        for transformer in self._transformers():
            for block in transformer.blocks():
                block.ff.most = most

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """One plain evaluation.

        sample: [M,in_channels,h,w], the scaled latents, then the mask, then the masked-image latents; h and w
        are multiples of `spec.size_multiple`. timestep: [M] float32, may be fractional.
        context: [M,77,context_dim]. sample and context in the dtype of the parameters.
        Returns the model output [M,out_channels,h,w].
        """
        latents, condition = sample[:, : self._latent_channels], sample[:, self._latent_channels :]
        time = self.hoist_timesteps(timestep)
        return self.step(latents, time, self.hoist_condition(condition), self.hoist_context(context), None)

    def hoist_context(self, context: Tensor) -> tuple[KeysValues, ...]:
        """Keys and values of every cross-attention, in call order.

        context: [M,77,context_dim]. Returns pairs of [M,heads,77,head_dim], views of [M,77,width].
        """
        if self._context_projection is not None:
            return self.split_context(self.project_context(context))
        return tuple(attention.keys_values(context) for attention in self._cross_attentions())

    def project_context(self, context: Tensor) -> Tensor:
        """Of a packed network: the same keys and values side by side, [M,77,K]."""
        return F.linear(context, cast(Tensor, self._context_projection))

    def split_context(self, projected: Tensor) -> tuple[KeysValues, ...]:
        """Views of what `project_context` returns, as `hoist_context` returns them."""
        attentions = list(self._cross_attentions())
        widths = [layer.out_features for one in attentions for layer in (one.to_k, one.to_v)]
        parts = iter(torch.split(projected, widths, dim=-1))
        return tuple((one.split_heads(next(parts)), one.split_heads(next(parts))) for one in attentions)

    def hoist_timesteps(self, timesteps: Tensor) -> Tensor:
        """What every resnet adds for each timestep: [R] float32 -> [R,T], the resnets' vectors side by side.

        [Ho et al. 2020, arXiv:2006.11239, appendix B; Vaswani et al. 2017, arXiv:1706.03762, section 3.5].
        The sinusoid is float32 in every dtype, as in diffusers: bfloat16 cannot tell timestep 998 from 999.
        """
        sinusoid = _sinusoid(timesteps, self.spec).to(self.conv_in.weight.dtype)
        embedding = F.silu(self.time_embedding(sinusoid))
        return torch.cat([resnet.added_by_time(embedding) for resnet in self._resnets()], dim=1)

    def hoist_condition(self, condition: Tensor) -> Tensor:
        """conv_in of the mask and the masked-image latents, bias included: [N,5,h,w] -> [N,C0,h,w]."""
        weight = self.conv_in.weight[:, self._latent_channels :]
        return F.conv2d(condition, weight, self.conv_in.bias, padding=1)

    def step(
        self,
        latents: Tensor,
        time: Tensor,
        condition: Tensor,
        context_kv: tuple[KeysValues, ...],
        rows: Tensor | None,
    ) -> Tensor:
        """The part of `forward` that changes from step to step.

        latents: [N,4,h,w], already scaled for the network. time: [N,T], rows of `hoist_timesteps`.
        condition: [N,C0,h,w], of `hoist_condition`. context_kv: of `hoist_context`, M rows.
        rows: [M] int64, the lane of each UNet row; None where lanes and rows are the same.
        Returns the model output [M,4,h,w]. No host synchronisation, no branch on data.
        """
        weight = self.conv_in.weight[:, : self._latent_channels]
        x = F.conv2d(latents, weight, padding=1) + condition
        walk = Walk(time, self._time_widths(), context_kv, rows)
        walk.skips.append(x)
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = block(x, walk)
        out: Tensor = self.conv_out(norm_silu(self.ops, self.conv_norm_out, x))
        return out

    @property
    def _latent_channels(self) -> int:
        return self.spec.out_channels

    def _stages(self) -> Iterator[Stage]:
        return (cast(Stage, block) for block in (*self.down_blocks, self.mid_block, *self.up_blocks))

    def _resnets(self) -> Iterator[ResnetBlock]:
        return (cast(ResnetBlock, resnet) for stage in self._stages() for resnet in stage.resnets)

    def _time_widths(self) -> list[int]:
        return [resnet.conv1.out_channels for resnet in self._resnets()]

    def _transformers(self) -> Iterator[Transformer]:
        return (cast(Transformer, item) for stage in self._stages() for item in stage.attentions)

    def _cross_attentions(self) -> Iterator[Attention]:
        return (block.attn2 for transformer in self._transformers() for block in transformer.blocks())


def _sinusoid(timesteps: Tensor, spec: UNetSpec) -> Tensor:
    """[R] -> [R,channels[0]] float32: cosines, then sines (the other way round without flip_sin_to_cos)."""
    half = spec.channels[0] // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(exponent / (half - spec.freq_shift))[None, :]
    waves = (
        (torch.cos(angles), torch.sin(angles))
        if spec.flip_sin_to_cos
        else (torch.sin(angles), torch.cos(angles))
    )
    return torch.cat(waves, dim=1)
