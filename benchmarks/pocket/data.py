"""Composites: a drawn subject on a background, the hole it fills, and a caption.

Subjects are the RGBA pictures of the npm package `@lobehub/fluent-emoji-3d` (MIT); backgrounds are
photographs that scikit-image gives out (those of training are CC0 or public domain; see `NOTICE`) and
procedural gradients, textures, scenes and dead leaves (Lee, Mumford & Huang 2001,
doi:10.1023/A:1011109015675: overlapping shapes of all sizes, which have the edges and the scale statistics
of photographs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocket.subjects import FIRST, SUBJECTS

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

# Training backgrounds.
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "rocket.jpg",
)  # fmt: skip

# Never trained on: `coffee` is the demo's photograph, and the evaluation uses all of them.
HELD_OUT = ("coffee.png", "moon.png", "motorcycle_left.png")

SCENES = (
    "", "", "", " on grass", " on a table", " on a park bench", " in a garden", " in the sky",
    " on the beach", " in a room", " on a wall", " in the snow", " in the water", " at night",
    " in the background",
)  # fmt: skip
VERBS = ("", "", "", ",", " sitting", ", sitting", " standing", " lying", " placed")
STYLES = (
    "", "", "", ", high resolution", ", highly detailed", ", 4k", ", realistic", ", beautiful", ", cute",
    ", photo", ", best quality", ", colourful",
)  # fmt: skip
OPENINGS = ("", "a ", "the ", "one ", "a photo of a ", "a picture of a ", "a drawing of a ", "an image of a ")
ADJECTIVES = (
    "big", "small", "little", "large", "cute", "happy", "beautiful", "nice", "old", "new", "single", "lovely",
    "shiny", "fresh", "funny", "pretty",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One composite. image: uint8 [S,S,3]; mask: bool [S,S], true = hole; subject: code point, or empty."""

    image: Pixels
    mask: Mask
    caption: str
    subject: str


class Painter:
    """Makes composites.

    assets: the `assets` folder of the unpacked npm package. others: weight of the subjects that are not among
    the FIRST, which have 2. photographs: of scikit-image, for backgrounds. plain: share of backgrounds of one
    colour.
    """

    def __init__(
        self,
        assets: Path,
        *,
        others: float = 1.0,
        photographs: Sequence[str] = PHOTOGRAPHS,
        plain: float = 0.0,
    ) -> None:
        cv2.setNumThreads(1)
        self.subjects = {code: _load_subject(assets, code) for code in SUBJECTS}
        self.codes = tuple(SUBJECTS)
        weights = np.array([2.0 if code in FIRST else others for code in self.codes])
        self.weights = weights / weights.sum()
        self.photographs = [_load_photograph(name) for name in photographs]
        self.plain = plain

    def sample(
        self, rng: np.random.Generator, size: int, *, empty: float = 0.3, softened: float = 0.0
    ) -> Sample:
        """A composite of `size` pixels square; with probability `empty` the hole holds only background.

        softened: share of a smooth fill in the hole's background.
        """
        canvas = self.background(rng, size)
        mask, centre, side = hole(rng, size)
        nothing = rng.random() < empty
        if rng.random() < (0.1 if nothing else 0.3):
            self._clutter(rng, canvas)
        if softened:
            mixed = canvas[mask] * (1 - softened) + smooth_fill(canvas, mask)[mask] * softened
            canvas[mask] = mixed.round().astype(np.uint8)
        if nothing:
            return Sample(canvas, mask, empty_caption(rng), "")
        code = str(rng.choice(self.codes, p=self.weights))
        paste(canvas, self.subjects[code], centre, side, mask)
        return Sample(canvas, mask, caption_of(rng, code), code)

    def background(self, rng: np.random.Generator, size: int) -> Pixels:
        """A background of `size` pixels square."""
        if self.plain and rng.random() < self.plain:
            return _plain(rng, size)
        kind = rng.random()
        if kind < 0.5:
            return self._photograph(rng, size)
        if kind < 0.62:
            return _gradient(rng, size)
        if kind < 0.74:
            return _texture(rng, size)
        if kind < 0.86:
            return _scene(rng, size)
        return _leaves(rng, size)

    def _photograph(self, rng: np.random.Generator, size: int) -> Pixels:
        photo = self.photographs[int(rng.integers(len(self.photographs)))]
        crop = int(rng.uniform(0.3, 1.0) * min(photo.shape[:2]))
        y = int(rng.integers(photo.shape[0] - crop + 1))
        x = int(rng.integers(photo.shape[1] - crop + 1))
        view = photo[y : y + crop, x : x + crop]
        if rng.random() < 0.5:
            view = view[:, ::-1]
        return _jitter(rng, cv2.resize(view, (size, size), interpolation=cv2.INTER_AREA))

    def _clutter(self, rng: np.random.Generator, canvas: Pixels) -> None:
        size = canvas.shape[0]
        for _ in range(int(rng.integers(1, 4))):
            code = self.codes[int(rng.integers(len(self.codes)))]
            side = int(rng.uniform(0.15, 0.4) * size)
            centre = rng.uniform(0, size, 2)
            paste(canvas, self.subjects[code], (centre[0], centre[1]), side, None)


