"""Whether the answer is the contract's."""

from __future__ import annotations

import io
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ritocco.prediction import Prediction, new_id, timestamp

URL = "https://example.org/a.png"
ANSWER = [
    "id",
    "model",
    "version",
    "input",
    "logs",
    "output",
    "data_removed",
    "error",
    "status",
    "created_at",
    "urls",
]
OUR_ANSWER = ["started_at", "completed_at", "metrics"]


def test_prediction_has_every_field_of_the_answer() -> None:
    prediction = Prediction(input={"prompt": "x"}, images=[Image.new("RGB", (2, 2))])
    answer = json.loads(prediction.to_json())
    assert list(answer) == [*ANSWER[:-1], *OUR_ANSWER, "urls"]
    assert list(answer["urls"]) == ["cancel", "get", "stream", "web"]
    assert all(
        isinstance(answer[name], str) for name in ("id", "model", "version", "logs", "status", "created_at")
    )
    assert prediction.model_dump(mode="json") == answer
    assert len(prediction.images) == 1
    assert "images" not in Prediction.model_json_schema(mode="serialization")["properties"]


def test_prediction_statuses() -> None:
    prediction = Prediction()
    for status in ("starting", "processing", "succeeded", "failed", "canceled"):
        prediction.status = status
        assert json.loads(prediction.to_json())["status"] == status
    with pytest.raises(ValueError, match="canceled"):
        prediction.status = "aborted"  # type: ignore[assignment]


def test_ids_and_timestamps() -> None:
    ids = {new_id() for _ in range(500)}
    assert len(ids) == 500
    assert all(re.fullmatch(r"[0-9a-z]{26}", one) for one in ids)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", timestamp())


def test_echoed_input_is_json() -> None:
    sent: dict[str, Any] = {
        "image": Image.new("RGB", (640, 480)),
        "mask": np.zeros((480, 640, 3), dtype=np.uint8),
        "a": b"12345",
        "b": pathlib.PurePosixPath("in/bench.png"),
        "c": io.BytesIO(),
        "d": URL,
        "e": [np.float32(0.5), np.int64(3), float("nan"), True, None],
        "f": object(),
        "g\ud800": "\udcff",
        "ritocco": {"strength": 0.5},
    }
    prediction = Prediction()
    prediction.input = sent
    assert Prediction(input=sent).input == prediction.input
    assert json.loads(prediction.to_json())["input"] == {
        "image": "<PIL image 640x480>",
        "mask": "<array 480x640x3 uint8>",
        "a": "<5 bytes>",
        "b": "in/bench.png",
        "c": "<file in memory>",
        "d": URL,
        "e": [0.5, 3, "nan", True, None],
        "f": "<object>",
        "g?": "?",
        "ritocco": {"strength": 0.5},
    }
