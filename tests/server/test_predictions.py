"""Predictions over HTTP: every way to create one, and what becomes of it."""

from __future__ import annotations

import base64
import json
import re
import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from hand_batcher import HandBatcher, Make
from ritocco.errors import NonFiniteError
from ritocco.prediction import MODEL, VERSION
from ritocco.safety import NSFW_ERROR
from ritocco.server.gate import PREFIXES

SEED_FIELDS = {
    *("id", "model", "version", "input", "logs", "output", "data_removed", "error", "status", "created_at"),
    "urls",
}
PROGRESS = re.compile(r"^\s*(?P<percentage>\d+)%\s*\|.+?\|\s*(?P<current>\d+)\/(?P<total>\d+)", re.MULTILINE)


def ended(client: TestClient, id: str) -> dict[str, Any]:
    """The prediction once it ended."""
    with client.stream("GET", client.get(f"/v1/predictions/{id}").json()["urls"]["stream"]) as stream:
        stream.read()
    return dict(client.get(f"/v1/predictions/{id}").json())


@pytest.mark.parametrize("prefix", ["/v1", "/replicate/v1"])
@pytest.mark.parametrize("version", [None, VERSION, MODEL, f"{MODEL}:{VERSION}", HandBatcher.version])
def test_create_and_get(make: Make, asked: dict[str, Any], prefix: str, version: str | None) -> None:
    client = make()
    body: dict[str, Any] = {"input": asked} | ({} if version is None else {"version": version})
    made = client.post(f"{prefix}/predictions", json=body)
    assert made.status_code == 201
    held = made.json()
    assert held.keys() >= SEED_FIELDS
    assert set(held["urls"]) == {"get", "cancel", "stream", "web"}
    assert (held["status"], held["output"], held["error"]) == ("starting", None, None)
    assert held["urls"]["get"] == f"http://testserver{prefix}/predictions/{held['id']}"
    assert (held["model"], held["input"]) == (MODEL, asked)
    assert held["version"] == (VERSION if version and VERSION in version else HandBatcher.version)
    assert ended(client, held["id"])["status"] == "succeeded"
    got = client.get(held["urls"]["get"]).json()
    assert base64.b64decode(got["output"][0].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert got["created_at"] <= got["started_at"] <= got["completed_at"]
    assert got["metrics"] == {"predict_time": 0.5}
    assert got["logs"].startswith("Using seed: 7\n")
    assert [found["current"] for found in PROGRESS.finditer(got["logs"])] == ["1", "2"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_create_by_model_and_wait(make: Make, asked: dict[str, Any], prefix: str) -> None:
    client = make()
    path = f"{prefix}/models/{MODEL}/predictions"
    made = client.post(path, json={"input": asked | {"num_outputs": 3}}, headers={"Prefer": "wait"})
    assert made.status_code == 201
    assert (made.json()["status"], len(made.json()["output"])) == ("succeeded", 3)
    assert client.post(f"{prefix}/models/someone/else/predictions", json={"input": asked}).status_code == 404


def test_cogs_way_is_synchronous(make: Make, asked: dict[str, Any]) -> None:
    client = make()
    made = client.post("/predictions", json={"input": asked})
    assert (made.status_code, made.json()["status"]) == (200, "succeeded")
    replicates = client.post("/predictions", json={"input": asked, "version": VERSION})
    assert (replicates.status_code, replicates.json()["status"]) == (201, "starting")


def test_cogs_way_without_waiting(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make(by_itself=False)
    made = client.post(
        "/predictions", json={"input": asked, "id": "mine"}, headers={"Prefer": "respond-async"}
    )
    assert (made.status_code, made.json()["id"]) == (202, "mine")
    assert made.json()["status"] in ("starting", "processing")
    batcher.next().succeed()


def test_cogs_way_waits_as_long_as_is_preferred(
    make: Make, asked: dict[str, Any], batcher: HandBatcher
) -> None:
    client = make(by_itself=False)
    brief = {"Prefer": "wait=1"}
    made = client.post("/predictions", json={"input": asked, "id": "mine"}, headers=brief)
    assert (made.status_code, made.json()["status"]) == (202, "starting")
    batcher.next().succeed()
    ended(client, "mine")
    again = client.put("/predictions/mine", json={"input": asked}, headers=brief)
    assert (again.status_code, again.json()["status"]) == (200, "succeeded")


def test_put_is_idempotent(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make()
    first = client.put("/predictions/my-id_1", json={"input": asked})
    again = client.put("/predictions/my-id_1", json={"input": asked})
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    assert len(batcher.seen) == 1
    other = client.put("/predictions/my-id_1", json={"input": asked | {"prompt": "a dog"}})
    assert other.status_code == 409
    assert client.put("/predictions/my-id_1", json={"input": asked, "id": "other"}).status_code == 422
    keyed = {"Idempotency-Key": "k"}
    for id in ("one", "two"):
        assert client.put(f"/predictions/{id}", json={"input": asked}, headers=keyed).json()["id"] == id
    bad = client.put("/predictions/no%20spaces", json={"input": asked})
    assert (bad.status_code, bad.json()["invalid_fields"][0]["field"]) == (422, "id")


def test_what_has_ended_is_no_202(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client, at_once = make(by_itself=False), {"Prefer": "respond-async"}

    def put() -> tuple[int, str]:
        made = client.put("/predictions/mine", json={"input": asked}, headers=at_once)
        return made.status_code, made.json()["status"]

    assert put() == (202, "starting")
    run = batcher.next()
    run.step(1, 2)
    assert put() == (202, "processing")
    run.succeed()
    ended(client, "mine")
    assert put() == (200, "succeeded")


def test_a_key_makes_creation_idempotent(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make()
    ids = {
        client.post("/v1/predictions", json={"input": asked}, headers={"Idempotency-Key": "k"}).json()["id"]
        for _ in range(3)
    }
    # Clients in JavaScript write 7 for 7.0.
    for numbers in ({"guidance_scale": 7.0, "seed": 7}, {"guidance_scale": 7, "seed": 7.0}):
        body = {"input": asked | numbers}
        assert client.put("/predictions/numbers", json=body).status_code == 200
    assert len(ids) == 1
    assert ended(client, ids.pop())["status"] == "succeeded"
    assert len(batcher.seen) == 2
    other = client.post(
        "/v1/predictions", json={"input": asked, "webhook": "https://a/"}, headers={"Idempotency-Key": "k"}
    )
    assert (other.status_code, other.json()["title"]) == (409, "Conflict")
    bad = client.post("/v1/predictions", json={"input": asked}, headers={"Idempotency-Key": "a b"})
    assert bad.status_code == 422


def test_a_wait_that_runs_out_says_starting(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    """Any other word makes `run` of all three clients return nothing."""
    client = make(by_itself=False)
    answers: list[dict[str, Any]] = []

    def create() -> None:
        answers.append(
            client.post("/v1/predictions", json={"input": asked}, headers={"Prefer": "wait=1"}).json()
        )

    thread = threading.Thread(target=create)
    thread.start()
    run = batcher.next()
    run.step(1, 2)
    thread.join()
    assert (answers[0]["status"], answers[0]["output"]) == ("starting", None)
    assert client.get(f"/v1/predictions/{run.id}").json()["status"] == "processing"
    run.succeed()
    assert ended(client, run.id)["status"] == "succeeded"


def test_a_wait_ends_with_the_prediction(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make(by_itself=False)
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(
        target=lambda: answers.append(
            client.post("/v1/predictions", json={"input": asked}, headers={"Prefer": "wait"}).json()
        )
    )
    thread.start()
    batcher.next().succeed()
    thread.join(30)
    assert answers[0]["status"] == "succeeded"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NSFW_ERROR, NSFW_ERROR),
        (NonFiniteError("NaN in step 3", step=3), "NaN in step 3"),
        (RuntimeError("/secret/path"), "Internal error; the server's log has more"),
    ],
)
def test_a_failed_prediction_is_still_an_answer(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, error: Any, text: str
) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    run = batcher.next()
    run.step(1, 2)
    run.fail(error)
    held = ended(client, made["id"])
    assert (held["status"], held["error"], held["output"]) == ("failed", text, None)
    assert held["logs"].startswith("Using seed")
    assert client.get(f"/v1/predictions/{run.id}").status_code == 200


def test_a_picture_that_cannot_be_had_fails_the_prediction(make: Make, asked: dict[str, Any]) -> None:
    client = make()
    made = client.post("/v1/predictions", json={"input": asked | {"ritocco": {"strength": 0.5}}})
    assert made.json()["input"]["ritocco"] == {"strength": 0.5}
    assert ended(client, made.json()["id"])["status"] == "succeeded"


def test_cancel_while_waiting_and_while_running(
    make: Make, asked: dict[str, Any], batcher: HandBatcher
) -> None:
    client = make(by_itself=False)
    for steps in (0, 1):
        made = client.post("/v1/predictions", json={"input": asked}).json()
        run = batcher.next()
        if steps:
            run.step(1, 2)
        answer = client.post(f"/v1/predictions/{made['id']}/cancel")
        assert answer.status_code == 200
        assert (answer.json()["status"], answer.json()["id"]) == ("canceled", made["id"])
        assert run.canceled
        again = client.post(made["urls"]["cancel"])
        assert again.json() == answer.json()


def test_a_busy_batcher_is_asked_again(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    batcher.busy = 3
    client = make()
    assert client.post("/predictions", json={"input": asked}).json()["status"] == "succeeded"
    assert batcher.busy == 0


def test_lists_and_their_cursors(
    make: Make, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, batcher: HandBatcher
) -> None:
    monkeypatch.setattr("ritocco.server.predictions.PAGE", 2)
    client = make()
    assert client.get("/v1/predictions").json() == {"previous": None, "next": None, "results": []}
    big = asked | {"image": "data:image/png;base64," + "A" * 1000}
    ids = [client.post("/predictions", json={"input": big}).json()["id"] for _ in range(5)][::-1]
    first = client.get("/v1/predictions").json()
    second = client.get(first["next"]).json()
    third = client.get(second["next"]).json()
    assert [one["id"] for page in (first, second, third) for one in page["results"]] == ids
    assert (first["previous"], third["next"]) == (None, None)
    assert client.get(third["previous"]).json()["results"] == second["results"]
    assert client.get(second["previous"]).json()["results"] == first["results"]
    for cursor, way in ((">99", "next"), ("<1", "previous")):
        named = base64.b64encode(cursor.encode()).decode()
        empty = client.get("/v1/predictions", params={"cursor": named}).json()
        assert empty["results"] == []
        back = client.get(empty[way]).json()["results"]
        assert (
            back
            == (first if way == "next" else third | {"results": second["results"][1:] + third["results"]})[
                "results"
            ]
        )
    one = first["results"][0]
    assert len(one["input"]["image"]) < 100
    assert one["output"][0].startswith("http://testserver/v1/outputs/")
    for cursor in ("x", "!!", base64.b64encode(b"<x").decode(), base64.b64encode(b"<" + b"9" * 30).decode()):
        assert client.get("/v1/predictions", params={"cursor": cursor}).status_code == 422


def test_outputs_as_addresses(make: Make, asked: dict[str, Any]) -> None:
    client = make(outputs="url")
    held = client.post("/predictions", json={"input": asked | {"num_outputs": 2}}).json()
    assert [url.rpartition("/")[2] for url in held["output"]] == ["out-0.png", "out-1.png"]
    got = client.get(held["output"][1])
    assert (got.headers["content-type"], got.content[:4]) == ("image/png", b"\x89PNG")
    assert got.headers["x-content-type-options"] == "nosniff"
    assert client.head(held["output"][1]).headers["content-length"] == str(len(got.content))
    assert client.get(held["output"][1].replace("out-1", "out-0")).status_code == 404


@pytest.mark.parametrize("outputs", ["url", "data"])
def test_a_prediction_whose_files_are_gone(make: Make, asked: dict[str, Any], outputs: str) -> None:
    """Retention deletes files before rows where the disk is full."""
    client = make(outputs=outputs)
    held = client.post("/predictions", json={"input": asked | {"num_outputs": 2}}).json()
    files = client.app.state.shared.store.files  # type: ignore[attr-defined]
    files.unlink([files.outputs(held["id"])[1].id])
    for got in (client.get(held["urls"]["get"]).json(), client.get("/v1/predictions").json()["results"][0]):
        assert (got["status"], got["data_removed"], got["output"]) == ("succeeded", True, None)


def test_outputs_follow_the_scheme(make: Make, asked: dict[str, Any]) -> None:
    client = make(public_url="https://paint.example/sd")
    held = client.post("/predictions", json={"input": asked}).json()
    assert held["output"][0].startswith("https://paint.example/sd/outputs/")
    assert held["urls"]["get"].startswith("https://paint.example/sd/predictions/")


def test_the_stream(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make()
    made = client.post("/v1/predictions", json={"input": asked | {"num_outputs": 2}}).json()
    ended(client, made["id"])
    got = client.get(made["urls"]["stream"])
    assert got.headers["content-type"].startswith("text/event-stream")
    events = [
        dict(line.split(": ", 1) for line in one.splitlines() if ": " in line)
        for one in got.text.split("\n\n")
    ]
    kinds = [one["event"] for one in events if "event" in one]
    assert kinds == ["logs", "output", "output", "done"]
    assert all(one["id"] for one in events if "event" in one)
    assert events[-2]["data"] == "{}"
    last = next(one["id"] for one in events if one.get("event") == "output")
    rest = client.get(made["urls"]["stream"], headers={"Last-Event-ID": last}).text
    assert re.findall("event: (.*)", rest) == ["output", "done"]


@pytest.mark.parametrize(
    ("end", "kinds", "data"),
    [
        ("fail", ["logs", "error", "done"], '{"reason": "error"}'),
        ("cancel", ["logs", "done"], '{"reason": "canceled"}'),
    ],
)
def test_the_stream_of_what_does_not_succeed(
    make: Make, asked: dict[str, Any], batcher: HandBatcher, end: str, kinds: list[str], data: str
) -> None:
    client = make(by_itself=False)
    made = client.post("/v1/predictions", json={"input": asked}).json()
    run = batcher.next()
    run.step(1, 2)
    if end == "fail":
        run.fail("no luck")
    else:
        client.post(made["urls"]["cancel"])
    text = client.get(made["urls"]["stream"]).text
    assert re.findall("event: (.*)", text) == kinds
    assert f"data: {data}" in text


def test_what_is_not_there(open_client: TestClient) -> None:
    for path in (
        "/v1/predictions/nothing",
        "/v1/stream/" + "a" * 26,
        "/v1/nothing",
        "/v1/outputs/" + "a" * 26 + "/x",
    ):
        got = open_client.get(path)
        assert (got.status_code, got.json()["title"], got.json()["status"]) == (404, "Not found", 404)
    assert open_client.post("/v1/predictions/nothing/cancel").status_code == 404
    wrong = open_client.delete("/v1/predictions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        ({"num_inference_steps": 501}, "number_lte", "input.num_inference_steps"),
        ({"num_outputs": 0}, "number_gte", "input.num_outputs"),
        ({"scheduler": "X"}, "enum", "input.scheduler"),
        ({"width": 100}, "enum", "input.width"),
        ({"prompt": 1}, "invalid_type", "input.prompt"),
        ({"image": None}, "invalid_type", "input.image"),
        ({"image": "/etc/passwd"}, "invalid_type", "input.image"),
        ({"image": "file:///etc/passwd"}, "invalid_type", "input.image"),
        ({"mask": "../../mask.png"}, "invalid_type", "input.mask"),
        ({"ritocco": {"latents": [1]}}, "additional_property_not_allowed", "input.ritocco"),
    ],
)
def test_inputs_that_break_a_rule(
    open_client: TestClient, asked: dict[str, Any], changes: dict[str, Any], kind: str, field: str
) -> None:
    got = open_client.post("/v1/predictions", json={"input": asked | changes})
    assert got.status_code == 422
    held = got.json()
    assert (held["title"], held["status"]) == ("Input validation failed", 422)
    (found,) = held["invalid_fields"]
    assert (found["type"], found["field"]) == (kind, field)
    assert held["detail"] == f"- {field}: {found['description']}\n"


@pytest.mark.parametrize(
    ("body", "kind", "field"),
    [
        ({}, "required", "(root)"),
        ({"input": []}, "invalid_type", "input"),
        ({"input": {}}, "required", "input"),
        ({"input": None}, "invalid_type", "input"),
        ({"inputs": {}}, "required", "(root)"),
        ({"input": {}, "other": 1}, "additional_property_not_allowed", "other"),
        ({"input": {}, "webhook": 5}, "invalid_type", "webhook"),
        ({"input": {}, "webhook": "ftp://x"}, "invalid_type", "webhook"),
        ({"input": {}, "webhook": "https://" + "x" * 3000}, "invalid_type", "webhook"),
        ({"input": {}, "webhook_events_filter": ["never"]}, "invalid_type", "webhook_events_filter"),
        ({"input": {}, "webhook_events_filter": "start"}, "invalid_type", "webhook_events_filter"),
        ({"input": {}, "stream": "yes"}, "invalid_type", "stream"),
        ({"input": {}, "version": 7}, "invalid_type", "version"),
    ],
)
def test_bodies_that_break_a_rule(open_client: TestClient, body: Any, kind: str, field: str) -> None:
    held = open_client.post("/v1/predictions", json=body)
    assert held.status_code == 422
    assert (kind, field) in [(one["type"], one["field"]) for one in held.json()["invalid_fields"]]


@pytest.mark.parametrize(
    "version", ["", "x", "0" * 64, "someone/else", f"{MODEL}:", f"{MODEL}:abc", VERSION.upper()]
)
def test_versions_that_are_not_served(open_client: TestClient, asked: dict[str, Any], version: str) -> None:
    got = open_client.post("/v1/predictions", json={"input": asked, "version": version})
    assert (got.status_code, got.json()["title"]) == (422, "Invalid version or not permitted")


def test_unknown_inputs_are_ignored(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make()
    unknown = {"size": "big", "strength": 3, "\u732b" * 200: []}
    held = client.post("/predictions", json={"input": asked | unknown}).json()
    assert held["input"] == asked
    # The batcher sees their names alone, and logs them.
    assert list(batcher.seen[0].input.items())[4:6] == [("size", None), ("strength", None)]
    assert all(len(name) < 1000 and value is None for name, value in list(batcher.seen[0].input.items())[4:])


def test_the_work_of_one_request_is_capped(make: Make, asked: dict[str, Any]) -> None:
    client = make(max_work=2 * 512 * 512)
    assert client.post("/v1/predictions", json={"input": asked}).status_code == 201
    got = client.post("/v1/predictions", json={"input": asked | {"num_outputs": 2}})
    (found,) = got.json()["invalid_fields"]
    assert (got.status_code, found["type"]) == (422, "number_lte")
    assert str(2 * 512 * 512) in found["description"]


def test_a_full_queue_is_refused_cheaply(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make(by_itself=False, waiting=2)
    keyed = {"Idempotency-Key": "k"}
    first = client.post("/v1/predictions", json={"input": asked}, headers=keyed).json()
    client.post("/v1/predictions", json={"input": asked})
    # The body is not looked at.
    got = client.post("/v1/predictions", content=b"{", headers={"Content-Type": "application/json"})
    assert (got.status_code, got.headers["retry-after"]) == (429, "1")
    assert got.json()["detail"] == "Request was throttled. Your rate limit resets in ~1s."
    again = client.post("/v1/predictions", json={"input": asked}, headers=keyed)
    assert again.json()["id"] == first["id"]
    assert client.get("/health-check").json()["status"] == "BUSY"
    for _ in range(2):
        batcher.next().succeed()
    assert ended(client, first["id"])["status"] == "succeeded"


def test_answers_are_json_of_the_model(make: Make, asked: dict[str, Any]) -> None:
    client = make()
    text = client.post("/predictions", json={"input": asked}).text
    assert json.loads(text).keys() >= SEED_FIELDS
