"""Webhooks: signed, in order, the last one until it arrives, and never into networks that nobody opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from hand_batcher import HandBatcher, Make
from ritocco.errors import FetchError
from ritocco.fetch import Fetcher
from ritocco.server import webhooks
from ritocco.server.store import Record
from ritocco.server.webhooks import new_secret, signed
from webhook_receiver import Receiver, receiving

LOOPBACK = Fetcher(allow_networks=["127.0.0.0/8"], timeout_s=10)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def test_a_signature_of_the_specification() -> None:
    """The example of Standard Webhooks' libraries."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    made = signed(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', at=1614265330)
    assert made["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_secrets_are_split_at_one_underscore() -> None:
    assert all(new_secret().count("_") == 1 for _ in range(200))


def test_all_events(make: Make, asked: dict[str, Any], batcher: HandBatcher, receiver: Receiver) -> None:
    client = make(by_itself=False, fetcher=LOOPBACK)
    asked["image"] += "=" * 1000
    events = ["start", "output", "logs", "completed"]
    body = {"input": asked, "webhook": receiver.url, "webhook_events_filter": events}
    made = client.post("/v1/predictions", json=body).json()
    run = batcher.next()
    run.step(1, 2)
    first = [receiver.next()[1] for _ in range(2)]
    assert [one["status"] for one in first] == ["processing", "processing"]
    assert first[0]["logs"].startswith("Using seed")
    assert [len(one["input"]["image"]) for one in first] == [63, 63]
    run.succeed()
    second = [receiver.next() for _ in range(2)]
    assert [one["status"] for _, one in second] == ["succeeded", "succeeded"]
    headers, last = second[1]
    assert last == client.get(f"/v1/predictions/{made['id']}").json()
    assert headers["content-type"] == "application/json"
    secret = client.get("/v1/webhooks/default/secret").json()["key"]
    raw = json.dumps(last, separators=(",", ":"), ensure_ascii=False).encode()
    at = int(headers["webhook-timestamp"])
    assert (
        headers["webhook-signature"] == signed(secret, headers["webhook-id"], raw, at=at)["webhook-signature"]
    )


def test_without_a_filter_output_and_completed(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, receiver: Receiver
) -> None:
    client = make(fetcher=LOOPBACK)
    client.post("/predictions", json={"input": asked, "webhook": receiver.url})
    assert [receiver.next()[1]["status"] for _ in range(2)] == ["succeeded"] * 2
    assert receiver.got.empty()


def test_logs_come_at_most_twice_a_second(
    make: Make,
    asked: dict[str, Any],
    batcher: HandBatcher,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhooks, "LOGS_EVERY_S", 3600.0)
    client = make(by_itself=False, fetcher=LOOPBACK)
    events = ["logs", "completed"]
    body = {"input": asked, "webhook": receiver.url, "webhook_events_filter": events}
    client.post("/v1/predictions", json=body)
    run = batcher.next()
    for done in range(1, 6):
        run.step(done, 5)
    assert receiver.next()[1]["status"] == "processing"
    run.succeed()
    assert receiver.next()[1]["status"] == "succeeded"


def test_only_the_last_one_is_repeated(
    make: Make, asked: dict[str, Any], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_FIRST_PAUSE_S", 0.01)
    receiver.statuses = [500, 503, 302, 200]
    client = make(fetcher=LOOPBACK)
    made = client.post("/predictions", json={"input": asked, "webhook": receiver.url}).json()
    output, *last = [receiver.next()[0] for _ in range(4)]
    assert len({one["webhook-id"] for one in last}) == 1
    assert output["webhook-id"] != last[0]["webhook-id"]
    assert client.get(f"/v1/predictions/{made['id']}").json()["status"] == "succeeded"
    client.app.close()  # type: ignore[attr-defined]
    assert receiver.got.empty()


def test_the_last_one_is_sent_after_a_restart(
    make: Make, asked: dict[str, Any], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_FIRST_PAUSE_S", 3600.0)
    receiver.statuses = [500, 500]
    client = make(fetcher=LOOPBACK)
    made = client.post("/predictions", json={"input": asked, "webhook": receiver.url}).json()
    assert [receiver.next()[1]["id"] for _ in range(2)] == [made["id"]] * 2
    client.app.close()  # type: ignore[attr-defined]
    make(fetcher=LOOPBACK)
    assert receiver.next()[1] == made | {"logs": made["logs"]}
    assert receiver.got.empty()


def test_a_receiver_that_does_not_answer_holds_up_nobody_else(
    make: Make, asked: dict[str, Any], receiver: Receiver
) -> None:
    with receiving() as silent:
        silent.statuses = [0] * 100
        client = make(fetcher=Fetcher(allow_networks=["127.0.0.0/8"], timeout_s=600))
        body = {"input": asked, "webhook": silent.url, "webhook_events_filter": ["completed"]}
        for _ in range(12):
            client.post("/predictions", json=body)
        silent.next()
        elsewhere = receiver.url.replace("127.0.0.1", "localhost")
        made = client.post("/predictions", json=body | {"webhook": elsewhere}).json()
        assert receiver.next()[1]["id"] == made["id"]


def test_the_last_one_waits_briefly_for_others(
    make: Make, asked: dict[str, Any], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_HASTY_S", 0.2)
    receiver.statuses = [0]
    client = make(fetcher=Fetcher(allow_networks=["127.0.0.0/8"], timeout_s=600))
    client.post("/predictions", json={"input": asked, "webhook": receiver.url})
    output, last = receiver.next()[0], receiver.next()[0]
    assert output["webhook-id"] != last["webhook-id"]


def test_logs_wait_behind_the_rest_and_are_superseded() -> None:
    queue = webhooks._Queue()
    one, two = (Record(id=id, input={}, version="", base="", stream="", digest="") for id in "12")
    asked: list[tuple[Record, webhooks.Event]] = [(one, "logs"), (two, "logs"), (one, "logs"), (two, "start")]
    asked += [(one, "output"), (one, "completed")]
    for record, event in asked:
        queue.put(webhooks._Message(record, event, bytes))
    taken = [queue.take() for _ in range(len(queue))]
    assert [(each.record.id, each.event) for each in taken] == [
        ("2", "start"),
        ("1", "output"),
        ("1", "completed"),
        ("2", "logs"),
    ]


def test_a_receivers_queue_is_bounded(
    make: Make, asked: dict[str, Any], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too much is still due after the next start."""
    monkeypatch.setattr(webhooks, "_MOST_LAST", 1)
    monkeypatch.setattr(webhooks, "_LANES", 1)
    receiver.statuses = [0]
    client = make(fetcher=LOOPBACK)
    body = {"input": asked, "webhook": receiver.url, "webhook_events_filter": ["completed"]}
    made = [client.post("/predictions", json=body).json()["id"]]
    assert receiver.next()[1]["id"] == made[0]
    made += [client.post("/predictions", json=body).json()["id"] for _ in range(2)]
    receiver.ended.set()
    assert receiver.next()[1]["id"] == made[1]
    client.app.close()  # type: ignore[attr-defined]
    while not receiver.got.empty():
        assert receiver.next()[1]["id"] != made[2]
    monkeypatch.setattr(webhooks, "_MOST_LAST", 10)
    make(fetcher=LOOPBACK)
    assert made[2] in {receiver.next()[1]["id"] for _ in range(2)}


def test_closed_networks_get_nothing(
    make: Make, asked: dict[str, Any], receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    client = make(fetcher=Fetcher())
    with caplog.at_level("INFO"):
        held = client.post("/predictions", json={"input": asked, "webhook": receiver.url}).json()
        client.app.close()  # type: ignore[attr-defined]
    assert held["status"] == "succeeded"
    assert receiver.got.empty()
    outcomes = [one.outcome for one in caplog.records if one.message == "webhook"]  # type: ignore[attr-defined]
    assert outcomes
    assert all("is not a public address" in one for one in outcomes)
    assert all(secret not in caplog.text + str(outcomes) for secret in ("key=secret", "/hook"))
    assert all("webhook: http://127.0.0.1:" in one for one in outcomes)


def test_the_fetcher_posts(receiver: Receiver) -> None:
    receiver.statuses = [201, 302]
    assert LOOPBACK.post(receiver.url, b"{}", {"X-A": "b"}) == 201
    headers, body = receiver.next()
    assert (headers["x-a"], headers["host"], body) == ("b", receiver.url.split("/")[2], {})
    assert LOOPBACK.post(receiver.url, b"", {}) == 302
    with pytest.raises(FetchError, match=r"webhook: http://127\.0\.0\.1.*not a public address"):
        Fetcher().post(receiver.url, b"", {}, field="webhook")
    with pytest.raises(FetchError, match="only http and https"):
        LOOPBACK.post("ftp://127.0.0.1/", b"", {})
