"""Sizes that a set of graphs takes, as written on the command line: `512x512@1..4`, `256..1024@1..8`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ritocco.errors import RequestError
from ritocco.nets.io import MOST_IMAGES, PROMPTS, TABLE_ROWS, GraphName, Range
from ritocco.shown import shown

CELL = 8
_LEAST, _MOST, _STEP = 64, 1024, 64  # pixels, as the request has them
_PATTERN = re.compile(
    r"(?P<a>N)(?:\.\.(?P<b>N))?(?:x(?P<c>N)(?:\.\.(?P<d>N))?)?(?:@(?P<e>N)(?:\.\.(?P<f>N))?)?".replace(
        "N", "[0-9]{1,9}"
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Widths and heights in pixels, pictures in a batch: least and most of each."""

    width: tuple[int, int] = (_LEAST, _MOST)
    height: tuple[int, int] = (_LEAST, _MOST)
    images: tuple[int, int] = (1, 4)

    @classmethod
    def parse(cls, text: str) -> Profile:
        """From `512x512@1..4`: width, height, pictures; one side stands for both. Raises RequestError."""
        found = _PATTERN.fullmatch(text.strip())
        if found is None:
            raise RequestError(
                f"--profile is {shown(text)}; write WIDTHxHEIGHT@PICTURES, each a number or a range, as in "
                "512x512@1..4 or 256..1024@1..8",
                field="--profile",
            )
        a, b, c, d, e, f = (None if part is None else int(part) for part in found.groups())
        width = _pair(a, b)
        profile = cls(
            width=width,
            height=width if c is None else _pair(c, d),
            images=(1, 4) if e is None else _pair(e, f),
        )
        profile.check(text)
        return profile

    def check(self, text: str) -> None:
        """Raises RequestError for sizes that no request can have."""
        for name, (least, most) in (("width", self.width), ("height", self.height)):
            if not _LEAST <= least <= most <= _MOST or least % _STEP or most % _STEP:
                rule = f"multiples of {_STEP} from {_LEAST} to {_MOST}, the smaller first"
                raise RequestError(
                    f"--profile is {shown(text)}; its {name}s must be {rule}", field="--profile"
                )
        if not 1 <= self.images[0] <= self.images[1] <= MOST_IMAGES:
            rule = f"from 1 to {MOST_IMAGES}, the smaller first"
            raise RequestError(f"--profile is {shown(text)}; its pictures must be {rule}", field="--profile")


def ranges_of(profiles: Iterable[Profile]) -> dict[GraphName, Mapping[str, Range]]:
    """What each graph has to take so that every profile runs: cells, UNet rows (two a picture), pictures."""
    held = list(profiles) or [Profile()]
    width, height = (_hull([getattr(one, side) for one in held]) for side in ("width", "height"))
    images = _hull([one.images for one in held])
    cells = {
        "H": _range(height[0] // CELL, height[1] // CELL),
        "W": _range(width[0] // CELL, width[1] // CELL),
    }
    # One picture at guidance 1 is one row; the autoencoder and the encoder of two prompts work one by one.
    rows = (1, 2 * images[0], 2 * images[1])
    return {
        "text_encoder": {"N": (1, 2, max(2, images[1]))},
        "unet": {"M": rows, **cells},
        "unet_once": {"R": TABLE_ROWS, "M": PROMPTS, **cells},
        "unet_step": {"N": (1, images[0], images[1]), "M": rows, **cells},
        "vae_encoder": {"N": (1, 1, images[1]), **cells},
        "vae_decoder": {"N": (1, 1, images[1]), **cells},
    }


def _range(least: int, most: int) -> Range:
    return least, min(max(64, least), most), most


def _pair(least: int | None, most: int | None) -> tuple[int, int]:
    assert least is not None  # noqa: S101 - the pattern has it
    return least, least if most is None else most


def _hull(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    return min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
