"""What happens to predictions when the server stops, starts again, or its disk is full."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hand_batcher import HandBatcher, Make
from real_postgres import both_stores
from ritocco.errors import BackendError, DeviceLostError, RequestError
from ritocco.server import Settings, create_app
from ritocco.server.database import StorageError
from ritocco.server.store import INTERRUPTED, Store

Open = Callable[..., Store]


def ended(client: TestClient, id: str) -> dict[str, Any]:
    """The prediction once it has ended."""
    client.get(client.get(f"/v1/predictions/{id}").json()["urls"]["stream"])
    return dict(client.get(f"/v1/predictions/{id}").json())


@both_stores
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


@both_stores
def test_a_full_queue_that_stops_says_so(make: Make, asked: dict[str, Any]) -> None:
    client = make(by_itself=False, waiting=1)
    client.post("/v1/predictions", json={"input": asked})
    assert client.post("/v1/predictions", json={"input": asked}).status_code == 429
    client.app.state.shared.jobs.begin_stop()  # type: ignore[attr-defined]
    assert client.post("/v1/predictions", json={"input": asked}).status_code == 503


def test_who_waits_in_cogs_way_is_told_of_a_stop(
    make: Make, asked: dict[str, Any], batcher: HandBatcher
) -> None:
    client = make(by_itself=False)
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(client.post("/predictions", json={"input": asked}))
    )
    asking.start()
    batcher.next()
    client.app.state.shared.jobs.begin_stop()  # type: ignore[attr-defined]
    asking.join()
    assert (answers[0].status_code, answers[0].json()["status"]) == (202, "starting")


def test_an_app_that_cannot_be_lets_go_of_its_folder(make: Make, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "data")
    with pytest.raises(RequestError, match="engines"):
        create_app([], settings)
    client = make()
    client.app.close()  # type: ignore[attr-defined]
    with closing(sqlite3.connect(tmp_path / "data" / "ritocco.sqlite")) as file, file:
        file.execute("DROP TABLE settings")
    for _ in range(2):
        with pytest.raises(BackendError, match="no such table: settings"):
            make()


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_what_was_asked_for_and_is_damaged_fails(
    make: Make, asked: dict[str, Any], tmp_path: Path, text: str
) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    client.app.close()  # type: ignore[attr-defined]
    with closing(sqlite3.connect(tmp_path / "data" / "ritocco.sqlite")) as file, file:
        for table in ("inputs", "briefs"):
            file.execute(f"UPDATE {table} SET json = ?", (text,))  # noqa: S608 - names of ours
    client = make()
    assert ended(client, made["id"])["status"] == "failed"
    held = client.get(f"/v1/predictions/{made['id']}").json()
    assert (held["error"], held["input"]) == ("What was asked for can't be read any more; please retry", {})
    assert client.post("/predictions", json={"input": asked}).json()["status"] == "succeeded"


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


@both_stores
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


@both_stores
def test_what_ran_when_the_process_was_lost_failed(
    make: Make, asked: dict[str, Any], open_store: Open
) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    client.app.close()  # type: ignore[attr-defined]
    store = open_store()
    store.start(made["id"])
    store.close()
    held = ended(make(), made["id"])
    assert (held["status"], held["error"]) == ("failed", INTERRUPTED)


@both_stores
def test_the_disk_knows_before_the_device_works(
    make: Make, asked: dict[str, Any], batcher: HandBatcher
) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    run = batcher.next()
    store: Store = client.app.state.shared.store  # type: ignore[attr-defined]
    assert store.queued() == [made["id"]]
    run.begin()
    held = store.get(made["id"])
    assert held is not None
    assert (held.status, held.started_at is None) == ("processing", False)
    run.succeed()


@both_stores
def test_what_cannot_be_noted_is_not_begun(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make(by_itself=False)
    client.post("/v1/predictions", json={"input": asked})

    def full(*_: object) -> None:
        raise StorageError("disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "start", full)
        with pytest.raises(StorageError):
            batcher.next().begin()


@both_stores
def test_a_preparation_is_an_attempt_until_it_is_over(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, prepared = batcher.submit, Store.prepared
    attempts: list[int] = []
    over = threading.Event()

    def look(*arguments: Any, id: str, **named: Any) -> Any:
        attempts.append(store.get(id).attempts)  # type: ignore[union-attr]
        return submit(*arguments, id=id, **named)

    def told(self: Store, id: str) -> None:
        prepared(self, id)
        over.set()

    monkeypatch.setattr(batcher, "submit", look)
    monkeypatch.setattr(Store, "prepared", told)
    client = make(by_itself=False)
    store: Store = client.app.state.shared.store  # type: ignore[attr-defined]
    made = client.post("/v1/predictions", json={"input": asked}).json()
    batcher.next()
    assert over.wait(30)
    attempts.append(store.get(made["id"]).attempts)  # type: ignore[union-attr]
    assert attempts == [1, 0]


@both_stores
def test_suspects_are_prepared_one_after_the_other(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch, open_store: Open
) -> None:
    client = make(by_itself=False)
    ids = [client.post("/v1/predictions", json={"input": asked}).json()["id"] for _ in range(6)]
    client.app.close()  # type: ignore[attr-defined]
    store = open_store()
    for id in ids[:3]:
        store.prepare(id)  # as a process that was killed
    store.close()
    submit, others, inside, most = batcher.submit, threading.Barrier(4), list[str](), list[int]()

    def slow(*arguments: Any, id: str, **named: Any) -> Any:
        if id in ids[:3]:
            inside.append(id)
            most.append(len(inside))
            if id == ids[0]:
                others.wait(30)
            inside.remove(id)
        else:
            others.wait(30)
        return submit(*arguments, id=id, **named)

    monkeypatch.setattr(batcher, "submit", slow)
    again = make()
    for id in ids:
        again.get(again.get(f"/v1/predictions/{id}").json()["urls"]["stream"])
        assert again.get(f"/v1/predictions/{id}").json()["status"] == "succeeded"
    assert most == [1, 1, 1]


@both_stores
def test_pictures_from_elsewhere_hold_up_nobody_else(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, answered = batcher.submit, threading.Event()

    def fetches(given: Any, **named: Any) -> Any:
        if given["mask"].startswith("http"):
            answered.wait(60)
        return submit(given, **named)

    monkeypatch.setattr(batcher, "submit", fetches)
    client = make(by_itself=False)
    slow = asked | {"mask": "http://192.0.2.1/mask.png"}
    for _ in range(40):
        made = client.post("/v1/predictions", json={"input": slow}).json()
        client.post(f"/v1/predictions/{made['id']}/cancel")
    innocent = client.post("/v1/predictions", json={"input": asked}).json()
    assert batcher.next().id == innocent["id"]
    answered.set()


@both_stores
def test_what_waits_holds_no_input(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked | {"num_outputs": 2}}).json()
    run = batcher.next()
    run.begin()
    live = client.app.state.shared.jobs.live(made["id"])  # type: ignore[attr-defined]
    assert (live.record.input, live.pictures) == ({}, 2)
    assert client.get(f"/v1/predictions/{made['id']}").json()["input"]["image"] == asked["image"]
    run.succeed()


@both_stores
def test_between_storing_and_running(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, answers = Store.accept, dict[str, Any]()
    client = make(by_itself=False)

    def put(name: str) -> None:
        answers[name] = client.put("/predictions/mine", json={"input": asked}).json()

    second = threading.Thread(target=put, args=("second",))

    def stored(self: Store, new: Any) -> Any:
        found = accept(self, new)
        if not second.ident:
            second.start()
            second.join(0.5)  # it has to wait for what follows this
        return found

    monkeypatch.setattr(Store, "accept", stored)
    first = threading.Thread(target=put, args=("first",))
    first.start()
    run = batcher.next()
    run.succeed()
    for one in (first, second):
        one.join(30)
    assert {name: one["status"] for name, one in answers.items()} == {
        "first": "succeeded",
        "second": "succeeded",
    }


@both_stores
def test_a_cancel_between_storing_and_running(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, canceling = Store.accept, list[threading.Thread]()
    client = make(by_itself=False)

    def stored(self: Store, new: Any) -> Any:
        found = accept(self, new)
        canceling.append(threading.Thread(target=client.post, args=(f"/v1/predictions/{new.id}/cancel",)))
        canceling[0].start()
        canceling[0].join(0.5)
        return found

    monkeypatch.setattr(Store, "accept", stored)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    canceling[0].join(30)
    assert client.get(f"/v1/predictions/{made['id']}").json()["status"] == "canceled"


@both_stores
def test_a_broken_engine_is_tried_with_one(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make(by_itself=False)
    batcher.healthy = False
    assert client.post("/v1/predictions", json={"input": asked}).status_code == 201
    run = batcher.next()
    refused = client.post("/v1/predictions", json={"input": asked})
    assert (refused.status_code, refused.json()["title"]) == (503, "Engine broken")
    assert refused.headers["Retry-After"] == "30"
    batcher.healthy = True
    assert client.post("/v1/predictions", json={"input": asked}).status_code == 201
    run.succeed()


def test_no_path_of_the_data_folder_is_shown(make: Make, asked: dict[str, Any], tmp_path: Path) -> None:
    client = make()
    upload = client.post("/v1/files", files={"content": b"x"}).json()
    (tmp_path / "data" / "files" / upload["id"]).unlink()
    held = client.post("/predictions", json={"input": asked | {"image": upload["urls"]["get"]}}).json()
    assert held["status"] == "failed"
    assert held["error"] == "The server can't store or read this at the moment; its log has more"


@both_stores
def test_a_canceled_one_stays_canceled(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    batcher.next()
    client.post(f"/v1/predictions/{made['id']}/cancel")
    client.app.close()  # type: ignore[attr-defined]
    assert ended(make(), made["id"])["status"] == "canceled"
    assert len(batcher.seen) == 1


def test_a_result_that_does_not_fit_the_disk(
    make: Make, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = make()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ritocco.server.contents.write_whole", full)
    held = client.post("/predictions", json={"input": asked}).json()
    assert held["status"] == "failed"
    assert held["error"] == "The result could not be stored; the server's log has more"
    got = client.post("/v1/files", files={"content": b"x"})
    assert (got.status_code, got.json()["title"]) == (507, "Insufficient storage")
    assert "device" not in got.text
    assert list((tmp_path / "data" / "files").iterdir()) == []


@both_stores
def test_nothing_is_accepted_that_is_not_stored(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make()
    monkeypatch.setattr(Store, "accept", lambda *_: (_ for _ in ()).throw(StorageError("disk is full")))
    got = client.post("/v1/predictions", json={"input": asked})
    assert got.status_code == 507
    assert batcher.seen == []


@both_stores
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


@pytest.mark.parametrize(
    "changes",
    [{"output": ["no picture"]}, {"metrics": {"figure": object()}}],
)
@both_stores
def test_an_end_that_can_never_be_written_is_a_failure(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, changes: dict[str, Any]
) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    run = batcher.next()
    run.step(1, 2)
    run.prediction = run.prediction.model_copy(update={"output": [], **changes})
    run._end("succeeded")
    held = ended(client, made["id"])
    assert held["status"] == "failed"
    assert held["error"] == "The result could not be stored; the server's log has more"
    assert client.app.state.shared.jobs.lives() == []  # type: ignore[attr-defined]


def test_what_ends_the_batchers_thread_ends_the_prediction(
    make: Make, asked: dict[str, Any], batcher: HandBatcher
) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    batcher.next().fail(SystemExit("away with it"))
    held = ended(client, made["id"])
    assert (held["status"], held["error"]) == ("failed", "Internal error; the server's log has more")


def test_a_result_that_cannot_be_looked_at_is_a_failure(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise ValueError("a mistake")

    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    run = batcher.next()
    monkeypatch.setattr("ritocco.server.jobs.failure", breaks)
    run.fail(RuntimeError("no luck"))
    assert ended(client, made["id"])["status"] == "failed"


def test_what_is_gone_keeps_nobody_waiting(
    make: Make, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make()
    monkeypatch.setattr(Store, "get", lambda *_, **__: None)
    client.post("/predictions", json={"input": asked})
    assert client.app.state.shared.jobs.lives() == []  # type: ignore[attr-defined]


def test_an_end_is_told_once_it_can_be_read(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritocco.server.jobs._RETRY_STORING_S", 0.01)
    client, told = make(by_itself=False), threading.Event()
    client.post("/v1/predictions", json={"input": asked})
    run = batcher.next()
    run.step(1, 2)
    get, refused = Store.get, threading.Event()

    def unwilling(self: Store, *arguments: Any, **more: Any) -> Any:
        if not refused.is_set():
            refused.set()
            raise StorageError("disk is gone")
        return get(self, *arguments, **more)

    monkeypatch.setattr(Store, "get", unwilling)
    monkeypatch.setattr("ritocco.server.metrics.Metrics.ended", lambda *_: told.set())
    run.succeed()
    assert told.wait(30)
    assert refused.is_set()


@both_stores
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


@both_stores
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
    held = [ended(again, id) for id in ids]
    assert [one["status"] for one in held] == ["failed", "succeeded", "succeeded"]
    assert held[0]["error"] == INTERRUPTED
    assert [run.id for run in batcher.seen].count(ids[1]) == 2


@both_stores
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


@both_stores
def test_a_stop_that_is_hurried_puts_back_what_runs(
    make: Make, asked: dict[str, Any], batcher: HandBatcher
) -> None:
    client = make(by_itself=False, grace_s=3600.0)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    run = batcher.next()
    run.step(1, 2)
    closing = threading.Thread(target=client.app.close)  # type: ignore[attr-defined]
    closing.start()
    client.app.hurry()  # type: ignore[attr-defined]
    closing.join(60)
    assert not closing.is_alive()
    assert run.canceled
    again = make()
    again.get(again.get(f"/v1/predictions/{made['id']}").json()["urls"]["stream"])
    assert again.get(f"/v1/predictions/{made['id']}").json()["status"] == "succeeded"
