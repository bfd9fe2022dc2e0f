"""A mask between the editor's layers and the model: white is repainted. Pillow and NumPy only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ritocco.errors import RequestError
from ritocco.images import BLACK, seam_distance
from ritocco.pixels import Mask
from ritocco.shown import shown
from ritocco.sources import Loader

MAX_GROW_PX = 128
_WHITE = 128
_LAYER_ALPHA = 178  # so that what is under the mask can be seen; over half of white, so that it is white


def from_layers(layers: Sequence[bytes], *, loader: Loader) -> Mask | None:
    """What was painted: bool [H,W], True = repaint. None where there are no layers.

    layers: encoded pictures of one size, of white with alpha, as the editor keeps them. Raises RequestError.
    """
    found: Mask | None = None
    for layer in layers:
        white = read(layer, loader=loader)
        if found is not None and found.shape != white.shape:
            raise RequestError("input.mask: its layers differ in size", field="input.mask")
        found = white if found is None else found | white
    return found


def read(encoded: bytes, *, loader: Loader) -> Mask:
    """An encoded mask by the library's rules: transparent is kept, half of white and more is repainted.

    bool [H,W]. Raises RequestError.
    """
    with loader.flat(encoded, field="input.mask", ground=BLACK, mode="L") as stencil:
        mask: Mask = np.asarray(stencil) >= _WHITE
    return mask


def resized(mask: Mask, width: int, height: int) -> Mask:
    """Stretched; white where at least half of a pixel's area is, as `images.load_inputs` does it."""
    stencil = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    made: Mask = np.asarray(stencil.resize((width, height), Image.Resampling.BOX)) >= _WHITE
    return made


def grown(mask: Mask, pixels: Any) -> Mask:
    """With all that lies within so many pixels of its white, 0 to 128. Raises RequestError."""
    if type(pixels) not in (int, float) or not 0 <= pixels <= MAX_GROW_PX:
        raise RequestError(f"grow is {shown(pixels)}; it must be 0 to {MAX_GROW_PX} pixels", field="grow")
    if not pixels or not mask.any():
        return mask
    made: Mask = seam_distance(~mask, pixels + 1.0) <= pixels
    return made


def layer_of(mask: Mask) -> Image.Image:
    """The editor's layer: white, through which the picture can be seen, where the mask is."""
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = (255, 255, 255, _LAYER_ALPHA)
    return Image.fromarray(layer)


def png_of(mask: Mask) -> bytes:
    """A black and white file of one bit for each pixel."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG", optimize=True)
    return file.getvalue()


def refuse_empty(mask: Mask | None) -> Mask:
    """Raises RequestError where nothing would be repainted."""
    if mask is None or not mask.any():
        rule = "paint over what is to change, or load a mask: white is repainted"
        raise RequestError(f"input.mask is empty; {rule}", field="input.mask")
    return mask
