"""Apps with the page, on a batcher in the test's hand, and clients of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from hand_batcher import HandBatcher
from page_client import TOKEN, Make, encoded
from ritocco.server import Settings, create_app
from ritocco.ui import mount


@pytest.fixture
def batcher() -> HandBatcher:
    return HandBatcher()


@pytest.fixture
def make(tmp_path: Path, batcher: HandBatcher) -> Iterator[Make]:
    """Makes a client of an app with the page, whose event loop runs until the test ends."""
    with ExitStack() as stack:

        def call(
            *, by_itself: bool = True, base_url: str = "http://localhost", **settings: Any
        ) -> TestClient:
            batcher.by_itself = by_itself
            given = {"data": tmp_path / "data", "grace_s": 0.0} | settings
            app = create_app(batcher, Settings(**given))  # type: ignore[arg-type]
            mount(app)
            stack.callback(app.close)
            return stack.enter_context(TestClient(app, base_url=base_url))

        yield call


def _client(folder: Path, **settings: Any) -> Iterator[TestClient]:
    app = create_app(HandBatcher(), Settings(data=folder, **settings))  # type: ignore[arg-type]
    mount(app)
    with TestClient(app, base_url="http://localhost") as client:
        yield client
    app.close()


@pytest.fixture(scope="module")
def open_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """Of an app without tokens, for tests that run nothing."""
    yield from _client(tmp_path_factory.mktemp("open"), cors_origins=["https://evil.example"])


@pytest.fixture(scope="module")
def closed_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The same with TOKEN."""
    folder = tmp_path_factory.mktemp("closed")
    yield from _client(folder, tokens=[TOKEN], cors_origins=["https://evil.example"])


@pytest.fixture
def photo() -> bytes:
    """A JPEG of 200 x 120 pixels."""
    noise = np.random.default_rng(1).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    return encoded(noise, "JPEG")