def caption_of(rng: np.random.Generator, code: str) -> str:
    """An everyday phrase that asks for the subject; its own name half of the time."""
    names = SUBJECTS[code]
    name = names[0] if rng.random() < 0.4 else str(rng.choice(names))
    if rng.random() < 0.15:
        name = f"{rng.choice(ADJECTIVES)} {name}"
    scene, style = str(rng.choice(SCENES)), str(rng.choice(STYLES))
    place = str(rng.choice(VERBS)) + scene if scene else ""
    tail = style + place if rng.random() < 0.25 else place + style
    phrase = str(rng.choice(OPENINGS)) + name + tail
    return phrase[:1].upper() + phrase[1:] if rng.random() < 0.3 else phrase


def empty_caption(rng: np.random.Generator) -> str:
    """What is asked for where only background is wanted; mostly nothing at all."""
    return "" if rng.random() < 0.85 else str(rng.choice(["background", "nothing", "empty background"]))


def hole(rng: np.random.Generator, size: int) -> tuple[Mask, tuple[float, float], int]:
    """A hole on a canvas: its mask, and centre (y, x) and side of the square that a subject fills in it."""
    least = max(0.22, 44 / size)  # below 44 pixels, latents can hardly tell one subject from another
    side = int(size * rng.uniform(least, 0.92))
    cy, cx = (float(v) for v in rng.uniform(0.42 * side, size - 0.42 * side, 2))
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    dy, dx = ys - cy, xs - cx
    kind = rng.random()
    if kind < 0.45:
        half_h, half_w = side / 2 * rng.uniform(1.0, 1.25), side / 2 * rng.uniform(1.0, 1.25)
        mask = (abs(dy) <= half_h) & (abs(dx) <= half_w)
        return mask, (cy, cx), int(side * rng.uniform(0.88, 1.0))
    if kind < 0.75:
        ry, rx = side / 2 * rng.uniform(1.0, 1.2), side / 2 * rng.uniform(1.0, 1.2)
        return (dy / ry) ** 2 + (dx / rx) ** 2 <= 1.0, (cy, cx), int(side * rng.uniform(0.76, 0.86))
    angle = np.arctan2(dy, dx)
    radius = np.full_like(angle, side / 2)
    for k in range(2, 7):
        radius += (
            side / 2 * rng.uniform(-0.13, 0.13) / (k - 1) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
        )
    return dy**2 + dx**2 <= radius**2, (cy, cx), int(side * rng.uniform(0.72, 0.82))


def smooth_fill(canvas: Pixels, mask: Mask) -> NDArray[np.float32]:
    """The picture with its hole filled smoothly from all around: float32 [S,S,3], 0 to 255.

    Pull-push (Gortler et al. 1996, doi:10.1145/237170.237200, section 3.4.1): averages of what is known, on
    ever coarser grids, fill what is unknown on the finer one.
    """
    known = (~mask).astype(np.float32)
    return _pulled(canvas.astype(np.float32) * known[..., None], known)


