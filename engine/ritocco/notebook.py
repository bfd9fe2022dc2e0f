"""How predictions and engines show themselves in Jupyter."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from ritocco.images import data_uri
from ritocco.sheet import sheet

if TYPE_CHECKING:
    from ritocco.prediction import Prediction

SIDE = 512
"""Most pixels per side of what a notebook keeps; whole pictures are in `Prediction.images`."""
_TILE, _QUALITY = 224, 92
_TOLD = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "scheduler")
_FIGURE = "display:inline-block;margin:0 8px 8px 0;vertical-align:top"


def prediction_html(prediction: Prediction) -> str:
    """Before, mask and results side by side, and what was asked for."""
    figures = [
        f'<figure style="{_FIGURE}"><img alt="{escape(title)}" src="{_data_uri(picture)}" '
        f'style="max-width:{SIDE // 2}px"><figcaption>{escape(title)}</figcaption></figure>'
        for title, picture in _titled(prediction)
    ]
    told = {"status": prediction.status, "error": prediction.error}
    told |= {name: prediction.input.get(name) for name in _TOLD}
    match prediction.metrics.get("predict_time"):
        case int() | float() as seconds:
            told["predict_time"] = f"{seconds:.2f} s"
        case other:  # of an answer of someone else's
            told["predict_time"] = other
    return f"<div>{''.join(figures)}{_table(told)}</div>"


def prediction_png(prediction: Prediction) -> bytes | None:
    """The same pictures on one sheet, for what shows no HTML; None where there are none."""
    titled = _titled(prediction)
    if not titled:
        return None
    return _file(sheet(titled, columns=min(len(titled), 4), side=_TILE), "PNG")


def engine_html(told: Mapping[str, Any]) -> str:
    """What an engine says of itself."""
    return f"<div>ritocco.Engine{_table(told)}</div>"


def _titled(prediction: Prediction) -> Sequence[tuple[str, Image.Image]]:
    asked = [("before", prediction.before), ("mask", prediction.mask)]
    count = len(prediction.images)
    results = [("result" if count == 1 else f"result {i}", one) for i, one in enumerate(prediction.images)]
    return [(title, picture) for title, picture in asked if picture is not None] + results


def _table(told: Mapping[str, Any]) -> str:
    rows = [
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in told.items()
        if value not in (None, "")
    ]
    return f"<table>{''.join(rows)}</table>"


def _data_uri(picture: Image.Image) -> str:
    """A mask as PNG; a photograph as JPEG, a fifth of its size; the exact ones are in `Prediction.images`."""
    small = picture if max(picture.size) <= SIDE else ImageOps.contain(picture, (SIDE, SIDE))
    if small.mode != "RGB":
        return data_uri(_file(small, "PNG"), "png")
    return data_uri(_file(small, "JPEG", quality=_QUALITY), "jpg")


def _file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
