"""The transformer layers of CLIP, shared by the text encoder and the safety checker.

Parameters are named as in transformers' checkpoints.
[Radford et al. 2021, arXiv:2103.00020]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ritocco.nets.specs import EncoderSpec


def activate(x: Tensor, activation: str) -> Tensor:
    """`gelu` (exact, by erf) or `quick_gelu`, x * sigmoid(1.702 x).

    [Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2]
    """
    return x * torch.sigmoid(1.702 * x) if activation == "quick_gelu" else F.gelu(x)


class Attention(nn.Module):
    """Multi-head self-attention with biases. causal: a position sees itself and those before it."""

    def __init__(self, spec: EncoderSpec, *, causal: bool) -> None:
        super().__init__()
        self.heads = spec.heads
        self.causal = causal
        self.q_proj = nn.Linear(spec.width, spec.width)
        self.k_proj = nn.Linear(spec.width, spec.width)
        self.v_proj = nn.Linear(spec.width, spec.width)
        self.out_proj = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """[N,L,width] -> [N,L,width]."""
        split = (*x.shape[:2], self.heads, -1)
        queries, keys, values = (
            projection(x).reshape(split).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.fc1 = nn.Linear(spec.width, spec.inner)
        self.fc2 = nn.Linear(spec.inner, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """[...,width] -> [...,width]."""
        out: Tensor = self.fc2(activate(self.fc1(x), self.activation))
        return out


class Layer(nn.Module):
    """Attention and perceptron, each behind its norm and with its residual."""

    def __init__(self, spec: EncoderSpec, *, causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(spec.width, spec.eps)
        self.self_attn = Attention(spec, causal=causal)
        self.layer_norm2 = nn.LayerNorm(spec.width, spec.eps)
        self.mlp = Mlp(spec)

    def forward(self, x: Tensor) -> Tensor:
        """[N,L,width] -> [N,L,width]."""
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, spec: EncoderSpec, *, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spec, causal=causal) for _ in range(spec.layers))

    def forward(self, x: Tensor) -> Tensor:
        """[N,L,width] -> [N,L,width]."""
        for layer in self.layers:
            x = layer(x)
        return x
