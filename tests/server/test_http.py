"""The app behind uvicorn: slow, broken and many connections, and clients that leave."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import uvicorn

from hand_batcher import HandBatcher, Make

Serve = Callable[..., str]


@pytest.fixture
def serve(make: Make) -> Iterator[Serve]:
    """Runs an app with these settings on a free port: its URL."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def call(**settings: Any) -> str:
        ready = threading.Event()

        class Server(uvicorn.Server):
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                ready.set()

        limit: dict[str, Any] = {"h11_max_incomplete_event_size": 32 << 10}
        config = uvicorn.Config(
            make(**settings).app, port=0, log_config=None, http="h11", lifespan="off", **limit
        )
        server = Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        assert ready.wait(30)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield call
    for server, thread in running:
        server.should_exit = server.force_exit = True
        thread.join(30)


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and the rest; (0, b"") where the server hung up."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            got += part
    return (int(got.split()[1]), got) if got else (0, b"")


def head(length: object, kind: str = "application/json", path: str = "/v1/predictions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Type: {kind}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize("path", ["/v1/predictions", "/v1/files"])
def test_a_body_that_does_not_come(serve: Serve, path: str) -> None:
    url = serve(body_timeout_s=0.2)
    kind = "application/json" if "predictions" in path else "multipart/form-data; boundary=b"
    with connect(url) as slow:
        slow.sendall(head(100, kind, path) + b"--"[: 1 if "files" in path else 2])
        status, got = answer(slow)
    assert status == 408
    assert b"not here in full within 0.2 seconds" in got
    assert httpx.get(f"{url}/livez").status_code == 200


def test_a_body_that_ends_early(serve: Serve, batcher: HandBatcher) -> None:
    url = serve()
    with connect(url) as broken:
        broken.sendall(head(1000) + b'{"input": {}}')
        broken.shutdown(socket.SHUT_WR)
        answer(broken)
    assert httpx.get(f"{url}/v1/predictions").json()["results"] == []
    assert batcher.seen == []


@pytest.mark.parametrize("length", [-1, "x", "1e3", "9" * 500, "1, 2"])
def test_lengths_that_are_none(serve: Serve, length: object) -> None:
    with connect(serve()) as broken:
        broken.sendall(head(length) + b"{}")
        broken.shutdown(socket.SHUT_WR)
        assert answer(broken)[0] in (0, 400, 413)


def test_headers_are_capped(serve: Serve) -> None:
    url = serve()
    with connect(url) as loud:
        with contextlib.suppress(OSError):
            loud.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: " + b"x" * (1 << 20) + b"\r\n\r\n")
        assert answer(loud)[0] in (0, 400, 431)
    assert httpx.get(f"{url}/livez").status_code == 200


def test_too_large_a_body_is_refused_before_it_is_sent(serve: Serve) -> None:
    with connect(serve(max_body_bytes=1000)) as large:
        large.sendall(head(1001))
        large.settimeout(30)
        assert large.recv(1 << 16).split()[1] == b"413"


def test_a_prediction_goes_on_when_its_client_leaves(
    serve: Serve, batcher: HandBatcher, asked: dict[str, Any]
) -> None:
    url = serve(by_itself=False)
    body = json.dumps({"input": asked}).encode()
    for path in ("/v1/predictions", "/predictions"):
        with connect(url) as gone:
            request = head(len(body), path=path).replace(b"\r\n\r\n", b"\r\nPrefer: wait\r\n\r\n")
            gone.sendall((request if "v1" in path else head(len(body), path=path)) + body)
            run = batcher.next()
        run.step(1, 2)
        assert not run.canceled
        run.succeed()
        held = httpx.get(f"{url}/v1/predictions/{run.id}").json()
        httpx.get(held["urls"]["stream"])
        assert httpx.get(f"{url}/v1/predictions/{run.id}").json()["status"] == "succeeded"


def test_many_may_wait_while_others_are_answered(
    serve: Serve, batcher: HandBatcher, asked: dict[str, Any]
) -> None:
    """More than there are threads."""
    url = serve(by_itself=False)
    with ThreadPoolExecutor(45) as pool, httpx.Client(limits=httpx.Limits(max_connections=None)) as client:

        def create(_: int) -> str:
            made = client.post(f"{url}/predictions", json={"input": asked}, timeout=60)
            return str(made.json()["status"])

        waiting = [pool.submit(create, number) for number in range(45)]
        runs = [batcher.next() for _ in waiting]
        assert httpx.get(f"{url}/health-check", timeout=30).json()["status"] == "READY"
        for run in runs:
            run.succeed()
        assert {one.result() for one in waiting} == {"succeeded"}


def test_idle_connections(serve: Serve) -> None:
    url = serve()
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(url)).sendall(b"GET /livez HTTP/1.1\r\n")
        assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200


def test_the_stream_is_live(serve: Serve, batcher: HandBatcher, asked: dict[str, Any]) -> None:
    url = serve(by_itself=False, outputs="url")
    made = httpx.post(f"{url}/v1/predictions", json={"input": asked}).json()
    run = batcher.next()
    with httpx.stream("GET", made["urls"]["stream"], timeout=30) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith(("event", "data")))
        for done in (1, 2):
            run.step(done, 2)
            assert next(lines) == "event: logs"
            while "it/s" not in (line := next(lines)):
                assert line == "data: Using seed: 7"
            assert f"| {done}/2 [" in line
        run.succeed()
        assert next(lines) == "event: output"
        assert next(lines).startswith(f"data: {url}/v1/outputs/")
        assert list(lines) == ["event: done", "data: {}"]


def test_a_client_that_does_not_read_is_given_up(
    serve: Serve, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritocco.server.app.SEND_TIMEOUT_S", 2.0)
    given_up = threading.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "without completing response" in record.getMessage():
                given_up.set()

    url = serve(by_itself=False)
    large = asked | {"image": "data:image/png;base64," + "A" * (24 << 20)}
    made = httpx.post(f"{url}/v1/predictions", json={"input": large}, timeout=60).json()
    logger, handler = logging.getLogger("uvicorn.error"), Watch()
    logger.addHandler(handler)
    try:
        with connect(url) as idle:
            idle.sendall(f"GET /v1/predictions/{made['id']} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert given_up.wait(60)
            status, got = answer(idle)
    finally:
        logger.removeHandler(handler)
    assert (status, b"Internal" in got) == (200, False)
    assert len(got) < len(large["image"])


def test_a_stop_lets_go_of_streams_and_waits(
    serve: Serve, make: Make, batcher: HandBatcher, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make(by_itself=False)
    app: Any = client.app
    answers: list[Any] = []

    def wait() -> None:
        answers.append(client.post("/predictions", json={"input": asked}).json()["status"])

    thread = threading.Thread(target=wait)
    thread.start()
    batcher.next()
    app.begin_stop()
    thread.join(30)
    assert answers == ["starting"]
