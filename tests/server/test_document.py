"""The OpenAPI document: every route is in it, and every answer that it promises is given, and no other."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from starlette.testclient import TestClient

from hand_batcher import HandBatcher, Make
from ritocco.prediction import MODEL
from ritocco.server.app import App
from ritocco.server.database import AwayError, StorageError
from ritocco.server.jobs import Jobs

TOKEN = "correct-horse-battery-staple"
Operation = tuple[str, str]


def operations(document: dict[str, Any]) -> dict[Operation, dict[str, Any]]:
    return {
        (method, path): held
        for path, methods in document["paths"].items()
        for method, held in methods.items()
    }


def endpoints(app: App) -> dict[Operation, str]:
    """The function behind each method and path, by its module and name."""
    routes: list[Any] = []
    for one in app.routes:
        routes += one.original_router.routes if hasattr(one, "original_router") else [one]
    return {
        (method.lower(), one.path): f"{one.endpoint.__module__}.{one.endpoint.__qualname__}"
        for one in routes
        for method in one.methods - {"HEAD"}
    }


def test_every_route_is_described(open_client: TestClient) -> None:
    app: Any = open_client.app
    held, described = endpoints(app), operations(app.openapi())
    assert len(held) > 40
    shown = {function for operation, function in held.items() if operation in described}
    hidden = {operation for operation, function in held.items() if function not in shown}
    assert hidden == {("get", "/openapi.json")}
    assert described.keys() <= held.keys()


def test_the_document_is_valid(make: Make) -> None:
    client = make(tokens=[TOKEN], headers={"Authorization": f"Token {TOKEN}"})
    document = client.get("/openapi.json").json()
    validate(document)
    assert document["security"] == [{"bearer": []}]
    assert document["paths"]["/livez"]["get"]["security"] == []


def test_headers_of_creations(open_client: TestClient) -> None:
    found = {
        operation: {(one["in"], one["name"]) for one in held["parameters"]}
        for operation, held in operations(open_client.get("/openapi.json").json()).items()
        if "example" in str(held.get("requestBody"))
    }
    assert found.keys() == {
        ("post", "/predictions"),
        ("put", "/predictions/{id}"),
        ("post", "/v1/predictions"),
        ("post", "/v1/models/{owner}/{name}/predictions"),
        ("post", "/models/{owner}/{name}/predictions"),
    }
    for names in found.values():
        assert {("header", "Prefer"), ("header", "Idempotency-Key")} <= names


@pytest.mark.parametrize("public", [None, "https://there/tools"])
def test_where_it_is_served(make: Make, public: str | None) -> None:
    app = FastAPI()
    app.mount("/tools/inpaint", make(public_url=public).app)
    client = TestClient(app, base_url="http://here")
    base = public or "http://here/tools/inpaint"
    version = client.get(f"/tools/inpaint/v1/models/{MODEL}/versions/{HandBatcher.version}").json()
    for document in (client.get("/tools/inpaint/openapi.json").json(), version["openapi_schema"]):
        assert document["servers"] == [{"url": base}]


class Caller:
    """Calls operations of one app, well-formed but for what a test twists."""

    def __init__(self, client: TestClient, document: dict[str, Any]) -> None:
        self.client, self.document = client, document
        self._numbers = itertools.count()

    def call(
        self,
        operation: Operation,
        *,
        body: dict[str, Any] | None = None,
        place: dict[str, str] | None = None,
        **more: Any,
    ) -> Any:
        method, path = operation
        described = self.document["paths"][path][method]
        for name, value in (place if place is not None else self.place(operation)).items():
            path = path.replace("{" + name + "}", value)
        content = described.get("requestBody", {}).get("content", {})
        given: dict[str, Any] = {}
        if "application/json" in content:
            given = {"json": content["application/json"]["example"] | (body or {})}
        elif content:
            given = {"files": {"content": b"picture"}}
        if "content" in more:
            given = {}
        return self.client.request(method, path, **given | more)

    def place(self, operation: Operation) -> dict[str, str]:
        """Of something that is there; of a creation, of something that is not."""
        method, path = operation
        if "/models/" in path:
            owner, name = MODEL.split("/")
            return {"owner": owner, "name": name, "id": HandBatcher.version}
        if "/files/" in path:
            return {"id": self.client.post("/files", files={"content": b"picture"}).json()["id"]}
        if method == "put":
            return {"id": f"own-{next(self._numbers)}"}
        if "{" not in path:
            return {}
        example = self.document["paths"]["/predictions"]["post"]["requestBody"]["content"]
        made = self.client.post("/predictions", json=example["application/json"]["example"]).json()
        listed = self.client.get("/v1/predictions").json()["results"]
        output = next(one for one in listed if one["id"] == made["id"])["output"][0].split("/")
        if "/outputs/" in path:
            return {"id": output[-2], "name": output[-1]}
        return {"id": made["id"], "name": made["urls"]["stream"].rpartition("/")[2]}

    def stalled(self, operation: Operation) -> Any:
        """The answer to a body that does not come."""
        method, path = operation
        place, sent = self.place(operation), []
        for name, value in place.items():
            path = path.replace("{" + name + "}", value)
        kind = next(iter(self.document["paths"][operation[1]][method]["requestBody"]["content"]))
        scope = {
            "type": "http",
            "method": method.upper(),
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", f"{kind}; boundary=b".encode())],
        }

        async def receive() -> Any:
            await asyncio.sleep(3600)

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self.client.app(scope, receive, send))  # type: ignore[arg-type]
        body = b"".join(one.get("body", b"") for one in sent[1:])
        return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=body)


def check(document: dict[str, Any], operation: Operation, answer: Any) -> int:
    """That it is as described; its status."""
    described = operations(document)[operation]["responses"]
    assert str(answer.status_code) in described, (operation, answer.status_code, answer.text[:200])
    content = described[str(answer.status_code)].get("content", {})
    kind = answer.headers.get("content-type", "").partition(";")[0]
    assert (kind in content) if content else (answer.content == b""), (operation, answer.status_code, kind)
    if kind == "application/json":
        schema = content[kind]["schema"] | {"components": document["components"]}
        OAS31Validator(schema).validate(answer.json())
    return int(answer.status_code)


def test_every_answer_is_described_and_every_described_one_is_given(
    make: Make, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    number = itertools.count()

    @contextlib.contextmanager
    def app(**settings: Any) -> Iterator[Caller]:
        client = make(data=tmp_path / str(next(number)), **settings)
        with contextlib.closing(client.app):  # type: ignore[type-var]
            yield Caller(client, client.get("/openapi.json").json())

    with app() as caller:
        document = caller.document
    described = operations(document)
    with_body = [one for one in described if "requestBody" in described[one]]
    creations = [one for one in with_body if "example" in str(described[one])]
    got: dict[Operation, set[int]] = {one: set() for one in described}

    def give(operation: Operation, answer: Any) -> None:
        got[operation].add(check(document, operation, answer))

    with app() as caller:
        for one in described:
            give(one, caller.call(one))
            nothing = {"id": f"no-{one[0]}", "name": "none", "owner": "nobody"}
            give(one, caller.call(one, place=nothing))
            give(one, caller.call(one, headers={"Origin": "http://elsewhere"}))
            give(one, caller.call(one, params={"cursor": "none"}))
            for part in ("0-3", "99999-", "5-2"):
                give(one, caller.call(one, headers={"Range": f"bytes={part}"}))
        for one in with_body:
            for kind, content in (
                ("application/json", b"{"),
                ("text/plain", b"{}"),
                ("multipart/form-data; boundary=b", b"x"),
                ("multipart/form-data; boundary=b", b"--b--"),
            ):
                give(one, caller.call(one, content=content, headers={"Content-Type": kind}))
        for one in creations:
            give(one, caller.call(one, body={"input": {}}))
            give(one, caller.call(one, headers={"Prefer": "respond-async"}))
            give(one, caller.call(one, body={"version": MODEL}))
            place = caller.place(one)
            for body in ({}, {"webhook": "https://there/"}):
                give(
                    one, caller.call(one, body=body, place=place, headers={"Idempotency-Key": "-".join(one)})
                )
    with app(body_timeout_s=0.01) as caller:
        for one in with_body:
            give(one, caller.stalled(one))
    with app(max_body_bytes=4, max_upload_bytes=4) as caller:
        for one in with_body:
            give(one, caller.call(one, place={"id": "0", "owner": "a", "name": "b"}))
    monkeypatch.setattr("ritocco.server.gate._LARGEST_AT_A_TIME", 0)
    with app() as caller:
        for one in with_body:
            give(one, caller.call(one, place={"id": "0", "owner": "a", "name": "b"}))
    monkeypatch.undo()
    for error in (AwayError("away"), StorageError("full")):
        with app() as caller:
            places = {one: caller.place(one) for one in described}
            store = caller.client.app.state.shared.store  # type: ignore[attr-defined]
            with monkeypatch.context() as away:
                for name in ("read", "write"):
                    away.setattr(store.database, name, raising(error))
                for one in described:
                    give(one, caller.call(one, place=places[one]))
    monkeypatch.setattr(Jobs, "lost", property(lambda _: True))
    with app() as caller:
        caller.client.app.begin_stop()  # type: ignore[attr-defined]
        for path in ("/livez", "/readyz"):
            give(("get", path), caller.call(("get", path)))
    promised = {one: {int(status) for status in held["responses"]} for one, held in described.items()}
    assert {one: promised[one] - found for one, found in got.items() if promised[one] != found} == {}


def raising(error: Exception) -> Callable[[], Any]:
    def call() -> Any:
        raise error

    return call


def test_without_a_token(make: Make) -> None:
    client = make(tokens=[TOKEN])
    document = client.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    caller, nobody = Caller(client, document), dict.fromkeys(("id", "name", "owner"), "a" * 26)
    refused = {
        one for one in operations(document) if check(document, one, caller.call(one, place=nobody)) == 401
    }
    assert refused == {one for one, held in operations(document).items() if "401" in held["responses"]}
    assert len(refused) > 10
