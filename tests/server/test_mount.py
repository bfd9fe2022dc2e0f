"""The app under a prefix of somebody else's, and with an engine instead of a batcher."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.testclient import TestClient

import ritocco
from hand_batcher import HandBatcher, picture
from ritocco import Engine
from ritocco.images import data_uri, encode
from ritocco.server import Settings, create_app
from ritocco.sources import Loader

TOKEN = "correct-horse-battery-staple"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize("kind", [FastAPI, Starlette])
@pytest.mark.parametrize("root", ["", "/behind/a/proxy"])
def test_under_a_prefix(kind: Any, root: str, tmp_path: Path, asked: dict[str, Any]) -> None:
    settings = Settings(tokens=[TOKEN], outputs="url", data=tmp_path)
    inpainting = create_app(HandBatcher(), settings)  # type: ignore[arg-type]

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        inpainting.close()

    app = kind(lifespan=lifespan)
    app.mount("/tools/inpaint", inpainting)
    base = f"http://testserver{root}/tools/inpaint"
    with TestClient(app, base_url=f"http://testserver{root}", root_path=root) as client:
        assert client.get("/tools/inpaint/livez").status_code == 200
        assert client.get("/tools/inpaint/v1/predictions").status_code == 401
        assert client.get("/v1/predictions", headers=HEADERS).status_code == 404
        body = {"input": asked}
        held = client.post(
            "/tools/inpaint/v1/predictions", json=body, headers=HEADERS | {"Prefer": "wait"}
        ).json()
        assert held["status"] == "succeeded"
        assert held["urls"]["get"] == f"{base}/v1/predictions/{held['id']}"
        assert held["output"][0].startswith(f"{base}/v1/outputs/")
        local = [
            url.removeprefix(f"http://testserver{root}")
            for url in (held["output"][0], held["urls"]["stream"])
        ]
        assert client.get(local[0]).content.startswith(b"\x89PNG")
        assert "event: done" in client.get(local[1]).text
        upload = client.post("/tools/inpaint/v1/files", files={"content": b"x"}, headers=HEADERS).json()
        assert upload["urls"]["get"] == f"{base}/v1/files/{upload['id']}"
    # The lifespan has let go of the folder.
    create_app(HandBatcher(), settings).close()  # type: ignore[arg-type]


def test_canceled_fetches_take_nobodys_place(
    tiny_engine: Engine, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching, answered = threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> bytes:
        fetching.set()
        answered.wait(60)
        return b""

    monkeypatch.setattr("ritocco.fetch.Fetcher.get", slow)
    small = asked | {"width": 64, "height": 64}
    app = create_app(tiny_engine, Settings(data=tmp_path, waiting=1))
    with TestClient(app) as client:
        given = {"input": small | {"mask": "http://192.0.2.1/mask.png"}}
        made = client.post("/v1/predictions", json=given).json()
        assert fetching.wait(60)
        client.post(f"/v1/predictions/{made['id']}/cancel")
        held = client.post("/v1/predictions", json={"input": small}, headers={"Prefer": "wait"}).json()
        answered.set()
    assert held["status"] == "succeeded"


def test_the_answer_is_the_librarys(tiny_engine: Engine, ask: Any, tmp_path: Path) -> None:
    given = ask(num_outputs=2, seed=11)
    plain = tiny_engine.predict(given)
    wire = given | {
        name: data_uri(encode(np.asarray(given[name].convert("RGB")), "png")) for name in ("image", "mask")
    }
    app = create_app(tiny_engine, Settings(data=tmp_path))
    with TestClient(app) as client:
        held = client.post("/predictions", json={"input": wire}).json()
    assert (held["status"], held["error"]) == ("succeeded", None)
    for uri, expected in zip(held["output"], plain.images, strict=True):
        with Loader().flat(uri, field="output", ground=(0, 0, 0)) as picture:
            made = np.asarray(picture)
        np.testing.assert_allclose(made.astype(int), np.asarray(expected).astype(int), atol=1)
    assert held["logs"].startswith("Using seed: 11\n")
    assert "| 3/3 [" in held["logs"]
    assert held["metrics"]["predict_time"] > 0
    assert held["version"] == (tiny_engine.version or ritocco.prediction.VERSION)


def test_a_picture_behind_a_closed_address_fails_it(tiny_engine: Engine, tmp_path: Path) -> None:
    given = {"image": "http://10.1.2.3/image.png", "mask": picture(0), "width": 64, "height": 64}
    app = create_app(tiny_engine, Settings(data=tmp_path))
    with TestClient(app) as client:
        held = client.post("/predictions", json={"input": given}).json()
    assert held["status"] == "failed"
    assert held["error"].startswith("input.image: http://10.1.2.3/image.png: is not fetched")
