"""The embedded model: it fits, it opens elsewhere, and what it draws answers to the prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import ritocco
from pocket.judge import JUDGE, load_judge
from pocket.subjects import SUBJECTS
from ritocco.loading import pocket_model

SIDE = 256
DEFAULT = "DPMSolverMultistep"
HOLE = slice(64, 192)


@pytest.fixture(scope="module")
def engine() -> ritocco.Engine:
    return ritocco.load(pocket_model())


def hole_of(
    engine: ritocco.Engine,
    prompt: str,
    *,
    scheduler: str = DEFAULT,
    guidance: float = 7.5,
    spread: bool = False,
) -> npt.NDArray[np.float64]:
    """Mean red, green and blue (0 to 255) of the middle of a hole in a plain grey picture.

    spread: instead, how much neighbouring cells of eight pixels differ, root mean square.
    """
    image = np.full((SIDE, SIDE, 3), 150, np.uint8)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[HOLE, HOLE] = True
    prediction = engine.predict(
        {
            "image": image,
            "mask": mask,
            "prompt": prompt,
            "width": SIDE,
            "height": SIDE,
            "num_inference_steps": 15,
            "guidance_scale": guidance,
            "seed": 3,
            "scheduler": scheduler,
        }
    )
    pixels = np.asarray(prediction.images[0])
    assert (pixels[~mask] == 150).all()
    middle: npt.NDArray[np.float64] = pixels[96:160, 96:160].astype(np.float64)
    if spread:
        cells = middle.reshape(8, 8, 8, 8, 3).mean((1, 3))
        return np.asarray(np.sqrt(np.square(np.diff(cells, axis=0)).mean((0, 1))))
    return np.asarray(middle.reshape(-1, 3).mean(axis=0))


def test_it_is_at_most_30_megabytes() -> None:
    files = [path for path in pocket_model().rglob("*") if path.is_file()]
    assert 1_000_000 < sum(path.stat().st_size for path in files) <= 30_000_000


def test_the_prompt_decides_the_colour(engine: ritocco.Engine) -> None:
    red, yellow, neutral = (hole_of(engine, name) for name in ("a red apple", "a banana", "panda"))
    assert red[0] > red[1:].max() + 60
    assert yellow[:2].min() > yellow[2] + 50
    assert np.ptp(neutral) < 60


@pytest.mark.parametrize("scheduler", ["DDIM", "K_EULER", "K_EULER_ANCESTRAL", "PNDM", "KLMS"])
def test_every_scheduler_draws_the_same_thing(engine: ritocco.Engine, scheduler: str) -> None:
    red = hole_of(engine, "a red apple", scheduler=scheduler)
    assert red[0] > red[1:].max() + 60
    mild, usual = (hole_of(engine, "a red apple", scheduler=s, guidance=3.0) for s in (scheduler, DEFAULT))
    assert np.abs(mild - usual).max() < 25, "guidance drives colours apart in so few steps"


@pytest.mark.parametrize("scheduler", ["PNDM", "KLMS"])
def test_multistep_schedulers_are_stable(engine: ritocco.Engine, scheduler: str) -> None:
    """Where guidance is stiff at low noise they leave a mosaic of cells of eight pixels."""
    drawn = hole_of(engine, "a red apple", scheduler=scheduler, spread=True)
    assert drawn.max() < 1.3 * hole_of(engine, "a red apple", spread=True).max()


def test_an_empty_prompt_continues_the_background(engine: ritocco.Engine) -> None:
    empty, apple = hole_of(engine, ""), hole_of(engine, "a red apple")
    assert np.abs(empty - 150).max() < 40 < np.abs(apple - 150).max()


@pytest.mark.slow
def test_its_whole_vocabulary_works(engine: ritocco.Engine) -> None:
    """Every sixth subject by its first name; the judge never saw a picture of the model's."""
    judge, codes = load_judge(JUDGE)[0], tuple(SUBJECTS)[::6]
    image = np.full((SIDE, SIDE, 3), 150, np.uint8)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[32:224, 32:224] = True
    asked = {
        "image": image,
        "mask": mask,
        "width": SIDE,
        "height": SIDE,
        "num_inference_steps": 12,
        "seed": 3,
    }
    seen = {}
    for code in codes:
        painted = np.asarray(engine.predict({**asked, "prompt": SUBJECTS[code][0]}).images[0])
        seen[SUBJECTS[code][0]] = judge.names(painted[24:232, 24:232])
    right = sum(code == name for code, name in zip(codes, seen.values(), strict=True))
    assert right >= len(codes) - 2, seen


def test_an_empty_prompt_takes_up_colours_around(engine: ritocco.Engine) -> None:
    """A field of each colour, half bright and half dark; a hole of another colour is 50 and more away."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[64:160, 80:176] = True
    for colour in ((230, 90, 120), (20, 30, 110), (60, 140, 60), (220, 200, 80)):
        field = np.linspace(0.7, 1.1, SIDE)[:, None, None] * np.array(colour) * np.ones((1, SIDE, 1))
        image = np.clip(field, 0, 255).astype(np.uint8)
        given = {"image": image, "mask": mask, "prompt": "", "width": SIDE, "height": SIDE, "seed": 5}
        result = engine.predict({**given, "num_outputs": 2, "num_inference_steps": 15})
        painted = np.stack([np.asarray(picture) for picture in result.images]).astype(float)
        error = np.sqrt(np.square(painted[:, mask] - image[mask]).mean())
        assert error < 12, (colour, error)


def test_its_card_and_licence_travel_with_it() -> None:
    card = Path(pocket_model() / "README.md").read_text(encoding="utf-8")
    assert "MIT" in card
    assert "Fluent Emoji" in card
