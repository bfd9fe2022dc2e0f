"""What happens to predictions when the server stops, starts again, or its disk is full."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from hand_batcher import HandBatcher, Make
from ritocco.errors import BackendError, DeviceLostError
from ritocco.server import Settings, create_app
from ritocco.server.database import StorageError
from ritocco.server.store import INTERRUPTED, Store


def test_a_stop_leaves_what_waits_for_the_next_start(
    make: Make, asked: dict[str, Any], batcher: HandBatcher
) -> None:
    client = make(by_itself=False)
    ids = [client.post("/v1/predictions", json={"input": asked}).json()["id"] for _ in range(3)]
    assert {batcher.next().id for _ in ids} == set(ids)
    client.app.close()  # type: ignore[attr-defined]
    again = make()
    for id in ids:
        stream = again.get(again.get(f"/v1/predictions/{id}").json()["urls"]["stream"])
        assert "event: done\ndata: {}" in stream.text
        assert again.get(f"/v1/predictions/{id}").json()["status"] == "succeeded"
    assert len(batcher.seen) == 6


def test_a_stop_waits_for_what_runs(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make(by_itself=False, grace_s=60.0)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    run = batcher.next()
    run.step(1, 2)
    closing = threading.Thread(target=client.app.close)  # type: ignore[attr-defined]
    closing.start()
    assert not run.canceled
    run.step(2, 2)
    run.succeed()
    closing.join(30)
    assert not closing.is_alive()
    assert make().get(f"/v1/predictions/{made['id']}").json()["status"] == "succeeded"


def test_what_is_not_ready_in_time_runs_again(
    make: Make, asked: dict[str, Any], batcher: HandBatcher
) -> None:
    client = make(by_itself=False, grace_s=0.0)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    run = batcher.next()
    run.step(1, 2)
    client.app.close()  # type: ignore[attr-defined]
    assert run.canceled
    again = make()
    assert (
        "event: done\ndata: {}"
        in again.get(again.get(f"/v1/predictions/{made['id']}").json()["urls"]["stream"]).text
    )
    held = again.get(f"/v1/predictions/{made['id']}").json()
    assert (held["status"], held["error"]) == ("succeeded", None)
    assert len(batcher.seen) == 2


def test_what_ran_when_the_process_was_lost_failed(make: Make, asked: dict[str, Any], tmp_path: Path) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    client.app.close()  # type: ignore[attr-defined]
    store = Store(tmp_path / "data")
    store.start(made["id"])
    store.close()
    held = make().get(f"/v1/predictions/{made['id']}").json()
    assert (held["status"], held["error"]) == ("failed", INTERRUPTED)


def test_a_canceled_one_stays_canceled(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    batcher.next()
    client.post(f"/v1/predictions/{made['id']}/cancel")
    client.app.close()  # type: ignore[attr-defined]
    assert make().get(f"/v1/predictions/{made['id']}").json()["status"] == "canceled"
    assert len(batcher.seen) == 1


def test_a_result_that_does_not_fit_the_disk(
    make: Make, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = make()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ritocco.server.files.write_whole", full)
    held = client.post("/predictions", json={"input": asked}).json()
    assert held["status"] == "failed"
    assert held["error"].startswith("The result could not be stored:")
    got = client.post("/v1/files", files={"content": b"x"})
    assert (got.status_code, got.json()["title"]) == (507, "Insufficient storage")
    assert "device" not in got.text
    assert list((tmp_path / "data" / "files").iterdir()) == []


def test_nothing_is_accepted_that_is_not_stored(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make()
    monkeypatch.setattr(Store, "accept", lambda *_: (_ for _ in ()).throw(StorageError("disk is full")))
    got = client.post("/v1/predictions", json={"input": asked})
    assert got.status_code == 507
    assert batcher.seen == []


def test_an_end_that_cannot_be_written_is_written_later(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritocco.server.jobs._RETRY_STORING_S", 0.01)
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    run = batcher.next()
    finish, refused = Store.finish, threading.Event()

    def unwilling(self: Store, *arguments: Any) -> bool:
        if not refused.is_set():
            refused.set()
            raise StorageError("disk is full")
        return finish(self, *arguments)

    monkeypatch.setattr(Store, "finish", unwilling)
    run.fail("no luck")
    assert "event: error\ndata: no luck" in client.get(made["urls"]["stream"]).text
    assert refused.is_set()


def test_old_data_goes(make: Make, asked: dict[str, Any]) -> None:
    client = make(outputs="url")
    held = client.post("/predictions", json={"input": asked}).json()
    client.app.state.shared.store.clean(-1.0)  # type: ignore[attr-defined]
    left = client.get(f"/v1/predictions/{held['id']}").json()
    assert (left["status"], left["data_removed"]) == ("succeeded", True)
    assert (left["input"], left["output"], left["logs"]) == ({}, None, "")
    assert client.get(held["output"][0]).status_code == 404


def test_without_a_folder_nothing_is_left(batcher: HandBatcher) -> None:
    app = create_app(batcher, Settings())  # type: ignore[arg-type]
    folder = app.state.shared.store.files.path(
        app.state.shared.store.files.write(b"", name="", content_type="")
    )
    assert folder.exists()
    app.close()
    app.close()
    assert not folder.parent.parent.exists()


def test_two_apps_do_not_share_a_folder(make: Make) -> None:
    make()
    with pytest.raises(BackendError, match="another process is using"):
        make()


def test_a_lost_device_fails_what_ran_and_keeps_what_waits(
    make: Make, asked: dict[str, Any], batcher: HandBatcher
) -> None:
    client = make(by_itself=False)
    ids = [client.post("/v1/predictions", json={"input": asked}).json()["id"] for _ in range(3)]
    runs = {run.id: run for run in (batcher.next() for _ in ids)}
    runs[ids[0]].step(1, 2)
    assert (client.get("/livez").status_code, client.get("/readyz").status_code) == (200, 200)
    batcher.lost, batcher.healthy = True, False
    for run in runs.values():
        run.fail(DeviceLostError("cuda:0 has stopped computing: unspecified launch failure"))
    client.get(client.get(f"/v1/predictions/{ids[0]}").json()["urls"]["stream"])
    assert client.app.lost  # type: ignore[attr-defined]
    assert client.get("/livez").status_code == 503
    assert client.get("/readyz").json() == {"status": "engine"}
    refused = client.post("/v1/predictions", json={"input": asked})
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    client.app.close()  # type: ignore[attr-defined]
    batcher.lost, batcher.healthy = False, True
    again = make()
    for id in ids:
        again.get(again.get(f"/v1/predictions/{id}").json()["urls"]["stream"])
    held = [again.get(f"/v1/predictions/{id}").json() for id in ids]
    assert [one["status"] for one in held] == ["failed", "succeeded", "succeeded"]
    assert held[0]["error"] == INTERRUPTED
    assert [run.id for run in batcher.seen].count(ids[1]) == 2


def test_what_comes_after_the_loss_waits_too(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make(by_itself=False)
    batcher.lost = True

    def refuse(*_: Any, **__: Any) -> Any:
        raise DeviceLostError("this batcher has no engine left")

    with monkeypatch.context() as patched:
        patched.setattr(batcher, "submit", refuse)
        made = client.post("/v1/predictions", json={"input": asked}, headers={"Prefer": "wait"}).json()
    assert made["status"] == "starting"
    assert client.app.lost  # type: ignore[attr-defined]
    client.app.close()  # type: ignore[attr-defined]
    batcher.lost = False
    again = make()
    again.get(again.get(f"/v1/predictions/{made['id']}").json()["urls"]["stream"])
    assert again.get(f"/v1/predictions/{made['id']}").json()["status"] == "succeeded"
