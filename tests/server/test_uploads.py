"""Files: uploads, their use as inputs, and names that lead nowhere."""

from __future__ import annotations

import errno
import json
import tempfile
from typing import Any

import pytest
from starlette.testclient import TestClient

from hand_batcher import HandBatcher, Make, picture
from ritocco.server.gate import PREFIXES


@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_uploads_life(make: Make, prefix: str) -> None:
    client = make()
    parts: dict[str, Any] = {
        "content": ("mask.png", b"\x89PNG picture", "image/png"),
        "metadata": (None, '{"a": 1}', "application/json"),
    }
    made = client.post(f"{prefix}/files", files=parts)
    assert made.status_code == 201
    held = made.json()
    assert (held["name"], held["content_type"], held["size"]) == ("mask.png", "image/png", 12)
    assert held["metadata"] == {"a": 1}
    assert held["expires_at"] > held["created_at"]
    assert len(held["checksums"]["sha256"]) == 64
    assert held["urls"]["get"] == f"http://testserver{prefix}/files/{held['id']}"
    assert client.get(held["urls"]["get"]).json() == held
    assert client.get(f"{prefix}/files").json()["results"] == [held]
    gone = client.delete(held["urls"]["get"])
    assert (gone.status_code, gone.content) == (204, b"")
    assert client.get(held["urls"]["get"]).status_code == 404
    assert client.delete(held["urls"]["get"]).status_code == 404


def test_metadata_may_be_a_file(make: Make) -> None:
    """As JavaScript's client sends it."""
    parts: Any = {"content": ("blob_1", b"x"), "metadata": ("blob", b'{"b": 2}', "application/json")}
    assert make().post("/v1/files", files=parts).json()["metadata"] == {"b": 2}


@pytest.mark.parametrize(
    "address",
    [
        "http://testserver/v1/files/{}",
        "https://other.example:8443/any/prefix/v1/files/{}",
        "http://10.0.0.1/files/{}?a=b",
    ],
)
def test_an_upload_is_an_input(make: Make, asked: dict[str, Any], batcher: HandBatcher, address: str) -> None:
    """Under whatever name the server was reached; it need not reach itself."""
    client = make()
    data = b"\x89PNG mine"
    made = client.post("/v1/files", files={"content": ("image.png", data)}).json()
    given = asked | {"image": address.format(made["id"])}
    held = client.post("/predictions", json={"input": given}).json()
    assert (held["status"], held["input"]) == ("succeeded", given)
    assert batcher.seen[0].input["image"] == "data:image/png;base64,iVBORyBtaW5l"


def test_an_output_is_an_input(make: Make, asked: dict[str, Any], batcher: HandBatcher) -> None:
    client = make(outputs="url")
    first = client.post("/predictions", json={"input": asked}).json()
    client.post("/predictions", json={"input": asked | {"image": first["output"][0]}})
    assert batcher.seen[1].input["image"] == picture(0)


def test_an_address_of_no_file_is_left_as_it_is(
    make: Make, asked: dict[str, Any], batcher: HandBatcher
) -> None:
    client = make()
    given = asked | {"image": "http://testserver/v1/files/" + "a" * 26}
    client.post("/predictions", json={"input": given})
    assert batcher.seen[0].input["image"] == given["image"]


def test_uploads_are_not_open_as_outputs_are(make: Make) -> None:
    client = make()
    made = client.post("/v1/files", files={"content": ("image.png", b"x")}).json()
    assert client.get(f"/v1/outputs/{made['id']}/image.png").status_code == 404


def test_outputs_are_not_files_of_clients(make: Make, asked: dict[str, Any]) -> None:
    client = make(outputs="url")
    held = client.post("/predictions", json={"input": asked}).json()
    id = held["output"][0].split("/")[-2]
    assert client.get(f"/v1/files/{id}").status_code == 404
    assert client.delete(f"/v1/files/{id}").status_code == 404
    assert client.get(held["output"][0]).status_code == 200


@pytest.mark.parametrize(
    ("parts", "status", "field"),
    [
        ({"other": ("a", b"x")}, 422, "content"),
        ({"content": (None, "text")}, 422, "content"),
        ({"content": ("a", b"x"), "metadata": (None, "[]")}, 422, "metadata"),
        ({"content": ("a", b"x"), "metadata": (None, "{")}, 422, "metadata"),
        ({"content": ("a", b"x"), "metadata": ("m", b"[" * 9000)}, 422, "metadata"),
        ({"content": ("a", b"x"), "metadata": ("m", b'{"a":"' + b"x" * 20000 + b'"}')}, 422, "metadata"),
        ({"content": ("a", b"x" * 101)}, 413, None),
    ],
)
def test_uploads_that_are_refused(make: Make, parts: Any, status: int, field: str | None) -> None:
    got = make(max_upload_bytes=100).post("/v1/files", files=parts)
    assert got.status_code == status
    assert [one["field"] for one in got.json().get("invalid_fields", [])] == (
        [] if field is None else [field]
    )


