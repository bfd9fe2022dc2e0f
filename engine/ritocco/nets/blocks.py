"""Layers shared by the UNet and the VAE, with diffusers' parameter names.

Every module runs in the dtype and memory format of its parameters; none holds state that is not in a
checkpoint, so a network built under `torch.device("meta")` is complete after `load_state_dict(assign=True)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritocco_kernels.ops import Ops

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one attention layer, each [B,heads,L,head_dim]."""


def group_norm(ops: Ops, norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x), x [N,C,H,W], by whichever implementation the table holds."""
    return ops.groupnorm(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def norm_silu(ops: Ops, norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU(norm(x)), likewise."""
    return ops.groupnorm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def layer_norm(ops: Ops, norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x), x [...,C], likewise."""
    return ops.layernorm(x, norm.weight, norm.bias, norm.eps)


def add_norm(ops: Ops, norm: nn.LayerNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """x + residual, and norm of it, both [...,C]; x may be overwritten."""
    return ops.add_layernorm(x, residual, norm.weight, norm.bias, norm.eps)


def to_tokens(x: Tensor) -> Tensor:
    """[N,C,H,W] -> [N,H*W,C]; a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, like: Tensor) -> Tensor:
    """[N,H*W,C] -> [N,C,H,W] with the height and width of `like`: a channels_last view."""
    return tokens.reshape(tokens.shape[0], *like.shape[2:], tokens.shape[2]).permute(0, 3, 1, 2)


class ResnetBlock(nn.Module):
    """diffusers' `ResnetBlock2D`: norm, SiLU, convolution, twice, plus the input.

    time_dim: width of the time embedding, or None for a block that knows no time (the VAE's).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        groups: int,
        eps: float,
        ops: Ops,
        time_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.norm1 = nn.GroupNorm(groups, channels_in, eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, channels_out)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = None if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, time: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """x [N,channels_in,H,W], time [N,channels_out] of `added_by_time` -> [N,channels_out,H,W].

        skip: the rest of x's channels, where `late` operations join them.
        """
        # One name, and sums in place: each intermediate is freed as soon as the next exists. At full
        # resolution these blocks set the decoder's peak memory.
        if self.ops.late:
            return self._late(x, time, skip)
        hidden: Tensor = norm_silu(self.ops, self.norm1, x)
        hidden = self.conv1(hidden)
        if time is not None:
            hidden.add_(time[:, :, None, None])
        hidden = norm_silu(self.ops, self.norm2, hidden)
        hidden = self.conv2(hidden)
        hidden += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return hidden

    def added_by_time(self, embedding: Tensor) -> Tensor:
        """What `forward` takes as `time`: [R,time_dim] -> [R,channels_out]; the bias of conv1 comes with it
        where that is late.
        """
        projected: Tensor = cast(nn.Linear, self.time_emb_proj)(embedding)
        return projected + cast(Tensor, self.conv1.bias) if self.ops.late else projected

    def _late(self, x: Tensor, time: Tensor | None, skip: Tensor | None) -> Tensor:
        """`forward` with the join and both biases in the operations behind."""
        norm = self.norm1
        hidden: Tensor
        if skip is None:
            hidden = norm_silu(self.ops, norm, x)
        else:
            hidden, x = self.ops.joined_groupnorm_silu(
                x, skip, norm.weight, norm.bias, norm.num_groups, norm.eps
            )
        hidden = F.conv2d(hidden, self.conv1.weight, padding=1)
        shift = cast(Tensor, self.conv1.bias).expand(len(x), -1) if time is None else time
        norm = self.norm2
        hidden = self.ops.shifted_groupnorm_silu(
            hidden, shift, norm.weight, norm.bias, norm.num_groups, norm.eps
        )
        hidden = F.conv2d(hidden, self.conv2.weight, padding=1)
        if self.conv_shortcut is not None:
            tokens = F.linear(to_tokens(x), self.conv_shortcut.weight.flatten(1), self.conv_shortcut.bias)
            x = to_image(tokens, like=x)
        return self.ops.add_bias(hidden, cast(Tensor, self.conv2.bias), x)


class Downsample(nn.Module):
    """Halves height and width by a strided 3x3 convolution.

    trailing: pad on the right and bottom only, as the VAE does; else one cell on every side.
    """

    def __init__(self, channels: int, *, trailing: bool) -> None:
        super().__init__()
        self.trailing = trailing
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if trailing else 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,C,H/2,W/2]; H and W even."""
        if self.trailing:
            x = F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,C,2H,2W]."""
        out: Tensor = self.conv(self.ops.upsample(x))
        return out


class Attention(nn.Module):
    """Multi-head attention. [Vaswani et al. 2017, arXiv:1706.03762, Eq. 1]

    context_dim: width of what keys and values are made of; the width of the queries where None.
    bias: whether the three input projections have one (the UNet's have none, the VAE's do).
    """

    def __init__(self, width: int, heads: int, *, context_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_dim or width, width, bias=bias)
        self.to_v = nn.Linear(context_dim or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self._packed: tuple[Tensor, Tensor | None] | None = None  # weight and bias of all three projections

    def pack(self) -> None:
        """Make one product of the three that `forward` begins with where nothing is given to attend to."""
        self._packed = pack_linears([self.to_q, self.to_k, self.to_v])

    def unpack(self) -> None:
        """Compute by the layers again."""
        self._packed = None

    def split_heads(self, x: Tensor) -> Tensor:
        """[B,L,width] -> [B,heads,L,head_dim], a view."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def keys_values(self, source: Tensor) -> KeysValues:
        """source [B,L,context_dim] -> keys and values, each [B,heads,L,head_dim] (views of [B,L,width])."""
        return self.split_heads(self.to_k(source)), self.split_heads(self.to_v(source))

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        """x [B,S,width] -> [B,S,width]; attends to itself where no keys and values are given.

        Scores and softmax are float32 in every dtype: PyTorch's kernels accumulate so.
        """
        if keys_values is None and self._packed is not None:
            queries, keys, values = map(self.split_heads, F.linear(x, *self._packed).chunk(3, dim=-1))
        else:
            queries = self.split_heads(self.to_q(x))
            keys, values = self.keys_values(x) if keys_values is None else keys_values
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        out: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out


