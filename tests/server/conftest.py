"""Apps on a batcher in the test's hand, and clients of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hand_batcher import HandBatcher, Make, picture
from ritocco.server import Settings, create_app
from ritocco.server.app import App

TOKENS = ("correct-horse-battery-staple", "another-token-of-enough-letters")


@pytest.fixture
def batcher() -> HandBatcher:
    return HandBatcher()


@pytest.fixture
def make(tmp_path: Path, batcher: HandBatcher) -> Iterator[Make]:
    """Makes a client of an app with these settings; closes both at the end."""
    opened: list[App] = []

    def call(*, by_itself: bool = True, headers: Any = None, **settings: Any) -> TestClient:
        batcher.by_itself = by_itself
        given = {"data": tmp_path / "data", "grace_s": 0.0} | settings
        app = create_app(batcher, Settings(**given))  # type: ignore[arg-type]
        opened.append(app)
        return TestClient(app, headers=headers)

    yield call
    for app in opened:
        app.close()


@pytest.fixture
def asked() -> dict[str, Any]:
    """A valid input of small pictures."""
    return {"image": picture(0), "mask": picture(255), "prompt": "a cat", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def open_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Of an app without tokens, whose predictions end by themselves; for tests that leave nothing behind."""
    settings = Settings(data=tmp_path_factory.mktemp("open"), waiting=1000)
    app = create_app(HandBatcher(), settings)  # type: ignore[arg-type]
    yield TestClient(app)
    app.close()


@pytest.fixture(scope="module")
def closed_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The same with TOKENS, none of which it sends."""
    settings = Settings(data=tmp_path_factory.mktemp("closed"), tokens=TOKENS)
    app = create_app(HandBatcher(), settings)  # type: ignore[arg-type]
    yield TestClient(app)
    app.close()
