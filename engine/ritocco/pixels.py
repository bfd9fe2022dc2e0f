"""Between bytes of pictures and what the networks take and give, in NumPy.

Kernels do the same on a GPU: `ritocco_kernels.model_pixels`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ritocco.errors import NonFiniteError

Pixels: TypeAlias = npt.NDArray[np.uint8]
Mask: TypeAlias = npt.NDArray[np.bool_]
Floats: TypeAlias = npt.NDArray[np.float32]
Kept: TypeAlias = tuple[Pixels, Mask]
"""A picture, uint8 [H,W,3], and where it is repainted, bool [H,W]: elsewhere it stays as it is."""

LATENT_FACTOR = 8


def to_model(pixels: Pixels) -> Floats:
    """uint8 [H,W,3] -> float32 [1,3,H,W] in [-1,1], with the arithmetic of diffusers' image processor."""
    unit = pixels.astype(np.float32) / np.float32(255.0)
    return np.ascontiguousarray((np.float32(2.0) * unit - np.float32(1.0)).transpose(2, 0, 1)[None])


def masked_to_model(pixels: Pixels, mask: Mask | None) -> Floats:
    """As `to_model`, with 0 (mid grey) where the mask is white: what the network may see of the image.

    pixels: uint8 [H,W,3]. mask: bool [H,W], or None. `masked_image` in diffusers' inpainting pipeline.
    """
    model = to_model(pixels)
    return model if mask is None else np.where(mask, np.float32(0.0), model)


def mask_to_latent(mask: Mask) -> Floats:
    """bool [H,W] -> float32 [1,1,H/8,W/8], 1 = repaint: the top left pixel of each 8x8 block.

    What nearest interpolation gives in diffusers' `prepare_mask_latents`; H and W are multiples of 8.
    """
    return np.ascontiguousarray(mask[::LATENT_FACTOR, ::LATENT_FACTOR].astype(np.float32)[None, None])


def not_finite() -> NonFiniteError:
    """Of what was decoded."""
    return NonFiniteError(
        "the decoded image holds NaN or infinity: float16 overflowed (try float32 or bfloat16), or weights "
        "are damaged",
        step=-1,
    )


def from_model(decoded: npt.NDArray[np.floating[Any]]) -> Pixels:
    """float [N,3,H,W] in [-1,1] -> uint8 [N,H,W,3]; clipped, rounded half to even, as diffusers does.

    Raises NonFiniteError, with step -1 (after the last step), where a value is NaN or infinite.
    """
    if not np.isfinite(decoded).all():
        raise not_finite()
    unit = np.clip(decoded.astype(np.float32) * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
    return np.ascontiguousarray(np.rint(unit * np.float32(255.0)).astype(np.uint8).transpose(0, 2, 3, 1))


def pasted(made: Pixels, kept: Kept | None) -> Pixels:
    """uint8 [N,H,W,3] with the kept pixels where the mask is false."""
    return made if kept is None else np.where(kept[1][..., None], made, kept[0])
