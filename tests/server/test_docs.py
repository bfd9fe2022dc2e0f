"""The page about the server: its Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from hand_batcher import HandBatcher
from ritocco.server import Settings, create_app

TOKEN = "correct-horse-battery-staple"
PAGE = Path(__file__).parents[2] / "docs" / "server.md"


def test_an_app_with_ours_in_it(
    tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens.txt").write_text(f"{TOKEN}\n", encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    made: dict[str, Any] = {}
    exec(compile(snippet, str(PAGE), "exec"), made)  # noqa: S102 - what it is for
    app, headers = made["app"], {"Authorization": f"Bearer {TOKEN}"}
    assert isinstance(app, FastAPI)
    given = {"input": asked | {"width": 64, "height": 64}}
    with TestClient(app, headers=headers) as client:
        assert client.post("/inpaint/predictions", json=given).json()["status"] == "succeeded"
        assert client.get("/inpaint/readyz", headers={"Authorization": ""}).status_code == 200
    # It has let go of its folder.
    create_app(HandBatcher(), Settings(data=tmp_path / "ritocco-data")).close()  # type: ignore[arg-type]
    made["engine"].close()
