"""Connections that send nothing, or half a request: they go, and keep nobody out."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest
import uvicorn

from ritocco.server.connections import limited

Run = Callable[..., tuple[str, int]]
PATIENCE = 60


@pytest.fixture
def held() -> threading.Event:
    """What `/held` waits for."""
    return threading.Event()


@pytest.fixture
def working() -> threading.Semaphore:
    """Released when `/held` begins to wait."""
    return threading.Semaphore(0)


@pytest.fixture
def run(held: threading.Event, working: threading.Semaphore) -> Iterator[Run]:
    """Runs an app with these limits on a free port: host and port."""
    stack = ExitStack()

    async def app(scope, receive, send):  # type: ignore[no-untyped-def]
        if scope["path"] == "/held":
            import asyncio

            working.release()
            await asyncio.to_thread(held.wait, PATIENCE)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def call(most: int, seconds: float) -> tuple[str, int]:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http=limited(most, seconds=seconds),
            lifespan="off",
            log_config=None,
            timeout_keep_alive=PATIENCE,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()

        def end() -> None:
            held.set()
            server.should_exit = server.force_exit = True
            thread.join(PATIENCE)

        stack.callback(end)
        host, port = listener.getsockname()
        return str(host), int(port)

    yield call
    stack.close()


def connect(address: tuple[str, int], stack: ExitStack) -> socket.socket:
    made = stack.enter_context(socket.create_connection(address, timeout=PATIENCE))
    made.settimeout(PATIENCE)
    return made


def closed(connection: socket.socket) -> bool:
    """Waits for its end."""
    try:
        return connection.recv(1000) == b""
    except ConnectionError:
        return True


def answered(connection: socket.socket) -> bool:
    """Waits for the answer, or the end."""
    got = b""
    while not got.endswith(b"ok") and (part := connection.recv(1000)):
        got += part
    return got.endswith(b"ok")


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost:", b"GET / HT"])
def test_half_a_request_is_not_waited_for(run: Run, sent: bytes) -> None:
    with ExitStack() as stack:
        connection = connect(run(100, 0.2), stack)
        connection.sendall(sent)
        assert closed(connection)


def test_half_a_second_request_is_not_waited_for(run: Run) -> None:
    with ExitStack() as stack:
        connection = connect(run(100, 2.0), stack)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answered(connection)
        connection.sendall(b"GET / HTTP/1.1\r\n")
        assert closed(connection)


def test_a_request_that_takes_longer_is_answered(run: Run, held: threading.Event) -> None:
    address = run(100, 2.0)
    with ExitStack() as stack:
        idle, busy = connect(address, stack), connect(address, stack)
        busy.sendall(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
        assert closed(idle), "its time is over"
        held.set()
        assert answered(busy)


def test_idle_connections_keep_nobody_out(
    run: Run, held: threading.Event, working: threading.Semaphore
) -> None:
    address = run(4, PATIENCE)
    with ExitStack() as stack:
        busy = connect(address, stack)
        busy.sendall(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
        assert working.acquire(timeout=PATIENCE)
        for _ in range(30):
            connect(address, stack)
        assert httpx.get(f"http://{address[0]}:{address[1]}/", timeout=PATIENCE).text == "ok"
        held.set()
        assert answered(busy), "a request under way is not let go of"


def test_where_all_work_one_more_is_closed(
    run: Run, held: threading.Event, working: threading.Semaphore
) -> None:
    address = run(2, PATIENCE)
    with ExitStack() as stack:
        busy = [connect(address, stack) for _ in range(2)]
        for one in busy:
            one.sendall(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
            assert working.acquire(timeout=PATIENCE)
        assert closed(connect(address, stack))
        held.set()
        assert all(answered(one) for one in busy)
