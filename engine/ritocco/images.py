"""A request's pictures -> pixels and mask; the network's pictures -> files.

Rules, each where people of inpainting were bitten before:

* the EXIF orientation applies to image and mask (`sources.py`);
* a transparent image lies on white, as a page shows it; a transparent mask on black, so transparent = keep;
* the mask is cut at one half of white in its own size, before resizing, so grey noise never adds up to white;
* black is a promise: `paste_back` returns those pixels bit for bit.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ritocco.errors import RequestError
from ritocco.fetch import MAX_BYTES, Fetcher
from ritocco.pixels import Floats, Mask, Pixels, mask_to_latent, pasted
from ritocco.sources import MAX_PIXELS, Loader

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
QUALITY = 95
MIME_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Inputs:
    """What the networks and `paste_back` see of a request's pictures.

    pixels: uint8 [H,W,3]. mask: bool [H,W], True = repaint. notes: lines for the log.
    """

    pixels: Pixels
    mask: Mask
    notes: tuple[str, ...] = ()


def load_inputs(
    image: Any,
    mask: Any,
    *,
    width: int,
    height: int,
    allow_local: bool = False,
    fetcher: Fetcher | None = None,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Inputs:
    """Loads both pictures and brings them to width x height pixels, aspect not kept, as the original does.

    allow_local, fetcher, max_bytes, max_pixels: as in `sources.Loader`.
    The image is resized with Lanczos, as diffusers' processor does. The mask is cut at one half first
    and stretched over the image; then a pixel is white where at least half of its area is (a box filter), so
    that thin strokes aren't kept or lost by chance, as with nearest neighbours. Its way over the image's own
    size is one straight scaling, taken in one step. An all-black or all-white mask is allowed and noted.
    Raises RequestError and FetchError, with the field `input.image` or `input.mask`.
    """
    loader = Loader(allow_local=allow_local, fetcher=fetcher, max_bytes=max_bytes, max_pixels=max_pixels)
    # One after the other: a picture may be hundreds of times larger than what is made of it.
    with loader.flat(image, field="input.image", ground=WHITE) as picture:
        across, down = picture.size
        pixels = np.array(picture.resize((width, height), Image.Resampling.LANCZOS))
        del picture
    with loader.flat(mask, field="input.mask", ground=BLACK, mode="L") as stencil:
        wide, high = stencil.size
        white = stencil.point([0] * 128 + [255] * 128)
        repaint = np.asarray(white.resize((width, height), Image.Resampling.BOX)) >= 128
        del stencil, white
    notes = []
    if (wide, high) != (across, down):
        notes.append(
            f"Warning: the mask has {wide}x{high} pixels and the image {across}x{down}; "
            "the mask is stretched over it"
        )
    return Inputs(pixels=pixels, mask=repaint, notes=(*notes, *_mask_notes(repaint)))


def _mask_notes(mask: Mask) -> tuple[str, ...]:
    if not mask.any():
        return ("Warning: the mask is all black (as transparent parts count): nothing is repainted",)
    if mask.all():
        return ("The mask is all white: everything is repainted",)
    if not mask_to_latent(mask).any():
        return ("Warning: the white of the mask is too thin: the network sees every 8th pixel of it",)
    return ()


def paste_back(generated: Pixels, pixels: Pixels, mask: Mask, feather: float = 0.0) -> Pixels:
    """Puts the kept pixels over the generated ones; those under the black mask are `pixels`, bit for bit.

    generated: uint8 [H,W,3] or [N,H,W,3]. pixels: uint8 [H,W,3]. mask: bool [H,W], True = repaint.
    feather: width in pixels of a linear blend on the white side, from 0 at the seam, which lies half a pixel
    before the first white pixel's centre, to 1. The picture's edge is no seam.
    Returns an array of the shape of `generated`.
    """
    if feather <= 0:
        return pasted(generated, (pixels, mask))
    inside = seam_distance(mask, feather + 1.0) - np.float32(0.5)
    weight = np.clip(inside / np.float32(feather), 0.0, 1.0)[..., None]
    kept = pixels.astype(np.float32)
    blend = np.rint(kept + weight * (generated.astype(np.float32) - kept)).astype(np.uint8)
    return pasted(np.where(weight < 1.0, blend, generated), (pixels, mask))


def seam_distance(mask: Mask, limit: float) -> Floats:
    """Euclidean distance in pixels from each pixel's centre to the nearest black one's, exact up to `limit`.

    mask: bool [H,W]. Returns float32 [H,W]: 0 where black, at least `limit` where nothing black is within it.
    Columns first, then along each row the lower envelope of parabolas, trying each shift up to the limit.
    [Felzenszwalb and Huttenlocher 2012, "Distance transforms of sampled functions"]
    """
    height, width = mask.shape
    reach = int(np.ceil(limit)) + 1
    rows = np.arange(height, dtype=np.int64)[:, None]
    above = np.maximum.accumulate(np.where(mask, -reach, rows), axis=0)
    below = np.minimum.accumulate(np.where(mask, height + reach, rows)[::-1], axis=0)[::-1]
    column = np.minimum(np.minimum(rows - above, below - rows), reach).astype(np.float32) ** 2
    nearest = column.copy()
    for shift in range(1, min(reach, width)):
        step = np.float32(shift * shift)
        np.minimum(nearest[:, shift:], column[:, :-shift] + step, out=nearest[:, shift:])
        np.minimum(nearest[:, :-shift], column[:, shift:] + step, out=nearest[:, :-shift])
    return np.sqrt(nearest)


def encode(pixels: Pixels, output_format: str = "png") -> bytes:
    """uint8 [H,W,3] -> a file's bytes, without metadata.

    output_format: png (exact), jpg (quality 95, colour not subsampled) or webp (quality 95). Those two are
    lossy, so kept pixels are bit-identical in png only. Raises RequestError for another name.
    """
    if output_format not in MIME_TYPES:
        text = f"output_format is {output_format!r}; it must be png, jpg or webp"
        raise RequestError(text, field="output_format")
    picture, file = Image.fromarray(pixels), io.BytesIO()
    if output_format == "png":
        picture.save(file, "PNG")
    elif output_format == "jpg":
        picture.save(file, "JPEG", quality=QUALITY, subsampling=0)
    else:
        picture.save(file, "WEBP", quality=QUALITY)
    return file.getvalue()


def data_uri(encoded: bytes, output_format: str = "png") -> str:
    """A file's bytes, from `encode` with the same format, as `data:image/png;base64,...`."""
    return f"data:{MIME_TYPES[output_format]};base64,{base64.b64encode(encoded).decode('ascii')}"
