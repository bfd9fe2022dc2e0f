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
