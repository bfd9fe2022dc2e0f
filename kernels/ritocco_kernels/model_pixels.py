"""Between bytes of pictures and what the autoencoder takes and gives."""

from __future__ import annotations

import torch
from torch import Tensor


def to_model_pixels_reference(pixels: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """2 p / 255 - 1, and 0 (mid grey) where the mask is true: what the network may see of a picture.

    pixels: uint8 [N,H,W,3]. mask: bool [N,H,W], true = repaint, or None. Returns [N,3,H,W] in [-1,1],
    channels_last, computed in float32. [diffusers, VaeImageProcessor.normalize]
    """
    model = 2.0 * (pixels.float() / 255.0) - 1.0
    if mask is not None:
        model = model.masked_fill(mask[..., None], 0.0)
    return model.permute(0, 3, 1, 2).to(dtype)


def from_model_pixels_reference(
    decoded: Tensor, pixels: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x / 2 + 1/2 clipped to [0,1], times 255, rounded half to even; the kept pixels where the mask is false.

    decoded: [N,3,H,W], any floating dtype. pixels: uint8 [H,W,3] and mask: bool [H,W], true = repaint, of all
    pictures; or None and None. Returns uint8 [N,H,W,3], and bool []: whether every number was finite.
    [diffusers, VaeImageProcessor.denormalize and numpy_to_pil]
    """
    x = decoded.float()
    made = ((x * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)
    if pixels is not None and mask is not None:
        made = torch.where(mask[..., None], made, pixels)
    return made, x.isfinite().all()
