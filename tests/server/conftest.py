"""Apps on a batcher in the test's hand, and clients of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hand_batcher import HandBatcher, Make, picture
from real_postgres import RealPostgres, real_postgres
from ritocco.server import Settings, create_app
from ritocco.server.app import App
from ritocco.server.shared_store import SharedStore
from ritocco.server.store import Store

TOKENS = ("correct-horse-battery-staple", "another-token-of-enough-letters")


@pytest.fixture
def batcher() -> HandBatcher:
    return HandBatcher()


@pytest.fixture(scope="session")
def postgres() -> Iterator[RealPostgres]:
    """Shared: whoever stops it starts it again."""
    with real_postgres() as made:
        yield made


@pytest.fixture
def database(postgres: RealPostgres) -> str:
    """The URL of an empty one."""
    return postgres.new_database()


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings that say where predictions are; of `both_stores`, else a data folder."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return {"data": tmp_path / "data"}
    return {"database": request.getfixturevalue("database"), "gone_after_s": 2.0}


Open = Callable[..., Store]


@pytest.fixture
def open_store(place: dict[str, Any]) -> Iterator[Open]:
    """Opens the store of the place; one process after the other, each takes up what was left."""
    opened: list[Store] = []

    def call(**given: Any) -> Store:
        if "data" in place:
            opened.append(Store(place["data"], **given))
        else:
            shared = SharedStore(place["database"], gone_after_s=place["gone_after_s"], **given)
            shared.take_over(run=True)
            opened.append(shared)
        return opened[-1]

    yield call
    for one in opened:
        one.close()


@pytest.fixture
def make(place: dict[str, Any], batcher: HandBatcher) -> Iterator[Make]:
    """Makes a client of an app with these settings; closes both at the end."""
    opened: list[App] = []

    def call(*, by_itself: bool = True, headers: Any = None, **settings: Any) -> TestClient:
        batcher.by_itself = by_itself
        given = place | {"grace_s": 0.0} | settings
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
