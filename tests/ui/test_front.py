"""Ways into the server through Gradio, as they were tried: its other routes, its files, made-up calls."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from page_client import Browser, Make, file_data
from ritocco.ui.room import Room

SECRET = "not for the page"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the server's, beside the data folder."""
    file = tmp_path / "secret.png"
    file.write_text(SECRET, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/info"),
        ("GET", "/openapi.json"),
        ("GET", "/user"),
        ("GET", "/token"),
        ("GET", "/app_id"),
        ("GET", "/dev/reload"),
        ("GET", "/runs"),
        ("GET", "/run-history/records"),
        ("GET", "/deep_link?session_hash=abc"),
        ("GET", "/custom_component/x/client/component/index.js"),
        ("GET", "/proxy=https://x.hf.space/file=a"),
        ("GET", "/file/etc/passwd"),
        ("GET", "/stream/abc/1/2/playlist.m3u8"),
        ("GET", "/call/run/abc"),
        ("GET", "/vibe-code/"),
        ("GET", "/queue/status"),
        ("POST", "/run/predict"),
        ("POST", "/api/predict"),
        ("POST", "/call/run"),
        ("POST", "/call/v2/run"),
        ("POST", "/stream/abc"),
        ("POST", "/process_recording"),
        ("POST", "/vibe-edit/"),
        ("POST", "/vibe-code/"),
        ("POST", "/run-history/connect"),
        ("POST", "/mcp/"),
    ],
)
def test_gradios_other_routes_are_not_there(open_client: TestClient, method: str, path: str) -> None:
    client = open_client
    for prefix in ("/ui/gradio_api", "/ui"):
        got = client.request(method, f"{prefix}{path}", json={} if method == "POST" else None)
        assert (got.status_code, got.json()["title"]) == (404, "Not found")


@pytest.mark.parametrize(
    "path",
    ["/ui/login_check", "/ui/monitoring", "/ui/svelte/x", "/ui/robots.txt", "/ui/docs", "/ui/redoc", "/docs"],
)
def test_nor_are_its_pages(open_client: TestClient, path: str) -> None:
    assert open_client.get(path).status_code == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_not_there(open_client: TestClient, method: str) -> None:
    assert open_client.request(method, "/ui/").status_code == 404


def test_no_file_of_the_servers_is_served(make: Make, tmp_path: Path, secret: Path, photo: bytes) -> None:
    client = make()
    browser = Browser(client)
    ours = Path(browser.upload(photo))
    assert ours.is_relative_to(tmp_path / "data" / "ui")
    got = client.get(f"/ui/gradio_api/file={ours}")
    assert (got.status_code, got.content) == (200, photo)
    assert got.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert got.headers["x-content-type-options"] == "nosniff"
    link = ours.parent / "link.png"
    link.symlink_to(secret)
    room = ours.parent.parent
    for path in (
        secret,
        link,
        f"{room}/../../secret.png",
        f"{room}/%2e%2e/%2e%2e/secret.png",
        f"{room}/..%2f..%2fsecret.png",
        f"{room}/..%252f..%252fsecret.png",
        f"/{secret}",
        f"//{secret}",
        f"{room}//..//..//secret.png",
        f"{room}/..\\..\\secret.png",
        f"file://{secret}",
        f"file:{secret}",
        room,
        room / "none.png",
        tmp_path / "data" / "ritocco.sqlite",
        "ritocco.sqlite",
        "pyproject.toml",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/stdin",
        f"{ours}%00.png",
        "https://example.com/x.png",
        "http:/localhost/v1/predictions",
    ):
        for spelled in (f"/ui/gradio_api/file={path}", f"/ui/gradio_api//file={path}"):
            got = client.get(spelled)
            assert got.status_code == 404, spelled
            assert SECRET not in got.text
    for path in (
        f"../../../../../..{secret}",
        f"..%2f..%2f..%2f..{secret}",
        "x/../../../routes.py",
        f"/{secret}",
    ):
        for root in ("assets", "static"):
            got = client.get(f"/ui/{root}/{path}")
            assert got.status_code in (403, 404), path
            assert SECRET not in got.text


def test_what_is_no_picture_is_not_shown_as_a_page(open_client: TestClient) -> None:
    client = open_client
    for name in ("a.html", "a.svg", "a.js"):
        path = Browser(client).upload(b"<svg onload=alert(1)>", name)
        got = client.get(f"/ui/gradio_api/file={path}")
        assert got.headers["content-disposition"].startswith("attachment")
        assert "sandbox" in got.headers["content-security-policy"]


@pytest.mark.parametrize(
    "name", ["../../x.png", "/etc/x.png", "..", "a/b.png", "x" * 500 + ".png", "\u202e.png", ""]
)
def test_uploads_stay_in_their_folder(make: Make, tmp_path: Path, name: str, photo: bytes) -> None:
    client = make()
    before = {file for file in tmp_path.rglob("*") if file.is_file() and "ui" not in file.parts}
    got = client.post("/ui/gradio_api/upload", files={"files": (name, photo)})
    if got.status_code == 200:
        (path,) = got.json()
        assert Path(path).resolve().is_relative_to(tmp_path / "data" / "ui")
    assert {file for file in tmp_path.rglob("*") if file.is_file() and "ui" not in file.parts} == before


