"""Pictures changed a strip at a time: of a large one every copy takes hundreds of megabytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

STRIP_PIXELS = 1 << 20


def from_16_bits(levels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """uint16 [H,W] or [H,W,C] -> uint8: scaled, not clipped."""
    made = np.empty(levels.shape, np.uint8)
    rows = _rows_of_a_strip(levels.shape[1])
    for top in range(0, len(levels), rows):
        strip = levels[top : top + rows].astype(np.uint32)
        made[top : top + rows] = (strip * 255 + 32767) // 65535
    return made


def _rows_of_a_strip(width: int) -> int:
    return max(1, STRIP_PIXELS // width)


def on_colour(picture: Image.Image, colour: tuple[int, int, int], mode: str) -> Image.Image:
    """In mode RGB or L, transparent parts laid on the colour; the picture itself where nothing changes."""
    if picture.mode == mode and not picture.has_transparency_data:
        return picture
    width, height = picture.size
    made, rows = Image.new(mode, picture.size), _rows_of_a_strip(width)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        made.paste(_opaque(strip, colour).convert(mode), (0, top))
    return made


def _opaque(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """RGB: the picture itself where opaque, else laid on the colour. Other colour spaces: Pillow's rules."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    if picture.mode in ("La", "PA"):
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    ground = Image.new("RGBA", picture.size, (*colour, 255))
    return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")
