"""`ritocco demo`: repaint the photograph that ships with the package, and lay everything out on one sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ritocco.engine import Engine

PROMPTS = ("yellow cat face", "a green frog", "a red car", "a hamburger", "a rocket", "a red heart")
SEED = 7
STEPS = 25
SIDE = 512
_GAP, _CAPTION = 12, 40


def run(
    engine: Engine, out: Path, *, prompts: Sequence[str] = PROMPTS, say: Callable[[str], None] = print
) -> Path:
    """Paint every prompt into the photograph; write pictures and sheet to `out`. Returns the sheet's path."""
    out.mkdir(parents=True, exist_ok=True)
    assets = Path(str(files("ritocco"))) / "assets"
    photograph, mask = assets / "coffee.jpg", assets / "coffee-mask.png"
    tiles = [("photograph", Image.open(photograph).convert("RGB")), ("mask", Image.open(mask).convert("RGB"))]
    for index, prompt in enumerate(prompts):
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
            image.save(out / f"out-{index}.png")
            tiles.append((title, image))
    path = out / "sheet.png"
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
        canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + side + 8), title, fill="black", font=font)
    return canvas