def pack_linears(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weights of several layers one below the other, and their biases; the layers become views of them,
    so that nothing lies in memory twice. All have the same input, and all or none a bias.
    """
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([cast(Tensor, layer.bias) for layer in layers])
    first = 0
    for layer in layers:
        last = first + layer.out_features
        layer.weight.data = weight[first:last]
        if bias is not None:
            layer.bias.data = bias[first:last]
        first = last
    return weight, bias


class SpatialAttention(Attention):
    """The VAE's attention: one head over all cells, with its own norm and residual."""

    def __init__(self, channels: int, *, groups: int, eps: float, ops: Ops) -> None:
        super().__init__(channels, 1, bias=True)
        self.ops = ops
        self.group_norm = nn.GroupNorm(groups, channels, eps)

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        """x [N,C,H,W] -> [N,C,H,W]."""
        tokens = to_tokens(group_norm(self.ops, self.group_norm, x))
        return x + to_image(super().forward(tokens, keys_values), like=x)


class Geglu(nn.Module):
    """Projection to values and gates, then their gated product."""

    def __init__(self, width: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """[...,width] -> [...,inner]."""
        return self.ops.geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU of four times the width, and back.

    most: bytes that values and gates may take at once, or None: more tokens than have room go in parts, which
    changes rounding alone.
    """

    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.most: int | None = None
        # Index 1 is diffusers' dropout, which has no parameters but holds its place in the names.
        self.net = nn.Sequential(Geglu(width, 4 * width, ops), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[...,width] -> [...,width]."""
        out: Tensor
        if self.most is None or 8 * x.nbytes <= self.most:
            out = self.net(x)
            return out
        out = torch.empty_like(x)
        tokens, made = x.flatten(0, -2), out.flatten(0, -2)
        together = max(self.most * len(tokens) // (8 * x.nbytes), 1)
        for first in range(0, len(tokens), together):
            made[first : first + together] = self.net(tokens[first : first + together])
        return out


class TransformerBlock(nn.Module):
    """diffusers' `BasicTransformerBlock` in two halves, because the first does not depend on the prompt."""

    def __init__(self, width: int, heads: int, *, context_dim: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, ops)

    def attend_self(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Self-attention and its residual, and the norm behind: [B,S,width] -> two of [B,S,width]."""
        attended: Tensor = self.attn1(layer_norm(self.ops, self.norm1, tokens))
        return add_norm(self.ops, self.norm2, attended, tokens)

    def attend_context(self, tokens: Tensor, normed: Tensor, context: KeysValues) -> Tensor:
        """Cross-attention and feed-forward with their residuals: of `attend_self` -> [B,S,width]."""
        tokens, normed = add_norm(self.ops, self.norm3, self.attn2(normed, context), tokens)
        out: Tensor = self.ff(normed)
        return out.add_(tokens)