def test_uploads_have_a_limit(make: Make, tmp_path: Path) -> None:
    client = make(max_upload_bytes=10_000)
    got = client.post("/ui/gradio_api/upload", files={"files": ("a.png", bytes(20_000))})
    assert got.status_code == 413
    got = client.post("/ui/gradio_api/upload", files={"files": ("a.png", bytes(3 << 20))})
    assert got.status_code == 413
    assert not [file for file in (tmp_path / "data" / "ui").rglob("*") if file.stat().st_size > 10_000]


FILES: list[Any] = [
    "/etc/passwd",
    "SECRET",
    "http://127.0.0.1:1/x.png",
    "https://example.com/x.png",
    "file:///etc/passwd",
    "data:image/png;base64,aGVsbG8=",
    "../secret.png",
    "",
    7,
    None,
    ["x"],
]


@pytest.mark.parametrize("named", FILES)
@pytest.mark.parametrize("where", ["picture", "mask", "layer", "background", "nested", "bare", "url"])
def test_calls_name_files_of_the_page_alone(
    open_client: TestClient,
    secret: Path,
    photo: bytes,
    monkeypatch: pytest.MonkeyPatch,
    named: Any,
    where: str,
) -> None:
    """Neither a path of the server's nor a URL, wherever in a call it stands."""
    client = open_client
    browser = Browser(client)
    fetched: list[Any] = []
    for name in ("save_url_to_cache", "async_save_url_to_cache", "async_ssrf_protected_download"):
        monkeypatch.setattr(
            f"gradio.processing_utils.{name}", lambda *a, **k: fetched.append(a), raising=False
        )
    path = str(secret) if named == "SECRET" else named
    file, ours = file_data(path), file_data(browser.upload(photo))
    nothing: dict[str, Any] = {"background": None, "layers": [], "composite": None, "id": None}
    calls: dict[str, tuple[str, list[Any], str]] = {
        "picture": ("picture", [file], "change"),
        "mask": ("load", [ours, nothing, file], "upload"),
        "layer": ("invert", [ours, nothing | {"layers": [file]}], "click"),
        "background": ("invert", [ours, nothing | {"background": file}], "click"),
        "nested": ("invert", [ours, nothing | {"x": [[{"y": file}]]}], "click"),
        "bare": ("picture", [{"path": path}], "change"),
        "url": ("picture", [ours | {"url": path, "path": path}], "change"),
    }
    got = browser.join(*calls[where])
    assert (got.status_code, got.json()["title"]) == (404, "Not found")
    assert not fetched


def test_another_servers_file_is_missed_in_words(make: Make, tmp_path: Path, photo: bytes) -> None:
    """As behind a balancer that sends a person here and there; the page shows the detail."""
    here, there = Browser(make()), Browser(make(data=tmp_path / "other"))
    picture = file_data(here.upload(photo))
    assert here.join("picture", [picture], "change").status_code == 200
    got = there.join("picture", [picture], "change")
    assert got.status_code == 404
    assert "The file is not at this server any more, or never was: load it again." in got.json()["detail"]


def test_a_url_beside_a_file_of_ours_is_not_believed(open_client: TestClient, photo: bytes) -> None:
    browser = Browser(open_client)
    file = file_data(browser.upload(photo), url="http://127.0.0.1:1/x.png", is_stream=True, mime_type="x/y")
    edited = browser.call("picture", [file], "change")[0]
    assert edited["background"]["url"].startswith("http://localhost/ui/gradio_api/file=/")


@pytest.mark.parametrize(
    "changes",
    [
        {"fn_index": 10_000},
        {"fn_index": -1},
        {"fn_index": "run"},
        {"fn_index": None},
        {"data": None},
        {"data": {}},
        {"data": []},
        {"data": [None] * 100},
        {"session_hash": None},
        {"session_hash": "../x"},
        {"session_hash": "x" * 65},
        {"trigger_id": "x"},
    ],
)
def test_made_up_calls_do_nothing(open_client: TestClient, changes: dict[str, Any]) -> None:
    client = open_client
    browser = Browser(client)
    got = browser.join("run", browser.defaults(), **changes)
    if got.status_code == 200:
        last = list(browser.messages())[-1]
        assert not last["success"] or "input.image is missing" in json.dumps(last["output"])
    else:
        assert 400 <= got.status_code < 500, got.text
    assert client.get("/v1/predictions").json()["results"] == []
    assert client.get("/ui/").status_code == 200, "it goes on"


