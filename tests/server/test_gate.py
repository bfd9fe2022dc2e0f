"""The gate: who gets in, what is too much, and what a log must not hold."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from typing import Any

import pytest
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from hand_batcher import HandBatcher, Make, picture
from ritocco.errors import FetchError, RequestError
from ritocco.prediction import MODEL
from ritocco.server import Settings
from ritocco.server.gate import PREFIXES, BodyLimits
from ritocco.server.logs import JsonLines
from ritocco.server.metrics import Metrics
from ritocco.server.problems import ProblemError
from ritocco.server.settings import read_tokens

TOKENS = ["correct-horse-battery-staple", "another-token-of-enough-letters"]
GOOD = {"Authorization": f"Bearer {TOKENS[0]}"}
OPEN = {"/livez", "/readyz", "/health-check"}


def every_route(client: Any) -> list[tuple[str, str]]:
    found = []
    for prefix in PREFIXES:
        for path, methods in client.app.openapi()["paths"].items():
            found += [(method.upper(), path.replace("/v1", prefix, 1)) for method in methods]
    return [
        *dict.fromkeys(found),
        ("GET", "/openapi.json"),
        ("GET", "/nothing/here"),
    ]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong-horse-battery-staple"},
        {"Authorization": f"Bearer {TOKENS[0]}x"},
        {"Authorization": f"Bearer {TOKENS[0][:-1]}"},
        {"Authorization": f"Basic {TOKENS[0]}"},
        {"Authorization": TOKENS[0]},
        {"Authorization": f"Bearer {TOKENS[0]} {TOKENS[1]}"},
        [("Authorization", f"Bearer {TOKENS[0]}"), ("Authorization", "Bearer x")],
        {"Authorization": "Bearer \xff".encode("latin-1")},
    ],
)
def test_without_a_token_every_route_is_closed(closed_client: TestClient, headers: Any) -> None:
    for method, path in every_route(closed_client):
        path = path.replace("{owner}/{name}", MODEL).replace("{id}", "a" * 26).replace("{name}", "a" * 26)
        got = closed_client.request(method, path, headers=headers)
        if path in OPEN:
            assert got.status_code == 200
        elif method == "GET" and ("/stream/" in path or "/outputs/" in path):
            assert got.status_code == 404
        else:
            assert (got.status_code, path) == (401, path)
            assert got.json() == {
                "title": "Unauthenticated",
                "detail": "You did not pass a valid authentication token",
                "status": 401,
            }
            assert got.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer", "Token", "bearer", "TOKEN"])
@pytest.mark.parametrize("token", TOKENS)
def test_a_token_opens(closed_client: TestClient, scheme: str, token: str) -> None:
    assert (
        closed_client.get("/v1/predictions", headers={"Authorization": f"{scheme} {token}"}).status_code
        == 200
    )


@pytest.mark.parametrize(
    "path",
    [
        "/v1/stream/../predictions",
        "/v1/outputs/" + "a" * 26 + "/../../predictions",
        "/v1/outputs/" + "a" * 26 + "/x%2f..%2f..%2fpredictions",
        "//livez",
        "/livez/../v1/predictions",
        "/livez%2f..%2fv1%2fpredictions",
        "/v1/predictions?/livez",
        "/v1/predictions/",
        "/livez/",
        "/v1//predictions",
        "/LIVEZ",
    ],
)
def test_no_spelling_gets_around_the_gate(closed_client: TestClient, path: str) -> None:
    assert closed_client.get(path, follow_redirects=False).status_code in (401, 404)
    assert "results" not in closed_client.get(path).text


def test_outputs_and_streams_need_no_token_but_their_name(make: Make, asked: dict[str, Any]) -> None:
    client = make(tokens=TOKENS, outputs="url")
    held = client.post("/predictions", json={"input": asked}, headers=GOOD).json()
    assert client.get(held["output"][0]).status_code == 200
    assert "event: done" in client.get(held["urls"]["stream"]).text
    names = {held["output"][0].split("/")[-2], held["urls"]["stream"].rpartition("/")[2], held["id"]}
    assert len(names) == 3
    assert all(len(name) == 26 for name in names)


def test_pages_of_other_sites_may_not_call(make: Make, asked: dict[str, Any]) -> None:
    client = make()
    body = {"input": asked}
    evil = client.post("/v1/predictions", json=body, headers={"Origin": "https://evil.example"})
    assert evil.status_code == 403
    assert "access-control-allow-origin" not in evil.headers
    assert client.post("/v1/files", files={"content": b"x"}, headers={"Origin": "null"}).status_code == 403
    # Its own name may be one that another site made to resolve to this machine.
    own = client.post("/v1/predictions", json=body, headers={"Origin": "http://testserver"})
    assert own.status_code == 403
    asking = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/predictions", headers=asking).status_code == 405
    assert "access-control-allow-origin" not in client.get("/livez", headers=asking).headers


def test_a_page_that_is_named_may_call(make: Make, asked: dict[str, Any]) -> None:
    client = make(cors_origins=["https://app.example"])
    got = client.post("/v1/predictions", json={"input": asked}, headers={"Origin": "https://app.example"})
    assert got.status_code == 201


def test_without_a_page_nobody_is_shown_the_way_in(closed_client: TestClient) -> None:
    for path in ("/ui", "/ui/", "/ui/login"):
        got = closed_client.get(path, follow_redirects=False)
        assert (got.status_code, path) == (404 if path == "/ui/login" else 401, path)


def test_there_are_no_websockets(open_client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), open_client.websocket_connect("/v1/predictions"):
        pass


@pytest.mark.parametrize("path", sorted(OPEN))
def test_health_may_be_asked_for_without_a_body(closed_client: TestClient, path: str) -> None:
    got = closed_client.head(path)
    assert (got.status_code, got.content) == (200, b"")


def test_a_mistake_of_ours_is_logged_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    client = make()

    def broken(*_: object) -> None:
        raise RuntimeError("a mistake")

    store = client.app.state.shared.store  # type: ignore[attr-defined]
    store.files.uploads = broken
    with caplog.at_level("INFO"):
        got = client.get("/v1/files")
    assert (got.status_code, got.json()["title"]) == (500, "Internal error")
    assert [one.getMessage() for one in caplog.records if one.exc_info] == ["internal error"]
    assert [one.status for one in caplog.records if one.getMessage() == "request"] == [500]  # type: ignore[attr-defined]


def test_cors_is_for_those_who_are_named(make: Make, asked: dict[str, Any]) -> None:
    client = make(tokens=TOKENS, cors_origins=["https://app.example"])
    asking = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    preflight = client.options("/v1/predictions", headers=asking)
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    got = client.get("/v1/predictions", headers=GOOD | {"Origin": "https://app.example"})
    assert got.headers["access-control-allow-origin"] == "https://app.example"
    other = client.options("/v1/predictions", headers=asking | {"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


JSON = {"Content-Type": "application/json"}
INPUT = json.dumps({"image": picture(0), "mask": picture(0)})


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"text"', 400),
        (b"\xff\xfe\x00", 400),
        (b'{"input": {}, "input": {}}', 400),
        (b'{"input": {"prompt": "a", "prompt": "b"}}', 400),
        (b'{"input": {"guidance_scale": NaN}}', 400),
        (b'{"input": {"guidance_scale": Infinity}}', 400),
        (b'{"input": {"seed": ' + b"9" * 5000 + b"}}", 400),
        (b'{"input": ' + b"[" * 9_000 + b"]" * 9_000 + b"}", 400),
        (b'{"input": ' + b'{"a":' * 9_000 + b"1" + b"}" * 9_000 + b"}", 400),
        (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 413),
        (b'{"input": ' + INPUT[:-1].encode() + b', "x": [' + b"[]," * 10_000 + b"1]}}", 413),
        (b'{"input": ' + INPUT[:-1].encode() + b', "x": [' + b'"a",' * 10_000 + b"1]}}", 413),
        (b'{"input": ' + INPUT[:-1].encode() + b', "x": {' + b'"",' * 40_000 + b"1}}}", 413),
        (('{"input": ' + INPUT + "}").encode("utf-16-le"), 400),  # in which values can't be counted
        (b'{"input": ' + INPUT[:-1].encode() + b', "prompt": "' + b'\\\\,\\"[' * 10_000 + b'"}}', 201),
        (b'{"input": {"image": "data:,", "mask": "data:,", "guidance_scale": 1e999}}', 422),
        (b'{"input": {"image": "data:,", "mask": "data:,", "seed": ' + b"9" * 400 + b"}}", 422),
        (b'{"input": {"image": "data:,", "mask": "data:,", "prompt": "\\ud800"}}', 422),
        (b'{"input": {"image": "data:,\\udfff", "mask": "data:,"}}', 422),
        (b'{"version": "\\ud800", "input": ' + INPUT.encode() + b"}", 422),
        (b'{"webhook": "https://a/\\ud800", "input": ' + INPUT.encode() + b"}", 422),
        (b'{"input": ' + INPUT[:-1].encode() + b', "x": ' + b"[" * 500 + b"]" * 500 + b"}}", 201),
        (b'{"input": ' + INPUT[:-1].encode() + b', "\\ud800\\u0000": "\\ud800\\u0000"}}', 201),
        (b'{"input": ' + INPUT[:-1].encode() + b', "prompt": "\\u0000 \\u202e"}}', 201),
    ],
)
def test_hostile_json(open_client: TestClient, body: bytes, status: int) -> None:
    got = open_client.post("/v1/predictions", content=body, headers=JSON)
    assert got.status_code == status
    if status != 201:
        assert {"title", "detail", "status"} <= got.json().keys()
        assert len(got.text) < 2000
    else:
        assert open_client.get(got.json()["urls"]["get"]).status_code == 200
    assert open_client.get("/v1/predictions").status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_only_json_is_read_as_json(open_client: TestClient, kind: str) -> None:
    got = open_client.post("/v1/predictions", content=b'{"input": {}}', headers={"Content-Type": kind})
    assert (got.status_code, got.json()["title"]) == (415, "Unsupported media type")


def test_bodies_are_capped(make: Make) -> None:
    client = make(max_body_bytes=1000, max_upload_bytes=1000)
    assert client.post("/v1/predictions", content=b" " * 1001, headers=JSON).status_code == 413
    assert 'ritocco_requests_refused_total{status="413"} 1.0' in client.get("/metrics").text

    def parts() -> Any:
        for _ in range(1100):
            yield b" "

    assert client.post("/v1/predictions", content=parts(), headers=JSON).status_code == 413
    assert client.post("/v1/predictions", content=b"{" + b" " * 900 + b"}", headers=JSON).status_code == 422
    assert client.post("/v1/files", files={"content": b"x" * (1001 + (1 << 20))}).status_code == 413
    form = {"Content-Type": "multipart/form-data; boundary=b"}

    def endless() -> Any:
        yield b'--b\r\nContent-Disposition: form-data; name="content"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"x" * (1 << 16)

    assert client.post("/v1/files", content=endless(), headers=form).status_code == 413


def test_the_bodies_of_all_requests_are_capped() -> None:
    "Sixteen of the largest are let in, announced or not, and room is made when they are answered."
    body, answered = bytes(1 << 21), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await answered.wait()
        await Response("read")(scope, receive, send)

    limits = BodyLimits(app, most=len(body), most_upload=1, seconds=60, metrics=Metrics())

    async def post(*, announced: bool) -> int:
        headers = [(b"content-length", str(len(body)).encode())] if announced else []
        said: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": body}

        async def send(message: Message) -> None:
            said.append(message)

        scope = {"type": "http", "method": "POST", "path": "/predictions", "headers": headers}
        try:
            await limits(scope, receive, send)
        except ProblemError as problem:
            return problem.status
        return int(said[0]["status"])

    async def run() -> None:
        waiting = [asyncio.create_task(post(announced=bool(i % 2))) for i in range(16)]
        await asyncio.sleep(0)
        assert [await post(announced=one) for one in (True, False)] == [429, 429]
        answered.set()
        assert await asyncio.gather(*waiting) == [200] * 16
        assert await post(announced=True) == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    "prefer", ["wait=x", "wait=-1", "wait=0", "wait=" + "9" * 400, ",,;=", "wait=\u0663".encode()]
)
def test_preferences_that_make_no_sense(open_client: TestClient, asked: dict[str, Any], prefer: Any) -> None:
    got = open_client.post("/v1/predictions", json={"input": asked}, headers={"Prefer": prefer})
    assert got.status_code == 201


@pytest.mark.parametrize("host", ["evil.example/x", "a b", "", "[::1", "x\\y", "\u00e9".encode()])
def test_addresses_are_of_a_host_that_is_one(
    open_client: TestClient, asked: dict[str, Any], host: Any
) -> None:
    got = open_client.post("/v1/predictions", json={"input": asked}, headers={"Host": host})
    if got.status_code == 201:
        assert got.json()["urls"]["get"].startswith("http://testserver:80/v1/predictions/")
    else:
        assert got.status_code == 400


def test_logs_hold_no_secrets(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("ritocco")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        client = make(tokens=TOKENS, outputs="url")
        body = {
            "input": asked | {"prompt": "a secret prompt"},
            "webhook": "https://u:pass@127.0.0.1/?key=hidden",
        }
        held = client.post("/predictions?token=querysecret", json=body, headers=GOOD).json()
        client.get(held["output"][0])
        client.get(held["urls"]["stream"])
        client.post("/predictions", json=body, headers={"Authorization": "Bearer wrong-horse-battery"})
        batcher.by_itself = False
        failed = client.post("/v1/predictions", json={"input": asked}, headers=GOOD).json()
        while (run := batcher.next()).id != failed["id"]:
            pass
        run.fail(FetchError("image: https://cdn.example/capability: the answer is 404"))
        client.get(failed["urls"]["stream"])
        assert "capability" in client.get(failed["urls"]["get"], headers=GOOD).json()["error"]
        client.app.close()  # type: ignore[attr-defined]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    assert {"request", "prediction", "webhook"} <= {line["message"] for line in lines}
    assert [line["status"] for line in lines if line["message"] == "request"][:4] == [200, 200, 200, 401]
    assert "image: https://cdn.example/...: the answer is 404" in [line.get("error") for line in lines]
    secrets = [
        *TOKENS,
        "wrong-horse",
        "secret prompt",
        "querysecret",
        "hidden",
        "pass@",
        "base64",
        "whsec_",
        "capability",
    ]
    secrets += [held["output"][0].split("/")[-2], held["urls"]["stream"].rpartition("/")[2]]
    assert [one for one in secrets if one in text.getvalue()] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": ["short"]}, "at least 16"),
        ({"tokens": ["with space in the middle"]}, "without spaces"),
        ({"tokens": ["\u00e9" * 20]}, "printable ASCII"),
        ({"tokens": "a-text-and-no-list-of-them"}, "list of texts"),
        ({"waiting": 0}, "waiting is 0"),
        ({"retention_s": -1}, "retention_s is -1"),
        ({"retention_s": float("nan")}, "retention_s is nan"),
        ({"retention_s": float("inf")}, "retention_s is inf; it must be at most 315360000, ten years"),
        ({"retention_s": 1e8 * 3600}, "retention_s is 360000000000.0; it must be at most"),
        ({"grace_s": float("inf")}, "grace_s is inf"),
        ({"outputs": "ftp"}, "auto, url or data"),
        ({"public_url": "example.org"}, "must start with http"),
        ({"grace_s": -1}, "grace_s is -1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    assert TOKENS[0] not in repr(Settings(tokens=TOKENS))
    with pytest.raises(RequestError, match=message) as refused:
        Settings(**settings)
    assert not any(token in str(refused.value) for token in settings.get("tokens", []) if len(token) > 1)


def test_token_files(tmp_path: Any) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text(f"# of the web shop\n{TOKENS[0]}\n\n  {TOKENS[1]}  \n", encoding="utf-8")
    assert read_tokens(file) == tuple(TOKENS)
    file.write_text(TOKENS[0], encoding="utf-8-sig")  # as some editors write it
    assert read_tokens(file) == (TOKENS[0],)
    for content in (b"", b"# nothing\n", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(RequestError, match="--token-file"):
            read_tokens(file)
    with pytest.raises(RequestError, match="can't be read"):
        read_tokens(tmp_path / "nowhere")