@pytest.mark.parametrize(
    "metadata",
    [
        '{"a": "\\ud800"}',
        '{"\\udfff": 1}',
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": 1, "a": 2}',
        '{"a":' * 300 + "1" + "}" * 300,
        '{"a":' + "[" * 20 + "]" * 20 + "}",
        '{"a":' + "9" * 400 + "}",
    ],
)
def test_metadata_that_no_list_could_show(make: Make, metadata: str) -> None:
    client = make()
    got = client.post("/v1/files", files={"content": ("a", b"x"), "metadata": (None, metadata)})
    assert (got.status_code, got.json()["invalid_fields"][0]["field"]) == (422, "metadata")
    assert client.get("/v1/files").json()["results"] == []


@pytest.mark.parametrize("metadata", ['{"a": "\\ud800"}', '{"a": Infinity}', '{"a":' * 300 + "1" + "}" * 300])
def test_no_row_breaks_the_list(make: Make, metadata: str) -> None:
    """Whoever wrote it."""
    client = make()
    files = client.app.state.shared.store.files  # type: ignore[attr-defined]
    files.record(files.write(b"x", name="a", content_type="b", metadata=metadata))
    assert len(client.get("/v1/files").json()["results"]) == 1


def test_uploads_of_another_type(open_client: TestClient) -> None:
    assert open_client.post("/v1/files", json={}).status_code == 415
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    assert open_client.post("/v1/files", content=b"nothing", headers=broken).status_code in (400, 422)
    assert (
        open_client.post(
            "/v1/files", content=b"", headers={"Content-Type": "multipart/form-data"}
        ).status_code
        == 400
    )


def test_a_charset_that_decodes_nothing(open_client: TestClient) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="content"; filename="\xff"\r\n\r\nx\r\n--b--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=b; charset=undefined"}
    assert open_client.post("/v1/files", content=body, headers=kind).status_code == 400


def test_no_room_for_a_large_part(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    client = make()
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nowhere")
    got = client.post("/v1/files", files={"content": ("a", b"x" * (2 << 20))})
    assert (got.status_code, got.json()["title"]) == (507, "Insufficient storage")


def test_a_disk_that_refuses_is_not_ready(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    client = make()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("ritocco.server.contents.write_whole", full)
        assert client.post("/v1/files", files={"content": ("a", b"x")}).status_code == 507
        got = client.get("/readyz")
        assert (got.status_code, got.json()["status"]) == (503, "storage")
        assert client.get("/health-check").json()["status"] == "DEFUNCT"
    assert client.get("/readyz").status_code == 200
    store = client.app.state.shared.store  # type: ignore[attr-defined]
    assert not list(store.files.path(store.files.write(b"", name="", content_type="")).parent.iterdir())[1:]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a\0b", "/etc/passwd", "..\\x", "\u732b.png", "x" * 3000]
)
def test_names_are_for_show_only(make: Make, name: str, tmp_path: Any) -> None:
    client = make()
    body = (
        b'--b\r\nContent-Disposition: form-data; name="content"; filename="'
        + name.encode()
        + b'"\r\n\r\nx\r\n--b--\r\n'
    )
    made = client.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert made.status_code in (201, 400)
    if made.status_code == 201:
        held = made.json()
        assert len(held["name"]) <= 200
        assert held["name"].isprintable()
        json.dumps(held).encode("ascii")
        assert [path.name for path in (tmp_path / "data" / "files").iterdir()] == [held["id"]]


@pytest.mark.parametrize(
    "id", ["..", "%2e%2e%2fritocco.sqlite", "..%2f..%2fetc%2fpasswd", "a%00b", "%ff", "x" * 5000]
)
def test_ids_lead_nowhere(open_client: TestClient, id: str) -> None:
    for path in (
        f"/v1/files/{id}",
        f"/v1/outputs/{id}/out-0.png",
        f"/v1/predictions/{id}",
        f"/v1/stream/{id}",
    ):
        assert open_client.get(path).status_code in (404, 405)


@pytest.mark.parametrize(
    ("asked_for", "status"),
    [
        ("bytes=1-3", 206),
        ("bytes=-3", 206),
        ("bytes=0-0, 2-2", 206),
        ("bytes=99999-", 416),
        ("bytes=5-2", 200),
        ("bytes=x-y", 200),
        ("bytes", 200),
        ("pages=1-2", 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_parts_of_an_output(
    make: Make, asked: dict[str, Any], asked_for: str, status: int, method: str
) -> None:
    """What is no range is passed over, and what begins beyond the end is our kind of problem."""
    client = make(outputs="url")
    (url,) = client.post("/predictions", json={"input": asked}).json()["output"]
    whole = client.get(url)
    got = client.request(method, url, headers={"Range": asked_for})
    assert got.status_code == status
    if status == 416:
        assert got.headers["content-range"] == f"bytes */{len(whole.content)}"
        assert got.headers["content-type"] == "application/json"
        assert method == "HEAD" or got.json()["title"] == "Range not satisfiable"
    elif method == "GET" and "," not in asked_for:
        part = {"bytes=1-3": slice(1, 4), "bytes=-3": slice(-3, None)}.get(asked_for, slice(None))
        assert got.content == whole.content[part]
