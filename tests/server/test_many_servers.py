"""Several servers on one database: one runs a prediction, all answer for it; when one ends, others go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from hand_batcher import HandBatcher
from real_postgres import PASSWORD, RealPostgres
from ritocco.errors import BackendError, RequestError
from ritocco.fetch import Fetcher
from ritocco.prediction import new_id
from ritocco.server import Settings, create_app
from ritocco.server.app import App
from ritocco.server.database import AwayError
from ritocco.server.postgres import Postgres
from ritocco.server.pulse import Pulse
from ritocco.server.shared_store import SharedStore
from ritocco.server.store import INTERRUPTED, Outcome, Record
from webhook_receiver import Receiver, receiving

pytestmark = pytest.mark.slow

GONE_S = 1.0
LOOPBACK = Fetcher(allow_networks=["127.0.0.0/8"], timeout_s=10)


@dataclass
class Server:
    """One of several, with its batcher in the test's hand."""

    app: App
    client: TestClient
    batcher: HandBatcher

    @property
    def store(self) -> SharedStore:
        return self.app.state.shared.store  # type: ignore[no-any-return]

    def create(self, asked: dict[str, Any], **body: Any) -> str:
        answer = self.client.post("/v1/predictions", json={"input": asked, **body})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def get(self, id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/predictions/{id}").json())

    def ended(self, id: str) -> dict[str, Any]:
        """Once it has."""
        self.client.get(self.get(id)["urls"]["stream"])
        return self.get(id)

    def stand_still(self) -> Callable[[], None]:
        """As at SIGSTOP, but for what the test does itself; the result lets it go on."""
        self.app._parts._tending.close()  # type: ignore[union-attr]
        self.store._pulse.close()

        def go_on() -> None:
            self.store._pulse._beat()
            self.app._parts._tending.turn()  # type: ignore[union-attr]

        return go_on


Serve = Callable[..., Server]


@pytest.fixture
def serve(database: str) -> Iterator[Serve]:
    """Makes servers on one database, and closes them."""
    made: list[App] = []

    def call(*, by_itself: bool = False, **settings: Any) -> Server:
        batcher = HandBatcher(by_itself=by_itself)
        given = {"database": database, "gone_after_s": GONE_S, "grace_s": 0.0, "fetcher": LOOPBACK} | settings
        app = create_app(batcher, Settings(**given))  # type: ignore[arg-type]
        made.append(app)
        return Server(app, TestClient(app), batcher)

    yield call
    for app in made:
        app.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def soon(holds: Callable[[], bool]) -> None:
    """Until it does."""
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_any_server_answers_and_serves_files(serve: Serve, asked: dict[str, Any]) -> None:
    one, two = serve(outputs="url"), serve(outputs="url")
    upload = one.client.post("/v1/files", files={"content": b"x"}).json()
    assert two.client.get(f"/v1/files/{upload['id']}").json()["checksums"] == upload["checksums"]
    id = one.create(asked)
    run = one.batcher.next()
    assert two.get(id)["status"] == "starting"
    run.step(1, 2)
    soon(lambda: two.get(id)["logs"] == run.prediction.logs)
    assert (two.get(id)["status"], two.get(id)["input"]) == ("processing", one.get(id)["input"])
    run.step(2, 2)
    run.succeed(2)
    held = two.ended(id)
    assert held == one.get(id)
    for name, uri in enumerate(held["output"]):
        picture = two.client.get(uri)
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
        assert picture.content == one.client.get(uri).content
        assert uri.endswith(f"out-{name}.png")
        assert two.client.head(uri).headers["content-length"] == str(len(picture.content))
    assert two.batcher.seen == []
    assert [each["id"] for each in two.client.get("/v1/predictions").json()["results"]] == [id]
    secrets = {each.client.get("/v1/webhooks/default/secret").json()["key"] for each in (one, two)}
    assert len(secrets) == 1


def test_a_file_of_one_is_an_input_of_another(serve: Serve, asked: dict[str, Any]) -> None:
    one, two = serve(), serve()
    upload = one.client.post("/v1/files", files={"content": b"x"}).json()
    two.create(asked | {"mask": upload["urls"]["get"]})
    assert two.batcher.next().input["mask"] == "data:image/png;base64,eA=="


def test_creations_under_one_key_at_one_moment_are_one(serve: Serve, asked: dict[str, Any]) -> None:
    servers = [serve(by_itself=True) for _ in range(3)]
    for server in servers:  # the framework makes its schemas at the first request, in no thread-safe way
        server.ended(server.create(asked))
    barrier = threading.Barrier(12)
    ids: dict[int, list[str]] = {number: [] for number in range(10)}

    def work(server: Server) -> None:
        for number, found in ids.items():
            barrier.wait(60)
            if number % 2:
                answer = server.client.put(f"/predictions/mine-{number}", json={"input": asked})
            else:
                headers = {"Idempotency-Key": f"key-{number}"}
                answer = server.client.post("/v1/predictions", json={"input": asked}, headers=headers)
            assert answer.status_code in (200, 201), answer.text
            found.append(answer.json()["id"])

    threads = [threading.Thread(target=work, args=(each,)) for each in servers * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [len(found) for found in ids.values()] == [12] * 10
    assert [len(set(found)) for found in ids.values()] == [1] * 10
    assert sum(len(each.batcher.seen) for each in servers) == 13
    other = servers[0].client.put("/predictions/mine-1", json={"input": asked | {"prompt": "a dog"}})
    assert other.status_code == 409
    first, *_ = servers[1].client.get("/v1/predictions").json()["results"]
    assert servers[2].store.get(first["id"]).seq == 13  # type: ignore[union-attr]


def test_the_cap_is_each_servers_own(serve: Serve, asked: dict[str, Any]) -> None:
    one, two = serve(waiting=2), serve(waiting=2)
    for _ in range(2):
        one.create(asked)
    assert one.client.post("/v1/predictions", json={"input": asked}).status_code == 429
    two.create(asked)


def test_waiting_for_what_another_server_runs(serve: Serve, asked: dict[str, Any]) -> None:
    one, two = serve(), serve()
    id = one.create(asked)
    run, answers = one.batcher.next(), list[Any]()

    def wait() -> None:
        answers.append(two.client.put("/predictions/mine", json={"input": asked}).json())

    run.step(1, 2)
    mine = threading.Thread(target=wait)
    one.client.put("/predictions/mine", json={"input": asked}, headers={"Prefer": "respond-async"})
    mine.start()
    second = one.batcher.next()
    second.step(1, 2)
    second.succeed()
    mine.join(30)
    assert (answers[0]["id"], answers[0]["status"]) == ("mine", "succeeded")
    assert two.get(id)["status"] == "processing"
    run.succeed()


def test_a_stream_of_what_another_server_runs(serve: Serve, asked: dict[str, Any]) -> None:
    one, two = serve(), serve()
    id = one.create(asked)
    run, texts = one.batcher.next(), list[str]()
    reading = threading.Thread(
        target=lambda: texts.append(two.client.get(two.get(id)["urls"]["stream"]).text)
    )
    reading.start()
    run.step(1, 2)
    soon(lambda: two.get(id)["logs"] == run.prediction.logs)
    run.step(2, 2)
    run.succeed()
    reading.join(30)
    here = one.client.get(one.get(id)["urls"]["stream"]).text
    lines = [line for line in texts[0].splitlines() if line.startswith(("data:", "event:"))]
    told = [line for line in here.splitlines() if line.startswith("data:")]
    assert [line for line in lines if line.startswith("data:")] == told
    assert [line for line in lines if line.startswith("event:")][-2:] == ["event: output", "event: done"]


def test_a_cancel_at_another_server(serve: Serve, asked: dict[str, Any]) -> None:
    one, two = serve(), serve()
    running, waiting = one.create(asked), one.create(asked)
    runs = {run.id: run for run in (one.batcher.next() for _ in range(2))}
    runs[running].step(1, 2)
    for id in (running, waiting):
        answer = two.client.post(f"/v1/predictions/{id}/cancel").json()
        assert answer["status"] == "canceled"
        assert runs[id].canceled


def test_a_gone_servers_predictions(serve: Serve, asked: dict[str, Any], receiver: Receiver) -> None:
    one = serve()
    hook = {"webhook": receiver.url, "webhook_events_filter": ["completed"]}
    running, waiting = one.create(asked, **hook), one.create(asked, **hook)
    runs = {run.id: run for run in (one.batcher.next() for _ in range(2))}
    runs[running].step(1, 2)
    go_on = one.stand_still()
    two = serve(by_itself=True)
    assert two.ended(waiting)["status"] == "succeeded"
    held = two.ended(running)
    assert (held["status"], held["error"], held["completed_at"] is None) == ("failed", INTERRUPTED, False)
    # It was only paused, and does not know yet.
    runs[running].step(2, 2)
    runs[running].succeed()
    runs[waiting].step(1, 2)
    assert runs[waiting].canceled
    go_on()
    assert one.app.state.shared.jobs.lives() == []
    assert (two.ended(running), one.get(running)) == (held, held)
    assert [run.id for run in two.batcher.seen] == [waiting]
    told = [receiver.next() for _ in range(2)]
    assert sorted(body["id"] for _, body in told) == sorted([running, waiting])
    one.app.close()
    two.app.close()
    assert receiver.got.empty()
    # The fence, and nothing that one knew, kept these.
    with two.store._postgres._connect() as connection:
        rows = connection.execute("SELECT count(*) AS n FROM contents").fetchone()
    assert rows == {"n": 1}


def test_a_paused_server_lets_go_of_what_runs(serve: Serve, asked: dict[str, Any]) -> None:
    one = serve()
    id = one.create(asked)
    run = one.batcher.next()
    run.step(1, 2)
    go_on = one.stand_still()
    two = serve()
    assert two.ended(id)["status"] == "failed"
    go_on()
    assert run.canceled
    assert one.get(id)["status"] == "failed"


def test_a_last_event_that_is_due_is_taken_over(
    serve: Serve, asked: dict[str, Any], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritocco.server.webhooks._FIRST_PAUSE_S", 2.5)
    receiver.statuses = [500]
    one = serve(by_itself=True)
    hook = {"webhook": receiver.url, "webhook_events_filter": ["completed"]}
    id = one.create(asked, **hook)
    first, _ = receiver.next()
    one.stand_still()
    two = serve()
    second, body = receiver.next()
    assert (body["id"], second["webhook-id"]) == (id, first["webhook-id"])
    soon(lambda: two.store.due() == [])
    # Its own second attempt, which it finds is not its to make, ends before a stop does.
    soon(lambda: not one.app.state.shared.webhooks.sends_last(id))
    assert receiver.got.empty()


def test_what_a_stop_leaves_runs_elsewhere_at_once(serve: Serve, asked: dict[str, Any]) -> None:
    one, two = serve(gone_after_s=3600.0), serve(gone_after_s=3600.0, by_itself=True)
    ids = [one.create(asked) for _ in range(3)]
    for _ in ids:
        one.batcher.next()
    one.batcher.busy = 10**6
    ids += [one.create(asked) for _ in range(3)]
    one.app.begin_stop()
    for id in ids:
        assert two.ended(id)["status"] == "succeeded"
    assert sorted(run.id for run in two.batcher.seen) == sorted(ids)
    assert one.get(ids[0])["status"] == "succeeded", "clients can still ask"


def test_a_stop_hands_on_what_is_not_ready_in_time(serve: Serve, asked: dict[str, Any]) -> None:
    one, two = serve(gone_after_s=3600.0), serve(gone_after_s=3600.0, by_itself=True)
    id = one.create(asked)
    one.batcher.next().step(1, 2)
    one.app.close()
    held = two.ended(id)
    assert (held["status"], held["error"]) == ("succeeded", None)


def test_a_cancel_of_what_nobody_has(serve: Serve, asked: dict[str, Any]) -> None:
    one = serve()
    id = one.create(asked)
    one.batcher.next()
    one.stand_still()
    two = serve()
    assert two.client.post(f"/v1/predictions/{id}/cancel").status_code == 200
    held = two.ended(id)
    assert (held["status"], held["started_at"], two.batcher.seen) == ("canceled", None, [])


def test_the_database_goes_away_and_comes_back(
    serve: Serve,
    asked: dict[str, Any],
    postgres: RealPostgres,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ritocco.server.jobs._RETRY_STORING_S", 0.2)
    one, two = serve(outputs="url"), serve()
    hook = {"webhook": receiver.url, "webhook_events_filter": ["completed"]}
    running, waiting = one.create(asked, **hook), one.create(asked, **hook)
    runs = {run.id: run for run in (one.batcher.next() for _ in range(2))}
    runs[running].step(1, 2)
    postgres.stop()
    try:
        refused = one.client.post("/v1/predictions", json={"input": asked})
        assert (refused.status_code, refused.json()["title"]) == (503, "Database away")
        assert refused.headers["Retry-After"] == "5"
        assert one.client.get("/readyz").json() == {"status": "storage"}
        assert one.client.get("/livez").status_code == 200
        runs[running].step(2, 2)
        runs[running].succeed()
        runs[waiting].begin()  # which is put off
        assert runs[waiting].canceled
        time.sleep(2 * GONE_S)  # long enough to be gone, were it not for all of them
    finally:
        postgres.start()
    soon(lambda: all(each.client.get("/readyz").status_code == 200 for each in (one, two)))
    assert two.ended(running)["status"] == "succeeded"
    assert one.client.get(one.get(running)["output"][0]).status_code == 200
    again = one.batcher.next()
    assert again.id == waiting
    again.step(1, 2)
    again.succeed()
    assert two.ended(waiting)["status"] == "succeeded"
    told = [receiver.next()[1] for _ in range(2)]
    assert sorted(body["id"] for body in told) == sorted([running, waiting])
    one.create(asked)
    assert two.batcher.seen == []
    assert PASSWORD not in caplog.text
    one.app.close()
    two.app.close()
    assert receiver.got.empty()


def test_a_commit_whose_answer_is_lost(
    serve: Serve, asked: dict[str, Any], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done, and nobody knows: what was accepted runs, what ended is told, its picture stays."""
    monkeypatch.setattr("ritocco.server.jobs._RETRY_STORING_S", 0.2)
    one, two = serve(), serve()
    lost = list[str]()

    def losing(name: str) -> Callable[..., Any]:
        whole = getattr(SharedStore, name)

        def call(self: SharedStore, *arguments: Any) -> Any:
            found = whole(self, *arguments)
            if name not in lost:
                lost.append(name)
                raise AwayError("the connection was lost")
            return found

        return call

    for name in ("accept", "start", "finish"):
        monkeypatch.setattr(SharedStore, name, losing(name))
    body = {"input": asked, "webhook": receiver.url, "webhook_events_filter": ["completed"]}
    assert one.client.post("/v1/predictions", json=body).status_code == 503
    (id,) = [each["id"] for each in two.client.get("/v1/predictions").json()["results"]]
    one.batcher.next().begin()
    run = one.batcher.next()
    run.step(1, 2)
    run.succeed()
    held = two.ended(id)
    assert (held["status"], len(held["output"])) == ("succeeded", 1)
    assert lost == ["accept", "start", "finish"]
    assert receiver.next()[1]["id"] == id
    soon(lambda: one.store.due() == [])
    assert receiver.got.empty()


def new(**changes: Any) -> Record:
    made = Record(id=new_id(), input={}, version="v", base="", stream=new_id(), digest="d")
    return replace(made, **changes)


def test_what_is_anothers_by_now_is_not_changed(database: str) -> None:
    one, two = SharedStore(database), SharedStore(database)
    try:
        taken, _ = one.accept(new(webhook="http://there/"))
        other, _ = one.accept(new())
        one._pulse.close()
        with two.database.write() as db:
            db.execute("DELETE FROM servers WHERE id = ?", (one._owner,))
        assert two.take_over(run=True).waiting == [taken.id, other.id]
        assert one.standing([taken.id])[taken.id].ours is False
        assert (one.queued(), one.unfinished()) == ([], 0)
        assert not one.prepare(taken.id)
        assert not one.start(taken.id)
        assert two.start(taken.id)
        before = two.get(taken.id)
        assert not one.requeue(taken.id)
        one.release([taken.id, other.id])
        one.tell({taken.id: "nothing"})
        one.prepared(taken.id)
        picture = one.files.write(
            b"x", name="out-0.png", content_type="image/png", prediction=taken.id, place=0
        )
        assert not one.finish(taken.id, Outcome(status="succeeded"), [picture])
        assert (one.get(taken.id), one.files.outputs(taken.id)) == (before, [])
        assert not one.files.there(picture)
        assert two.queued() == [other.id]
        assert two.finish(taken.id, Outcome(status="failed"))
        assert (one.due(), one.is_due(taken.id), two.due()) == ([], False, [taken.id])
        one.delivered(taken.id)
        assert two.is_due(taken.id)
    finally:
        for each in (one, two):
            each.close()


def test_one_takes_over_a_part(database: str) -> None:
    """So that the others get some; and nothing twice, whoever asks at the same moment."""
    left, *others = (SharedStore(database) for _ in range(4))
    ids = [left.accept(new())[0].id for _ in range(30)]
    left.close()
    taken: list[str] = []

    def work(store: SharedStore) -> None:
        for _ in range(3):
            found = store.take_over(run=True).waiting
            assert len(found) <= 8
            taken.extend(found)

    threads = [threading.Thread(target=work, args=(each,)) for each in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken) == sorted(ids)
    assert sum(each.unfinished() for each in others) == 30
    for each in others:
        each.close()


def test_bytes_that_have_a_row_are_not_deleted(database: str) -> None:
    store = SharedStore(database)
    known, unknown, fresh = (store.files.write(b"x", name="a", content_type="b") for _ in range(3))
    store.files.record(known)
    store.files.unlink([known.id])
    with store.database.write() as db:
        db.execute("UPDATE contents SET created = 0 WHERE id <> ?", (fresh.id,))
    store.clean(3600)
    assert [store.files.there(one) for one in (known, unknown, fresh)] == [True, False, True]
    store.files.unlink([fresh.id])
    assert not store.files.there(fresh)
    store.close()


class Beats:
    """Stands in for a database that is there, or away."""

    away = False

    def beat(self, *_: object) -> None:
        if self.away:
            raise AwayError("away")


def test_nobody_is_gone_before_all_could_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now, beats = [1000.0], Beats()
    monkeypatch.setattr("ritocco.server.pulse.time.monotonic", lambda: now[0])
    pulse = Pulse(beats, "me", gone_after_s=10.0)  # type: ignore[arg-type]
    pulse.close()

    def beat(*, every: float, until: float) -> list[float]:
        """When it would say that an unseen server is gone."""
        judged = []
        while now[0] < until:
            now[0] += every
            pulse._beat()
            judged += [now[0]] if pulse.may_judge else []
        return judged

    assert beat(every=1, until=1015) == [1010, 1011, 1012, 1013, 1014, 1015]
    beats.away = True
    with pytest.raises(AwayError):
        pulse._beat()
    assert not pulse.may_judge
    beats.away = False
    assert beat(every=1, until=1027) == [1026, 1027]
    now[0] += 8  # it stood still
    assert not pulse.may_judge
    assert beat(every=1, until=1047) == [1046, 1047]


def test_two_open_an_empty_database_at_once(database: str) -> None:
    opened, failed = list[Postgres](), list[Exception]()

    def work() -> None:
        try:
            opened.append(Postgres(database))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for each in opened:
        each.close()
    assert (len(opened), failed) == (8, [])


def test_a_database_of_a_later_version(database: str) -> None:
    held = Postgres(database)
    with held.write() as db:
        db.execute("UPDATE settings SET value = '99' WHERE name = 'format'")
    held.close()
    with pytest.raises(BackendError, match="of format 99") as refused:
        Postgres(database)
    assert PASSWORD not in str(refused.value)


def test_a_database_that_cannot_be_used(database: str, postgres: RealPostgres) -> None:
    wrong = [
        database.replace(PASSWORD, "another-secret"),
        database + "-that-is-not-there",
        database.replace(str(postgres.port), "1"),
        f"postgresql://u:{PASSWORD}@[/x",
        f"postgresql://u:{PASSWORD}@h/d?nonsense={PASSWORD}",
    ]
    for url in wrong:
        with pytest.raises(BackendError, match="--database") as refused:
            Postgres(url)
        shown = f"{refused.value!r} {refused.value.__cause__!r}"
        assert PASSWORD not in shown
        assert "another-secret" not in shown


def test_one_cleans_at_a_time(serve: Serve, asked: dict[str, Any]) -> None:
    one, two = serve(by_itself=True), serve()
    id = one.create(asked)
    one.ended(id)
    with one.store._postgres.write() as db:
        assert db.try_lock("clean")
        assert two.store.clean(-1.0) == 0
    assert two.get(id)["data_removed"] is False
    assert two.store.clean(-1.0) == 1
    held = one.get(id)
    assert (held["data_removed"], held["output"], held["input"]) == (True, None, {})
    with one.store._postgres.read() as db:
        assert db.execute("SELECT id FROM contents").fetchall() == []


def test_settings_that_make_no_sense(tmp_path: Any) -> None:
    url = "postgresql://u:secret@h/d"
    assert "secret" not in repr(Settings(database=url))
    for given, said in (
        ({"database": url, "data": tmp_path}, "database and data are both given"),
        ({"database": "mysql://u:secret@h/d"}, "must start with postgresql://"),
        ({"gone_after_s": 0.5}, "gone_after_s is 0.5; it must be 1 to 3600 seconds"),
        ({"database": url, "max_upload_bytes": 1 << 30}, "max_upload_bytes is 1073741824; with a database"),
    ):
        with pytest.raises(RequestError, match=said) as refused:
            Settings(**given)
        assert "secret" not in str(refused.value)