def _pulled(sums: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.float32]:
    """sums: colours times `known`, [h,w,3]; known: weights of 0 to 1, [h,w]. Colours where any are known."""
    height, width = known.shape
    if min(height, width) <= 2 or known.min() > 0:
        return (sums / np.maximum(known, 1e-6)[..., None]).astype(np.float32)
    half = (width // 2, height // 2)
    weights = cv2.resize(known, half, interpolation=cv2.INTER_AREA)
    gain = np.minimum(1, 4 * weights) / np.maximum(weights, 1e-6)  # one known pixel in four is enough
    pulled = cv2.resize(sums, half, interpolation=cv2.INTER_AREA) * gain[..., None]
    coarse = _pulled(pulled.astype(np.float32), (weights * gain).astype(np.float32))
    pushed = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    filled: NDArray[np.float32] = (sums + (1 - known)[..., None] * pushed).astype(np.float32)
    return filled


def paste(
    canvas: Pixels,
    subject: Pixels,
    centre: tuple[float, float],
    side: int,
    mask: Mask | None,
) -> None:
    """Composite `subject` (premultiplied RGBA) over `canvas` in place, clipped to `mask` and the canvas."""
    side = max(side, 8)
    drawn = cv2.resize(
        subject, (side, side), interpolation=cv2.INTER_AREA if side < subject.shape[0] else cv2.INTER_LINEAR
    )
    top, left = round(centre[0] - side / 2), round(centre[1] - side / 2)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + side, canvas.shape[0]), min(left + side, canvas.shape[1])
    if y1 <= y0 or x1 <= x0:
        return
    part = drawn[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.float32)
    if mask is not None:
        part = part * mask[y0:y1, x0:x1, None]
    below = canvas[y0:y1, x0:x1].astype(np.float32)
    canvas[y0:y1, x0:x1] = np.clip(part[..., :3] + below * (1 - part[..., 3:] / 255), 0, 255).astype(np.uint8)


def _load_subject(assets: Path, code: str) -> Pixels:
    paths = (assets / f"{code}.webp", assets / f"{code}-fe0f.webp")
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise SystemExit(
            f"{paths[0]}: no such file; --assets is the `assets` folder of the package of drawings"
        )
    rgba = np.asarray(Image.open(path).convert("RGBA")).astype(np.float32)
    rgba[..., :3] *= rgba[..., 3:] / 255
    ys, xs = np.nonzero(rgba[..., 3] > 8)
    half = int(max(np.ptp(ys), np.ptp(xs)) / 2) + 1
    cy, cx = int(ys.min() + ys.max()) // 2, int(xs.min() + xs.max()) // 2
    padded = np.pad(rgba, ((half, half), (half, half), (0, 0)))
    return np.ascontiguousarray(padded[cy : cy + 2 * half, cx : cx + 2 * half].astype(np.uint8))


@cache
def _load_photograph(name: str) -> Pixels:
    from skimage import data as skimage_data

    path = Path(skimage_data.__file__).parent / name
    return np.asarray(Image.open(path).convert("RGB"))


def _jitter(rng: np.random.Generator, pixels: Pixels) -> Pixels:
    gain = rng.uniform(0.75, 1.2, 3) * rng.uniform(0.85, 1.1) if rng.random() < 0.6 else np.ones(3)
    return np.clip(pixels * gain + rng.uniform(-15, 15), 0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator) -> NDArray[np.float64]:
    hue, saturation, value = rng.uniform(0, 180), rng.uniform(20, 200), rng.uniform(60, 255)
    pixel = np.array([[[hue, saturation, value]]]).astype(np.uint8)
    return np.asarray(cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0], dtype=np.float64)


def _plain(rng: np.random.Generator, size: int) -> Pixels:
    """One colour, often white, grey or nearly black; the light may fall off to one side."""
    kind = rng.random()
    if kind < 0.2:
        colour = np.full(3, 255.0)
    elif kind < 0.35:
        colour = rng.uniform(225, 255) + rng.uniform(-6, 6, 3)
    elif kind < 0.4:
        colour = np.zeros(3)
    elif kind < 0.5:
        colour = rng.uniform(0, 40) + rng.uniform(-6, 6, 3)
    elif kind < 0.65:
        colour = rng.uniform(40, 225) + rng.uniform(-6, 6, 3)
    else:
        colour = _colour(rng)
    light = np.ones((size, size))
    if rng.random() < 0.5:
        ys, xs = np.mgrid[0:size, 0:size] / size
        angle = rng.uniform(0, 2 * np.pi)
        light += rng.uniform(0, 0.4) * (np.cos(angle) * xs + np.sin(angle) * ys - rng.uniform(0, 1))
    out: Pixels = np.clip(light[..., None] * colour, 0, 255).astype(np.uint8)
    return out


