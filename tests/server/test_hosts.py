"""The names under which a server without tokens answers."""

from __future__ import annotations

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from ritocco.server.hosts import KnownHosts

CLIENT = TestClient(KnownHosts(PlainTextResponse("ok"), names=["Gpu.example", "0.0.0.0"]))  # noqa: S104


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:5000",
        "127.0.0.1:80",
        "[::1]",
        "[::1]:5000",
        "10.1.2.3",
        "gpu.EXAMPLE:1",
        "0.0.0.0",  # noqa: S104
    ],
)
def test_known_names(host: str) -> None:
    assert CLIENT.get("/", headers={"Host": host}).text == "ok"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:5000", "localhost.evil.example", "", "127.0.0.1.evil.example", "a:b"],
)
def test_names_of_others(host: str) -> None:
    answer = CLIENT.get("/", headers={"Host": host})
    assert answer.status_code == 400
    assert "--allow-host" in answer.text
