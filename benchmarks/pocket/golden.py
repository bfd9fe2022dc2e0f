"""Golden pictures: what each scheduler paints from a fixed seed: `python -m pocket.golden`.

The tests paint them again on every backend, compare, and ask the judge what is to be seen. They change with
the model's weights, and with nothing else.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ritocco
from pocket.data import Mask, Pixels
from ritocco.schedules import SCHEDULERS

FOLDER = Path(__file__).parents[2] / "tests" / "golden"
SIDE = 256
SUBJECT = "1f431"  # the code point of what PROMPT asks for
PROMPT = "face of a yellow cat"
_ASSETS = Path(str(files("ritocco"))) / "assets"


def asked(scheduler: str) -> dict[str, Any]:
    """The input of a golden picture."""
    return {
        "image": _ASSETS / "coffee.jpg",
        "mask": _ASSETS / "coffee-mask.png",
        "prompt": PROMPT,
        "width": SIDE,
        "height": SIDE,
        "num_inference_steps": 25,
        "scheduler": scheduler,
        "seed": 7,
    }


def hole() -> Mask:
    """bool [SIDE,SIDE], true where a golden picture is painted: the mask's own pixels, its rim left out."""
    mask = Image.open(_ASSETS / "coffee-mask.png").convert("L")
    inside: Mask = np.asarray(mask.resize((SIDE, SIDE), Image.Resampling.BOX)) == 255
    return inside


def window(picture: Pixels) -> Pixels:
    """The part of a golden picture around its hole."""
    ys, xs = np.nonzero(hole())
    return picture[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    engine = ritocco.load(device="cpu", dtype="float32", backend="torch")
    args.out.mkdir(parents=True, exist_ok=True)
    for scheduler in SCHEDULERS:
        path = args.out / f"{scheduler}.png"
        engine.predict(asked(scheduler)).images[0].save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
