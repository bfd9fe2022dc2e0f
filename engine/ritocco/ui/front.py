"""What stands before Gradio: the few of its routes that the page needs, each with a narrow door.

Gradio has dozens of routes (proxies, recordings, histories, functions called directly); it copies files and
fetches URLs that a call names. Here is none of that: whatever is not named is not found.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias
from urllib.parse import unquote

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ritocco.server.bodies import strict_object
from ritocco.server.problems import ProblemError, not_found
from ritocco.shown import shown
from ritocco.ui.room import Room

_READ = re.compile(
    r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/(?:assets|static)/.+"
    r"|/gradio_api/(?:theme\.css|startup-events|queue/data|upload_progress|heartbeat/[A-Za-z0-9_-]{1,64})"
)
_FILE = "/gradio_api/file="
_JOIN = "/gradio_api/queue/join"
_UPLOAD = "/gradio_api/upload"
_WRITE = (
    _JOIN,
    _UPLOAD,
    "/gradio_api/cancel",
    "/gradio_api/reset",
)
_ENDLESS = re.compile(r"/gradio_api/(?:heartbeat/.*|upload_progress)")
_QUERIES = {
    "/gradio_api/queue/data": re.compile(r"session_hash=[A-Za-z0-9_-]{1,64}"),
    "/gradio_api/upload_progress": re.compile(r"upload_id=[A-Za-z0-9_-]{1,64}"),
    _UPLOAD: re.compile(r"upload_id=[A-Za-z0-9_-]{1,64}"),
}
_JOIN_KEYS = ("data", "fn_index", "session_hash", "trigger_id")
_MOST_JSON = 1 << 20
_MOST_DEEP = 16
# Gradio's scripts show a detail, but not that of a 422.
_NO_FILE = (
    "The file is not at this server any more, or never was: load it again. "
    "Of several servers behind one name a person needs always the same."
)
_STOP_LOOK_S = 0.5
_HEADERS = {
    # Nothing is asked of another host, whatever Gradio or a picture's name would like.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; manifest-src 'self'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
}
_FILE_POLICY = "default-src 'none'; sandbox"

Json: TypeAlias = Any


class Front:
    """ASGI, mounted under the page's path."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        room: Room,
        start: Callable[[], Any],
        stopping: Callable[[], bool],
        base: Callable[[Scope], str],
        base_key: str,
        placed: bool,
        calls: Mapping[int, Sequence[tuple[str, Any]]],
    ) -> None:
        """app: Gradio's. start: awaited in each event loop before its first request. stopping: whether the
        server is about to end, so that streams without an end of their own are cut. base: the API's URL,
        which is under `base_key` in the scope that Gradio gets. placed: whether Gradio knows its own URL,
        and routes by the path after that. calls: by the functions' numbers, the names of their inputs, and
        the pydantic model of each, or None.
        """
        self._app, self._room = app, room
        self._start, self._stopping = start, stopping
        self._base, self._base_key, self._placed = base, base_key, placed
        self._calls = calls
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return
        try:
            path = _path(scope)
            self._refuse(path, scope)
            if path == _JOIN:
                receive = _replayed(await self._join(Headers(scope=scope), receive), receive)
            if path in (_JOIN, _UPLOAD):
                await run_in_threadpool(self._room.trim)
        except ProblemError as problem:
            await problem.response()(scope, receive, send)
            return
        if self._loop is not asyncio.get_running_loop():
            self._loop = asyncio.get_running_loop()
            await self._start()
        inner = self._inner(scope, path)
        send = _with_headers(send, is_file=path.startswith(_FILE), fresh=path in ("/", "/config"))
        if _ENDLESS.fullmatch(path):
            await self._until_stopping(inner, receive, send)
        else:
            await self._app(inner, receive, send)

    def _refuse(self, path: str, scope: Scope) -> None:
        method = scope["method"]
        if method in ("GET", "HEAD"):
            allowed = _READ.fullmatch(path) is not None or self._is_ours(path, scope)
        else:
            allowed = method == "POST" and path in _WRITE
        query, rule = scope.get("query_string", b"").decode("latin-1"), _QUERIES.get(path)
        if not allowed or (rule is not None and query and not rule.fullmatch(query)):
            raise not_found()
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        wanted = "multipart/form-data" if path == _UPLOAD else "application/json"
        if method == "POST" and kind != wanted:
            raise ProblemError(415, "Unsupported media type", f"Content-Type must be {wanted}")

    def _is_ours(self, path: str, scope: Scope) -> bool:
        """Whether a path asks for a file of the room, by its absolute path."""
        return path.startswith(_FILE) and self._room.holds(path.removeprefix(_FILE))

    async def _join(self, headers: Headers, receive: Receive) -> bytes:
        """The body of a call, with nothing in it but files of ours and plain values."""
        raw = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ProblemError(400, "Bad request", "The client has left")
            raw += message.get("body", b"")
            more = message.get("more_body", False)
            if len(raw) > _MOST_JSON:
                raise ProblemError(413, "Payload too large", f"The body may have at most {_MOST_JSON} bytes")
        try:
            held = strict_object(bytes(raw))
        except ValueError as error:
            raise ProblemError(400, "Malformed JSON", f"The body is not valid JSON: {error}") from None
        session = held.get("session_hash")
        if not isinstance(session, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", session):
            raise ProblemError(422, "Input validation failed", "session_hash: must be the page's")
        called = held.get("fn_index")
        if not isinstance(held.get("data"), list) or type(called) is not int or called not in self._calls:
            raise ProblemError(422, "Input validation failed", "data and fn_index: must be a call's")
        kept = {name: held[name] for name in _JOIN_KEYS if name in held}
        inputs = self._calls[called]
        if len(kept["data"]) != len(inputs):
            rule = f"this call takes {len(inputs)}"
            raise ProblemError(400, "Bad request", f"data has {len(kept['data'])} values; {rule}")
        kept["data"] = [self._checked(one) for one in kept["data"]]
        for (name, model), value in zip(inputs, kept["data"], strict=True):
            _refuse_odd(name, model, value)
        return json.dumps(kept).encode("ascii")

    def _checked(self, value: Json, depth: int = 0) -> Json:
        """A value whose files are ours, and say nothing but their path and name."""
        if depth > _MOST_DEEP:
            raise ProblemError(400, "Malformed JSON", "The body is nested too deeply")
        if isinstance(value, list):
            return [self._checked(one, depth + 1) for one in value]
        if not isinstance(value, dict):
            return value
        if "path" in value or "meta" in value:
            path = value.get("path")
            if not isinstance(path, str) or not self._room.holds(path):
                raise not_found(_NO_FILE)
            return {"path": path, "meta": {"_type": "gradio.FileData"}}
        return {name: self._checked(one, depth + 1) for name, one in value.items() if name != "url"}

    def _inner(self, scope: Scope, path: str) -> Scope:
        """As Gradio is to see it: without what makes it believe in other hosts, origins or queries."""
        drop = (b"origin", b"x-forwarded-", b"x-gradio-", b"cookie", b"authorization")
        headers = [(key, value) for key, value in scope["headers"] if not key.startswith(drop)]
        if path == _JOIN:
            headers = [(key, value) for key, value in headers if key != b"content-length"]
        query = scope.get("query_string", b"") if path in _QUERIES else b""
        inner = {**scope, "headers": headers, "query_string": query, self._base_key: self._base(scope)}
        return inner | {"path": path, "root_path": ""} if self._placed else inner

    async def _until_stopping(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a stream that ends only with its client, or with the server."""
        begun = ended = False

        async def watched(message: Message) -> None:
            nonlocal begun, ended
            begun = begun or message["type"] == "http.response.start"
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        task = asyncio.ensure_future(self._app(scope, receive, watched))
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_STOP_LOOK_S)
                if self._stopping():
                    break
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        if task.done() and not task.cancelled():
            task.result()
        if not ended:
            if not begun:
                await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _refuse_odd(name: str, model: Any, value: Json) -> None:
    """Raises ProblemError for what Gradio would answer with an error without words."""
    if model is None or value is None:
        return
    try:
        model.model_validate(value)
    except ValidationError:
        rule = "it must be what was uploaded to this page"
        raise ProblemError(400, "Bad request", f"{name} is {shown(value)}; {rule}") from None


def _path(scope: Scope) -> str:
    """Inside the page, as the router reads it. Raises ProblemError for one that has two readings."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    inside = path[len(root) :] if root and path.startswith(root) else path
    raw = scope.get("raw_path")
    twice = raw is not None and unquote(unquote(raw.decode("latin-1"))) != unquote(raw.decode("latin-1"))
    if "\\" in inside or "\x00" in inside or twice or any(part in (".", "..") for part in inside.split("/")):
        raise not_found()
    return inside or "/"


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`body`, then what else comes."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_headers(send: Send, *, is_file: bool, fresh: bool) -> Send:
    async def headed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            if is_file:
                headers["Content-Security-Policy"] = _FILE_POLICY
                headers["Cache-Control"] = "private, no-store"
            elif fresh:
                headers["Cache-Control"] = "no-store"
        await send(message)

    return headed
