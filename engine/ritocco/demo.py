"""`ritocco demo`: repaint the photograph that ships with the package, and lay everything out on one sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ritocco.engine import Engine

PROMPTS = ("yellow cat face", "a green frog", "a red car", "a hamburger", "a rocket", "a red heart")
SEED = 7
STEPS = 25
SIDE = 512
_GAP, _CAPTION = 12, 40


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
