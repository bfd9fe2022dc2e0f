"""Contact sheets of the embedded model: `python -m pocket.gallery --out docs`.

Every sheet repaints the demo's photograph and asks one question: subjects and seeds, schedulers, guidance,
shapes of the mask, sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ritocco
from pocket.data import Mask
from pocket.evaluate import SCHEDULERS, STEPS
from ritocco.sheet import sheet

SUBJECTS = (
    "yellow cat face", "a panda", "a green frog", "a penguin", "a red apple", "a banana", "a strawberry",
    "a hamburger", "a doughnut", "a sunflower", "a red car", "a rocket", "a house", "a robot", "a red heart",
    "a football",
)  # fmt: skip
PROMPT = "yellow cat face"
SIZES = ((256, 256), (512, 512), (768, 768), (768, 512), (512, 768))
Tiles = list[tuple[str, Image.Image]]


class Studio:
    """The demo's photograph and the engine that repaints it."""

    def __init__(self, engine: ritocco.Engine) -> None:
        assets = Path(str(files("ritocco"))) / "assets"
        self.engine, self.photograph, self.mask = engine, assets / "coffee.jpg", assets / "coffee-mask.png"

    def paint(self, prompt: str = PROMPT, *, mask: Any = None, seed: int = 7, **fields: Any) -> Image.Image:
        """One picture of the photograph."""
        asked = {
            "image": self.photograph,
            "mask": self.mask if mask is None else mask,
            "prompt": prompt,
            "seed": seed,
            "num_inference_steps": STEPS,
            **fields,
        }
        picture: Image.Image = self.engine.predict(asked).images[0]
        return picture


def subjects(studio: Studio) -> Tiles:
    """Subjects, two seeds each."""
    return [(f'"{name}", seed {seed}', studio.paint(name, seed=seed)) for name in SUBJECTS for seed in (7, 8)]


def schedulers(studio: Studio) -> Tiles:
    """All six, the same seed."""
    return [(name, studio.paint(scheduler=name)) for name in SCHEDULERS]


def guidance(studio: Studio) -> Tiles:
    """From none to much."""
    return [(f"guidance {g:g}", studio.paint(guidance_scale=g)) for g in (1, 3, 7.5, 15)]


def masks(studio: Studio) -> Tiles:
    """The hole's shape and place."""
    return [
        (name, picture)
        for name, mask in shapes(512).items()
        for picture in (studio.paint("a red apple", mask=np.where(mask, 255, 0).astype(np.uint8)),)
    ]


def sizes(studio: Studio) -> Tiles:
    """Width by height."""
    return [(f"{w} x {h}", studio.paint(width=w, height=h)) for w, h in SIZES]


def shapes(side: int) -> dict[str, Mask]:
    """Masks that people draw."""
    ys, xs = np.mgrid[0:side, 0:side] / side - 0.5
    angle, radius = np.arctan2(ys, xs), np.hypot(ys, xs)
    wobble = 0.27 + 0.04 * np.cos(3 * angle + 1) + 0.03 * np.sin(5 * angle)
    return {
        "square": (abs(ys) < 0.25) & (abs(xs) < 0.25),
        "round": radius < 0.28,
        "free-hand": radius < wobble,
        "off-centre": np.hypot(ys - 0.22, xs + 0.24) < 0.2,
    }


SHEETS: dict[str, Callable[[Studio], Tiles]] = {
    "subjects": subjects,
    "schedulers": schedulers,
    "guidance": guidance,
    "masks": masks,
    "sizes": sizes,
}


def palette_of(picture: Image.Image) -> Image.Image:
    """256 colours, for a small PNG: rare ones are kept, and each is the mean of what it stands for."""
    return picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sheets", nargs="*", metavar="sheet", help=", ".join(SHEETS))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--model", type=Path, help="default: the embedded one")
    args = parser.parse_args()
    if unknown := set(args.sheets) - set(SHEETS):
        parser.error(f"no sheet {', '.join(sorted(unknown))}; there are {', '.join(SHEETS)}")
    studio = Studio(ritocco.load(args.model))
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.sheets or SHEETS:
        path = args.out / f"pocket-{name}.png"
        picture = sheet(SHEETS[name](studio), columns=8 if name == "subjects" else 4, side=224)
        palette_of(picture).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
