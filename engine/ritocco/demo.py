"""`ritocco demo`: repaint the photograph that ships with the package, and lay everything out on one sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from PIL import Image

from ritocco.engine import Engine
from ritocco.sheet import sheet

PROMPTS = ("yellow cat face", "a green frog", "a red car", "a hamburger", "a rocket", "a red heart")
SEED = 7
STEPS = 25
SIDE = 512


def run(
    engine: Engine, out: Path, *, prompts: Sequence[str] = PROMPTS, say: Callable[[str], None] = print
) -> Path:
    """Paint every prompt into the photograph; write pictures and sheet to `out`. Returns the sheet's path.

    Raises IsADirectoryError, before anything is painted, for a folder in the place of a picture.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sheet.png"
    paths = [out / f"out-{index}.png" for index in range(len(prompts))]
    for taken in (path, *paths):
        if taken.is_dir():
            raise IsADirectoryError(f"{taken} is a folder")
    assets = Path(str(files("ritocco"))) / "assets"
    photograph, mask = assets / "coffee.jpg", assets / "coffee-mask.png"
    tiles = [("photograph", Image.open(photograph).convert("RGB")), ("mask", Image.open(mask).convert("RGB"))]
    for picture, prompt in zip(paths, prompts, strict=True):
        prediction = engine.predict(
            {
                "image": photograph,
                "mask": mask,
                "prompt": prompt,
                "num_inference_steps": STEPS,
                "seed": SEED,
                "width": SIDE,
                "height": SIDE,
            }
        )
        title = f'"{prompt}"' if prompt else "empty prompt"
        say(f"{title}: {prediction.metrics['predict_time']:.1f} s")
        for image in prediction.images:
            image.save(picture)
            tiles.append((title, image))
    sheet(tiles).save(path)
    return path
