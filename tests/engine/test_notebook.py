"""How predictions and engines show themselves in Jupyter."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ritocco import Engine, Prediction, load
from ritocco.notebook import SIDE

NEAR = 4.0  # levels of 255, for JPEG
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def engine() -> Any:
    with load(backend="torch") as made:
        yield made


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(b64decode(data))) for data in found]


def test_a_prediction_shows_before_mask_and_results(engine: Engine, ask: Ask) -> None:
    smooth = np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None].repeat(64, 1).repeat(3, 2)
    asked = ask(image=smooth, num_inference_steps=1, num_outputs=2, prompt="<script>alert(1)</script>")
    prediction = engine.predict(asked)
    html = prediction._repr_html_()
    assert re.findall(r"<figcaption>([^<]+)", html) == ["before", "mask", "result 0", "result 1"]
    before, mask, *results = pictures(html)
    for shown, made in zip(results, prediction.images, strict=True):
        coarse = [np.asarray(one.resize((8, 8), Image.Resampling.BOX), float) for one in (shown, made)]
        assert np.abs(coarse[0] - coarse[1]).mean() < NEAR
    kept = ~np.asarray(mask, bool)
    assert kept.any()
    apart = np.asarray(before, float)[kept] - np.asarray(results[0], float)[kept]
    assert np.abs(apart).mean() < NEAR, "as it was painted"
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    sheet = Image.open(io.BytesIO(prediction._repr_png_() or b""))
    assert sheet.width > 4 * 200


def test_what_a_notebook_keeps_is_small() -> None:
    picture = Image.new("RGB", (1024, 768))
    prediction = Prediction(status="succeeded", images=[picture])
    (shown,) = pictures(prediction._repr_html_())
    assert shown.size == (SIDE, SIDE * 3 // 4)


def test_a_prediction_that_failed_says_so() -> None:
    prediction = Prediction(status="failed", error="NSFW & nothing else")
    assert "NSFW &amp; nothing else" in prediction._repr_html_()
    assert prediction._repr_png_() is None


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"predict_time": 2}, "2.00 s"),
        ({"predict_time": 0.126}, "0.13 s"),
        ({"predict_time": "soon"}, "soon"),
        ({"predict_time": None}, None),
        ({}, None),
    ],
)
def test_the_time_is_shown_where_there_is_one(metrics: dict[str, Any], shown: str | None) -> None:
    html = Prediction(status="succeeded", metrics=metrics)._repr_html_()
    assert re.findall(r"predict_time</th><td[^>]*>([^<]*)", html) == ([] if shown is None else [shown])


def test_what_is_shown_is_no_part_of_the_answer(engine: Engine, ask: Ask) -> None:
    prediction = engine.predict(ask(num_inference_steps=1))
    assert prediction.before is not None
    assert not {"before", "mask"} & set(prediction.model_dump())
    assert not {"before", "mask"} & set(Prediction.model_json_schema()["properties"])
    assert "before=" not in repr(prediction)


def test_a_prediction_in_words_is_short(engine: Engine, ask: Ask) -> None:
    prediction = engine.predict(ask(num_inference_steps=1))
    assert len((prediction.output or [""])[0]) > 5000
    assert "output=['data:image/png;base64," in repr(prediction)
    assert len(repr(prediction)) < 2500


def test_an_engine_says_what_it_runs_on(engine: Engine) -> None:
    html = engine._repr_html_()
    assert engine.version in html
    assert "cpu" in html
