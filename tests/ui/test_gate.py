"""Who gets to the page: tokens once, sessions after that, other sites never."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from page_client import TOKEN, Make
from ritocco.server.sessions import COOKIE, Sessions, Tokens

CALL = {"data": [], "fn_index": 0, "session_hash": "abc"}
ROUTES = [
    ("GET", "/ui/"),
    ("GET", "/ui/config"),
    ("GET", "/ui/assets/x.js"),
    ("GET", "/ui/static/x"),
    ("GET", "/ui/gradio_api/file=/etc/passwd"),
    ("GET", "/ui/gradio_api/heartbeat/abc"),
    ("GET", "/ui/gradio_api/queue/data?session_hash=abc"),
    ("POST", "/ui/gradio_api/queue/join"),
    ("POST", "/ui/gradio_api/upload"),
    ("GET", "/ui/nothing"),
]


def logged_in(client: Any, token: str = TOKEN) -> Any:
    return client.post("/ui/login", data={"token": token}, follow_redirects=False)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_a_session_every_route_is_closed(closed_client: TestClient, method: str, path: str) -> None:
    client = closed_client
    for cookie in ("", f"{COOKIE}=x", f"{COOKIE}={TOKEN}", f"other={TOKEN}", f"{COOKIE}=", "x"):
        got = client.request(method, path, headers={"Cookie": cookie}, follow_redirects=False)
        if (method, path) == ("GET", "/ui/"):
            assert (got.status_code, got.headers["location"]) == (303, "login")
        else:
            assert got.status_code == 401
            assert "The session has ended, or is another server's" in got.json()["detail"]


def test_a_token_opens_the_page_and_nothing_else(make: Make) -> None:
    client = make(tokens=[TOKEN])
    form = client.get("/ui/", follow_redirects=True)
    assert (form.status_code, form.url.path) == (200, "/ui/login")
    assert '<label for="token">' in form.text
    assert "default-src 'none'" in form.headers["content-security-policy"]
    got = logged_in(client)
    assert (got.status_code, got.headers["location"]) == (303, "./")
    cookie = got.headers["set-cookie"]
    assert TOKEN not in cookie
    parts = [part.strip() for part in cookie.split(";")]
    assert {"HttpOnly", "Path=/ui", "SameSite=strict", "Max-Age=43200"} <= set(parts)
    assert "Secure" not in parts, "it came by http"
    assert client.get("/ui/").status_code == 200
    # httpx sends it under /ui alone; a client that sends it elsewhere gets nothing for it.
    value = client.cookies[COOKIE]
    sent = {"Cookie": f"{COOKIE}={value}"}
    for path in ("/v1/predictions", "/predictions", "/metrics", "/openapi.json", "/uix", "/ui/../v1/files"):
        assert client.get(path, headers=sent).status_code in (401, 404), path
    assert client.post("/v1/predictions", json={"input": {}}, headers=sent).status_code == 401
    assert client.get("/v1/predictions", headers={"Authorization": f"Bearer {value}"}).status_code == 401


@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], f"{TOKEN}x", "\x00", "a" * 5000])
def test_what_is_no_token_opens_nothing(closed_client: TestClient, token: str) -> None:
    client = closed_client
    got = logged_in(client, token)
    assert got.status_code == 401
    assert 'role="alert"' in got.text
    assert "set-cookie" not in got.headers
    assert client.get("/ui/config").status_code == 401


def test_leaving_closes_the_session(make: Make) -> None:
    client = make(tokens=[TOKEN])
    logged_in(client)
    value = client.cookies[COOKIE]
    assert client.get("/ui/config").status_code == 200
    assert client.post("/ui/logout", follow_redirects=False).headers["location"] == "login"
    assert client.get("/ui/config", headers={"Cookie": f"{COOKIE}={value}"}).status_code == 401


@pytest.mark.parametrize(
    "settings", [{"base_url": "https://localhost"}, {"public_url": "https://paint.example/tools"}]
)
def test_over_https_the_cookie_keeps_to_it(make: Make, settings: Any) -> None:
    cookie = logged_in(make(tokens=[TOKEN], **settings)).headers["set-cookie"]
    assert "Secure" in cookie
    assert f"Path={'/tools' if 'public_url' in settings else ''}/ui" in cookie


@pytest.mark.parametrize("kind", ["open_client", "closed_client"])
@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost:5001",
        "http://localhost.evil.example",
        "http://evil.example/localhost",
        "http://localhost@evil.example",
        "ftp://localhost",
        "localhost",
        "http://[",
        "",
    ],
)
def test_other_sites_pages_may_nothing(kind: str, origin: str, request: pytest.FixtureRequest) -> None:
    """Not even where the API lets them."""
    client = request.getfixturevalue(kind)
    value = logged_in(client).cookies.get(COOKIE)
    client.cookies.clear()
    headers = {"Origin": origin, "Cookie": f"{COOKIE}={value}"}
    for method, path in (*ROUTES, ("POST", "/ui/login"), ("POST", "/ui/logout")):
        got = client.request(method, path, headers=headers, follow_redirects=False)
        assert got.status_code == 403, path


def test_the_pages_own_origin_may_call(open_client: TestClient) -> None:
    client = open_client
    for base in ("http://localhost", "http://127.0.0.1:5000", "http://[::1]:5000"):
        headers = {"Origin": base, "Host": base.partition("://")[2]}
        got = client.post("/ui/gradio_api/queue/join", json=CALL, headers=headers)
        assert got.status_code != 403, base
        assert "access-control-allow-origin" not in got.headers
    # For the API it is as good as another site's.
    assert client.post("/v1/predictions", json={}, headers={"Origin": "http://localhost"}).status_code == 403


def test_behind_a_proxy_the_public_origin_is_its_own(make: Make) -> None:
    client = make(public_url="https://paint.example")
    headers = {"Origin": "https://paint.example"}
    assert client.post("/ui/gradio_api/queue/join", json=CALL, headers=headers).status_code != 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", ""])
def test_without_tokens_it_answers_to_known_names(open_client: TestClient, host: str) -> None:
    """Another site can make its own name point to this machine, and then the origin is that name."""
    client = open_client
    got = client.get("/ui/config", headers={"Host": host})
    assert got.status_code == 400
    got = client.post(
        "/ui/gradio_api/queue/join", json=CALL, headers={"Host": host, "Origin": f"http://{host}"}
    )
    assert got.status_code in (400, 403)
    assert client.get("/ui/config", headers={"Host": "127.0.0.1:1"}).status_code == 200


def test_sessions_end() -> None:
    now = [0.0]
    sessions = Sessions(Tokens([TOKEN]), seconds=10, clock=lambda: now[0])
    first = sessions.open(TOKEN)
    assert first is not None
    assert sessions.admit(first)
    now[0] = 9.9
    assert sessions.admit(first)
    now[0] = 10.0
    assert not sessions.admit(first)
    values = [sessions.open(TOKEN) for _ in range(1001)]
    assert len({*values}) == 1001
    assert not sessions.admit(values[0]), "the first of more than a thousand"
    assert sessions.admit(values[1])
    assert sessions.open("x") is None
    for none in (None, "", "x", "x" * 300):
        assert not sessions.admit(none)