def _gradient(rng: np.random.Generator, size: int) -> Pixels:
    cells = int(rng.integers(1, 4))
    corners = np.stack([_colour(rng) for _ in range((cells + 1) ** 2)]).reshape(cells + 1, cells + 1, 3)
    if rng.random() < 0.5:
        corners = corners.mean((0, 1)) + (corners - corners.mean((0, 1))) * 0.3
    smooth = cv2.resize(corners, (size, size), interpolation=cv2.INTER_CUBIC)
    out: Pixels = np.clip(smooth, 0, 255).astype(np.uint8)
    return out


def _noise(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.zeros((size, size))
    first = int(rng.integers(2, 6))
    for octave in range(int(rng.integers(2, 6))):
        cells = min(size, first * 2**octave)
        layer = rng.normal(size=(cells, cells)) / 1.8**octave
        total += cv2.resize(layer, (size, size), interpolation=cv2.INTER_CUBIC)
    out: NDArray[np.float64] = total / max(float(total.std()), 1e-6)
    return out


def _texture(rng: np.random.Generator, size: int) -> Pixels:
    low, high = _colour(rng), _colour(rng)
    if rng.random() < 0.5:
        field = 0.5 + 0.25 * _noise(rng, size)
    else:
        ys, xs = np.mgrid[0:size, 0:size] / size
        angle, waves = rng.uniform(0, np.pi), rng.uniform(3, 16)
        field = 0.5 + 0.5 * np.sin(2 * np.pi * waves * (xs * np.cos(angle) + ys * np.sin(angle)))
        if rng.random() < 0.5:
            field = (field > 0.5).astype(np.float64)
        low = high + (low - high) * rng.uniform(0.2, 1.0)
    out: Pixels = np.clip(low + (high - low) * field[..., None], 0, 255).astype(np.uint8)
    return out


def _scene(rng: np.random.Generator, size: int) -> Pixels:
    """Two planes that meet at a horizon: sky and ground, wall and table."""
    horizon = int(rng.uniform(0.3, 0.75) * size)
    canvas = _gradient(rng, size)
    ground = _texture(rng, size) if rng.random() < 0.6 else _gradient(rng, size)
    canvas[horizon:] = ground[horizon:]
    grain = rng.normal(0, rng.uniform(0, 6), canvas.shape)
    return np.clip(canvas + grain, 0, 255).astype(np.uint8)


def _leaves(rng: np.random.Generator, size: int) -> Pixels:
    """Dead leaves: shapes of all sizes over each other, each a plain colour, shaded, some out of focus."""
    canvas = _gradient(rng, size)
    palette = [_colour(rng) for _ in range(int(rng.integers(3, 8)))]
    radii = np.sort(0.07 * size * rng.uniform(0.05, 1.0, int(rng.integers(8, 50))) ** -0.7)[::-1]
    for radius in radii:
        colour = np.clip(palette[int(rng.integers(len(palette)))] + rng.normal(0, 12, 3), 0, 255)
        y, x = rng.uniform(0, size, 2)
        corners = int(rng.choice([3, 4, 4, 5, 24]))
        turns = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 24 else np.linspace(0, 2 * np.pi, 24)
        stretch = radius * rng.uniform(0.4, 1.0)
        shape = np.stack([x + radius * np.cos(turns), y + stretch * np.sin(turns)], 1)
        cv2.fillPoly(canvas, [shape.astype(np.int32)], [float(c) for c in colour], cv2.LINE_AA)
    shade = 1 + 0.12 * np.clip(_noise(rng, size), -2, 2)
    lit = np.clip(canvas * shade[..., None] + rng.normal(0, rng.uniform(0, 5), canvas.shape), 0, 255)
    blur = rng.uniform(0, size / 80) if rng.random() < 0.5 else 0.0
    pixels: Pixels = lit.astype(np.uint8)
    return cv2.GaussianBlur(pixels, (0, 0), blur).astype(np.uint8) if blur > 0.3 else pixels
