"""The size to paint a picture at, where it is its own: as the model takes it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ritocco.errors import RequestError
from ritocco.shown import said
from ritocco.sources import FORMATS

MULTIPLE = 64
MOST = 1024
_FORMATS = tuple(map(str.upper, FORMATS))
_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)


def own_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels, from the head of a picture's file: the nearest multiples of 64, and where a
    side is over 1024, of both made smaller by the same factor.

    Raises RequestError where it has none that can be read.
    """
    try:
        with Image.open(file, formats=_FORMATS) as picture:
            width, height = picture.size
            turned = picture.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
    except Exception as error:  # decoders raise nearly every class on hostile bytes
        why = f"{str(file)!r} has no size that can be read: {said(error)}"
        raise RequestError(
            f"{why} (the formats that are read: {', '.join(FORMATS)})", field="image"
        ) from None
    scale = min(1.0, MOST / max(width, height))
    sides = (max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in (width, height))
    width, height = sides
    return (height, width) if turned else (width, height)
