"""Rows that a disk or another program damaged: each harms its prediction or file alone."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hand_batcher import HandBatcher, Make

NO_TEXT = "CAST(x'ff7b' AS TEXT)"


def damage(folder: Path, column: str, value: str, where: str, id: str) -> None:
    """column: `table.column`. value: in SQL. where: the column that holds the id."""
    table, _, name = column.partition(".")
    execute(folder, f"UPDATE {table} SET {name} = {value} WHERE {where} = '{id}'")  # noqa: S608


def execute(folder: Path, statement: str) -> None:
    """As another program does."""
    with closing(sqlite3.connect(folder / "ritocco.sqlite")) as file, file:
        assert file.execute(statement).rowcount != 0


def test_a_queued_input_that_is_no_text(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, tmp_path: Path
) -> None:
    client = make(by_itself=False)
    first, second = (client.post("/v1/predictions", json={"input": asked}).json()["id"] for _ in range(2))
    client.app.close()  # type: ignore[attr-defined]
    for table in ("inputs", "briefs"):
        damage(tmp_path / "data", f"{table}.json", f"{NO_TEXT} || json", "id", first)
    client = make()
    client.get(client.get(f"/v1/predictions/{second}").json()["urls"]["stream"])
    held = client.get("/v1/predictions").json()["results"]
    assert {one["id"]: one["status"] for one in held} == {first: "failed", second: "succeeded"}
    assert "can't be read any more" in client.get(f"/v1/predictions/{first}").json()["error"]


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("predictions.status", "'nonsense'", {"status": "failed", "output": None}),
        ("predictions.status", NO_TEXT, {"status": "failed", "output": None}),
        ("predictions.logs", NO_TEXT, {"status": "succeeded", "logs": "\ufffd{"}),
        ("predictions.logs", "x'ff7b'", {"status": "succeeded", "logs": "\ufffd{"}),
        ("predictions.metrics", "'{\"predict_time\": 1e999}'", {"metrics": {"predict_time": "inf"}}),
        ("predictions.metrics", NO_TEXT, {"metrics": {}}),
        ("predictions.webhook_events", NO_TEXT, {"status": "succeeded"}),
        ("predictions.created_at", NO_TEXT, {"created_at": "\ufffd{"}),
        ("inputs.json", NO_TEXT, {"status": "succeeded", "input": {}}),
        ("files.content_type", NO_TEXT, {"status": "succeeded"}),
        ("files.size", "'many'", {"status": "succeeded"}),
        ("files.created_at", NO_TEXT, {"status": "succeeded"}),
    ],
)
def test_a_damaged_prediction(
    make: Make,
    asked: dict[str, Any],
    tmp_path: Path,
    column: str,
    value: str,
    shown: dict[str, Any],
    restarted: bool,
) -> None:
    client = make()
    bad, good = (client.post("/predictions", json={"input": asked}).json() for _ in range(2))
    if restarted:
        client.app.close()  # type: ignore[attr-defined]
    where = "prediction" if column.startswith("files") else "id"
    damage(tmp_path / "data", column, value, where, bad["id"])
    if restarted:
        client = make()
    held = client.get(f"/v1/predictions/{bad['id']}").json()
    assert {name: held[name] for name in shown} == shown
    assert client.get(f"/v1/predictions/{good['id']}").json()["output"] == good["output"]
    listed = client.get("/v1/predictions").json()["results"]
    assert [(one["id"], one["status"]) for one in listed] == [
        (good["id"], "succeeded"),
        (bad["id"], held["status"]),
    ]
    assert "event: done" in client.get(listed[1]["urls"]["stream"]).text
    if held["output"]:
        assert client.get(listed[1]["output"][0]).status_code == 200
    assert client.post("/predictions", json={"input": asked}).json()["status"] == "succeeded"
    assert client.post(f"/predictions/{bad['id']}/cancel").status_code == 200


@pytest.mark.parametrize("column", ["metadata", "content_type", "created_at", "name"])
@pytest.mark.parametrize("value", [NO_TEXT, "'nonsense'", "'9999-12-31T23:59:59.999Z'", "x'ff7b'"])
def test_a_damaged_upload(make: Make, tmp_path: Path, column: str, value: str) -> None:
    client = make()
    bad, good = (client.post("/files", files={"content": b"x"}).json() for _ in range(2))
    damage(tmp_path / "data", f"files.{column}", value, "id", bad["id"])
    held = client.get("/v1/files").json()["results"]
    assert [one["id"] for one in held] == [good["id"], bad["id"]]
    assert client.get(f"/files/{good['id']}").json() == good
    assert client.get(f"/files/{bad['id']}").json()["etag"] == bad["etag"]
    assert client.delete(f"/files/{bad['id']}").status_code == 204


def test_a_status_that_is_none_ends_at_the_next_start(
    make: Make, asked: dict[str, Any], tmp_path: Path
) -> None:
    """Else it would never be cleaned away."""
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    client.app.close()  # type: ignore[attr-defined]
    damage(tmp_path / "data", "predictions.status", "'nonsense'", "id", made["id"])
    client = make()
    held = client.get(f"/v1/predictions/{made['id']}").json()
    assert (held["status"], held["error"]) == ("failed", "Prediction interrupted; please retry (code: PA)")
    assert client.app.state.shared.store.clean(-1) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("table", ["briefs", "inputs", "predictions", "files", "settings"])
def test_without_a_table_it_is_not_ready(
    make: Make, tmp_path: Path, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = make()
    assert client.get("/readyz").status_code == 200
    execute(tmp_path / "data", f"ALTER TABLE {table} RENAME TO elsewhere")
    got = client.get("/readyz")
    assert (got.status_code, got.json()) == (503, {"status": "storage"})
    assert client.get("/health-check").json()["status"] == "DEFUNCT"
    assert table in str([vars(one).get("error") for one in caplog.records])
    execute(tmp_path / "data", f"ALTER TABLE elsewhere RENAME TO {table}")
    assert client.get("/readyz").status_code == 200
