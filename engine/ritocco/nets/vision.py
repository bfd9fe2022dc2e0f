"""The safety checker's image network: diffusers' `StableDiffusionSafetyChecker` up to the image embeddings.

What the embeddings are compared with lies in the same checkpoint and is kept beside them; the comparison is
not done here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ritocco.nets.clip import Encoder
from ritocco.nets.specs import VisionSpec

__all__ = ["SafetyVision", "VisionSpec"]

CONCEPTS = 17
SPECIAL_CARE_CONCEPTS = 3


class Embeddings(nn.Module):
    """One token per patch, a class token before them, positions added."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        width, patch = spec.encoder.width, spec.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(spec.in_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((spec.image_size // patch) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N,3,size,size] -> [N,1+patches,width]."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(pixels.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Embeddings, layers, and the norm of the class token."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec)
        # The spelling is the checkpoints'.
        self.pre_layrnorm = nn.LayerNorm(spec.encoder.width, spec.encoder.eps)
        self.encoder = Encoder(spec.encoder, causal=False)
        self.post_layernorm = nn.LayerNorm(spec.encoder.width, spec.encoder.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N,3,size,size] -> [N,width]."""
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        out: Tensor = self.post_layernorm(hidden[:, 0])
        return out


class VisionModel(nn.Module):
    """Holder of the second `vision_model.` in the checkpoints' names."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(spec)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N,3,size,size] -> [N,width]."""
        out: Tensor = self.vision_model(pixels)
        return out


class SafetyVision(nn.Module):
    """The network, with the concepts' embeddings [17 or 3,projection_dim] and thresholds as buffers."""

    concept_embeds: Tensor
    special_care_embeds: Tensor
    concept_embeds_weights: Tensor
    special_care_embeds_weights: Tensor

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.vision_model = VisionModel(spec)
        self.visual_projection = nn.Linear(spec.encoder.width, spec.projection_dim, bias=False)
        self.register_buffer("concept_embeds", torch.ones(CONCEPTS, spec.projection_dim))
        self.register_buffer("special_care_embeds", torch.ones(SPECIAL_CARE_CONCEPTS, spec.projection_dim))
        self.register_buffer("concept_embeds_weights", torch.ones(CONCEPTS))
        self.register_buffer("special_care_embeds_weights", torch.ones(SPECIAL_CARE_CONCEPTS))
        self.requires_grad_(False)

    def image_embeds(self, pixels: Tensor) -> Tensor:
        """pixels: [N,3,224,224], normalised by CLIP's mean and deviation -> [N,projection_dim]."""
        out: Tensor = self.visual_projection(self.vision_model(pixels))
        return out
