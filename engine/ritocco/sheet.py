"""A contact sheet: titled pictures in rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

_GAP, _CAPTION = 12, 40


def sheet(tiles: Sequence[tuple[str, Image.Image]], *, columns: int = 4, side: int = 320) -> Image.Image:
    """A contact sheet: titled pictures in rows."""
    rows = -(-len(tiles) // columns)
    width = columns * (side + _GAP) + _GAP
    canvas = Image.new("RGB", (width, rows * (side + _CAPTION + _GAP) + _GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=18)
    for index, (title, image) in enumerate(tiles):
        x = _GAP + index % columns * (side + _GAP)
        y = _GAP + index // columns * (side + _CAPTION + _GAP)
        whole = ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)
        canvas.paste(whole, (x + (side - whole.width) // 2, y + (side - whole.height) // 2))
        draw.text((x, y + side + 8), fitted(title, side, font.getlength), fill="black", font=font)
    return canvas


def fitted(title: str, width: float, length: Callable[[str], float]) -> str:
    """The title, or as much of its beginning as `width` holds, with dots behind."""
    shown = title
    while title and length(shown) > width:
        title = title[:-1]
        shown = f"{title.rstrip()}..."
    return shown
