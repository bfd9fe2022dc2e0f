"""The text encoder: transformers' `CLIPTextModel`, inference only."""

from __future__ import annotations

from torch import Tensor, nn

from ritocco.nets.clip import Encoder
from ritocco.nets.specs import TextSpec

__all__ = ["TextEncoder", "TextSpec"]


class Embeddings(nn.Module):
    """Token and position tables."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.position_embedding = nn.Embedding(spec.positions, spec.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N,L] int64, L at most `spec.positions` -> [N,L,width]."""
        embedded: Tensor = self.token_embedding(tokens)
        return embedded + self.position_embedding.weight[: tokens.shape[1]]


class TextModel(nn.Module):
    """Embeddings, causal layers, final norm: the part whose names begin with `text_model.`."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec)
        self.encoder = Encoder(spec.encoder, causal=True)
        self.final_layer_norm = nn.LayerNorm(spec.width, spec.encoder.eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N,L] -> [N,L,width]."""
        out: Tensor = self.final_layer_norm(self.encoder(self.embeddings(tokens)))
        return out


class TextEncoder(nn.Module):
    """The network. Parameters are frozen and named as in the checkpoints of Stable Diffusion 1 and 2."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.spec = spec
        self.text_model = TextModel(spec)
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [N,77] int64 -> context [N,77,width], the last hidden state behind the final norm.

        No padding mask: Stable Diffusion was trained with the padding visible.
        """
        out: Tensor = self.text_model(tokens)
        return out