def test_calls_run_as_nobody_else(open_client: TestClient, photo: bytes) -> None:
    """Keys that Gradio has for other purposes are dropped."""
    browser = Browser(open_client)
    got = browser.join(
        "picture",
        [file_data(browser.upload(photo))],
        "change",
        oauth_token="x",
        batched=True,
        simple_format=True,
        event_id="x",
        request={"headers": {}},
    )
    assert got.status_code == 200
    assert [one for one in browser.messages() if one["msg"] == "process_completed"][-1]["success"]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b'{"data": [], "data": []}', b'{"data": [NaN]}', b"[" * 100_000]
)
def test_what_is_no_call_is_refused(open_client: TestClient, body: bytes) -> None:
    got = open_client.post(
        "/ui/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"}
    )
    assert got.status_code == 400


@pytest.mark.parametrize("depth", [20, 900, 5000])
@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
def test_what_is_nested_too_deeply_is_refused(
    open_client: TestClient, opened: str, closed: str, depth: int
) -> None:
    values = ["null"] * len(Browser(open_client).function("run")["inputs"])
    values[2] = opened * depth + "1" + closed * depth
    number = Browser(open_client).function("run")["id"]
    body = f'{{"data": [{",".join(values)}], "fn_index": {number}, "session_hash": "abc"}}'
    headers = {"Content-Type": "application/json"}
    got = open_client.post("/ui/gradio_api/queue/join", content=body, headers=headers)
    assert (got.status_code, got.json()["title"]) == (400, "Malformed JSON")
    assert "nested too deeply" in got.json()["detail"]


def test_a_call_of_another_type_or_size_is_refused(open_client: TestClient) -> None:
    client = open_client
    url = "/ui/gradio_api/queue/join"
    assert client.post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post(url, json={"data": ["x" * (2 << 20)]}).status_code == 413
    assert client.post("/ui/gradio_api/upload", json={}).status_code == 415
    assert client.post("/ui/gradio_api/cancel", data={}).status_code == 415


def test_the_room_keeps_what_was_used_last(tmp_path: Path) -> None:
    room = Room(tmp_path, most_bytes=1 << 20)

    times = itertools.count()

    def put(name: str, size: int) -> Path:
        file = room.path / name / "image.png"
        file.parent.mkdir()
        file.write_bytes(bytes(size))
        now = next(times)
        os.utime(file, (now, now))
        return file

    first, second, third = (put(name, 400 << 10) for name in "abc")
    room.inside(str(first))
    room.trim()
    assert [file.exists() for file in (first, second, third)] == [True, False, True]
    assert not second.parent.exists()
    assert first.stat().st_mtime == 0, "it does not stay for longer than it may"
    many = [put(f"small{number}", 1) for number in range(100)]
    room.trim()
    assert [file.exists() for file in many].count(True) == 9, "small ones count too"
    assert first.exists()
    room.close()


def test_uploads_beyond_the_room_push_out_the_oldest(make: Make, tmp_path: Path) -> None:
    client = make(max_upload_bytes=1 << 20)
    browser = Browser(client)
    size = (1 << 20) - 1000
    paths = [Path(browser.upload(bytes([number]) * size, "x.png")) for number in range(40)]
    assert not paths[0].exists()
    assert paths[-1].exists()
    held = sum(file.stat().st_size for file in (tmp_path / "data" / "ui").rglob("*") if file.is_file())
    assert held <= 33 << 20


def test_the_editors_own_function_is_not_there(open_client: TestClient) -> None:
    """It would keep in memory what is sent to it."""
    form = {
        "fn_name": "accept_blobs",
        "component_id": "0",
        "session_hash": "abc",
        "type": "layer",
        "index": "0",
    }
    url = "/ui/gradio_api/component_server"
    got = open_client.post(url, data=form, files={"file": ("blob", b"x", "image/png")})
    assert got.status_code == 404


def test_what_people_sent_goes(make: Make, tmp_path: Path, photo: bytes) -> None:
    client = make(retention_s=60)
    browser = Browser(client)
    old, new = Path(browser.upload(photo, "old.jpg")), Path(browser.upload(photo + b"x", "new.jpg"))
    os.utime(old, (1, 1))
    os.utime(old.parent, (1, 1))
    app: Any = client.app
    (room,) = app._parts.rooms
    room.clean(60)
    assert not old.exists()
    assert new.exists()
    app.close()
    assert not (tmp_path / "data" / "ui").exists()


def test_another_start_leaves_nothing_of_the_last(make: Make, tmp_path: Path) -> None:
    left = tmp_path / "data" / "ui" / "left.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    make()
    assert not left.exists()
    assert left.parent.stat().st_mode & 0o777 == 0o700


def test_streams_end_with_the_server(make: Make) -> None:
    """Or a stopping server would wait for every page that is open."""
    client = make()
    ended = threading.Event()
    begun = threading.Event()

    def listen() -> None:
        with client.stream("GET", "/ui/gradio_api/heartbeat/abc") as got:
            for line in got.iter_lines():
                assert line in ("data: ALIVE", "")
                begun.set()
        ended.set()

    thread = threading.Thread(target=listen)
    thread.start()
    client.app.begin_stop()  # type: ignore[attr-defined]
    assert ended.wait(30)
    thread.join()
