"""What every request passes before a route sees it: the token, and the limits on its body and its answer.

One gate for all prefixes and the page: whatever is not named here as open needs a token, known route or not.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ritocco.server.metrics import Metrics
from ritocco.server.problems import ProblemError, StalledError, throttled, unauthenticated
from ritocco.server.sessions import COOKIE, LOGIN, LOGOUT, PAGE, Sessions, is_page
from ritocco.shown import plain

PREFIXES = ("", "/v1", "/replicate/v1")
_PREFIX = "(?:" + "|".join(PREFIXES) + ")"
_HEALTH = re.compile(r"/(?:livez|readyz|health-check)")
# Their names are 130 random bits: whoever knows one was told, and clients fetch them without a token.
_BY_NAME = re.compile(_PREFIX + r"/(?:outputs/[0-9a-z]{26}/[^/]+|stream/[0-9a-z]{26})")
_UPLOAD = re.compile(rf"{_PREFIX}/files/?|{PAGE}/gradio_api/upload")
_SAFE = ("GET", "HEAD", "OPTIONS")
_FORM_BYTES = 1 << 20  # of an upload's other parts
_LARGEST_AT_A_TIME = 16
SEND_TIMEOUT_S = 60.0
_PIECE_BYTES = 1 << 16


def local_path(scope: Scope) -> str:
    """The path inside this app, wherever it is mounted: read as the router reads it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    inside = path[len(root) :] if root and path.startswith(root) else path
    return inside if not inside or inside.startswith("/") else path


class Gate:
    """Answers 401 to whoever has no token, and 403 to other sites' pages: always under the page's path, and
    where there are no tokens everywhere. Browsers enter the page with a session, and log in without one.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        sessions: Sessions,
        origins: Sequence[str],
        public_url: str | None,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._sessions, self._tokens = sessions, sessions.tokens
        self._origins = frozenset(origins)
        self._public = urlsplit(public_url or "").netloc.lower()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and (refused := self._refusal(scope)) is not None:
            self._metrics.refused.labels(str(refused.status)).inc()
            await self._answer(scope, refused)(scope, receive, send)
        elif scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ProblemError | None:
        headers, path, safe = Headers(scope=scope), local_path(scope), scope["method"] in _SAFE
        if safe and (_HEALTH.fullmatch(path) or _BY_NAME.fullmatch(path)):
            return None
        origin = headers.get("origin")
        if is_page(path):
            if origin is not None and not self._own(origin, headers):
                return _foreign(origin)
            entered = self._admits(headers) or self._sessions.admit(
                cookie_parser(_cookies(headers)).get(COOKIE)
            )
            return None if not self._tokens or entered or path in (LOGIN, LOGOUT) else _outside()
        if self._tokens:
            return None if self._admits(headers) else unauthenticated()
        if not safe and origin is not None and origin not in self._origins:
            return _foreign(origin)
        return None

    def _answer(self, scope: Scope, problem: ProblemError) -> Response:
        """A person who opens the page is shown the way in."""
        path, opened = local_path(scope), problem.status == 401 and scope["method"] == "GET"
        if opened and self._sessions.has_page and path in (PAGE, f"{PAGE}/"):
            way = LOGIN.removeprefix("/") if path == PAGE else LOGIN.removeprefix(f"{PAGE}/")
            return RedirectResponse(way, 303, {"Cache-Control": "no-store"})
        return problem.response()

    def _own(self, origin: str, headers: Headers) -> bool:
        """Whether it is the page's own: the host is the one that the browser asks, or the public one."""
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        hosts = headers.getlist("host")
        asked = hosts[0].lower() if len(hosts) == 1 else ""
        known = {asked, self._public} - {""}
        return parts.scheme in ("http", "https") and parts.netloc.lower() in known

    def _admits(self, headers: Headers) -> bool:
        given = headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        return self._tokens.hold(token.strip()) and scheme.lower() in ("bearer", "token")


def _foreign(origin: str) -> ProblemError:
    return ProblemError(403, "Forbidden", f"Pages of {plain(origin)!r} may not call this server")


def _outside() -> ProblemError:
    """401, in words that the page shows."""
    detail = "The session has ended, or is another server's: load the page again, and log in"
    return ProblemError(401, "Unauthenticated", detail, headers={"WWW-Authenticate": "Bearer"})


def _cookies(headers: Headers) -> str:
    return "; ".join(headers.getlist("cookie"))


class BodyLimits:
    """Counts a body as it comes: 413 beyond the limit, 408 where it takes too long, and 429 where the bodies
    of all requests that are being answered come to more than sixteen of the largest.
    """

    def __init__(
        self, app: ASGIApp, *, most: int, most_upload: int, seconds: float, metrics: Metrics
    ) -> None:
        self._app, self._most, self._seconds, self._metrics = app, most, seconds, metrics
        self._most_upload = most_upload + _FORM_BYTES
        self._held, self._most_held = 0, _LARGEST_AT_A_TIME * max(most, self._most_upload)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._most_upload if _UPLOAD.fullmatch(local_path(scope)) else self._most
        announced = Headers(scope=scope).get("content-length", "")
        size = int(announced[:20]) if announced.isascii() and announced.isdigit() else 0
        if size > most or self._held + size > self._most_held:
            problem = _too_large(most) if size > most else _too_many()
            self._metrics.refused.labels(str(problem.status)).inc()
            await problem.response()(scope, receive, send)
            return
        deadline = time.monotonic() + self._seconds
        seen, whole = 0, False

        async def counted() -> Message:
            nonlocal seen, whole
            if whole:  # what is awaited now is the client's leaving
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                detail = f"The body was not here in full within {self._seconds:g} seconds"
                closing = {"Connection": "close"}
                raise ProblemError(408, "Request timeout", detail, headers=closing) from None
            seen += len(message.get("body", b""))
            self._held += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > most:
                raise _too_large(most)
            if self._held > self._most_held:
                raise _too_many()
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._held -= seen


class SendLimits:
    """Sends an answer in pieces, and gives up on a client that takes none for too long: megabytes that nobody
    reads would be held for ever.
    """

    def __init__(self, app: ASGIApp, *, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stalled = False

        async def limited(message: Message) -> None:
            nonlocal stalled
            for piece in _pieces(message):
                try:
                    async with asyncio.timeout(self._seconds):
                        await send(piece)
                except TimeoutError:
                    stalled = True
                    raise StalledError from None

        try:
            await self._app(scope, receive, limited)
        except Exception:
            if not stalled:
                raise  # else the server closes the connection, since the answer is not complete


def _pieces(message: Message) -> Iterator[Message]:
    body = message.get("body", b"")
    if len(body) <= _PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), _PIECE_BYTES):
        end = start + _PIECE_BYTES
        more = end < len(body) or message.get("more_body", False)
        yield {**message, "body": body[start:end], "more_body": more}


def _too_many() -> ProblemError:
    made = throttled(1.0)
    made.headers["Connection"] = "close"
    return made


def _too_large(most: int) -> ProblemError:
    detail = f"The body may have at most {most} bytes"
    return ProblemError(413, "Payload too large", detail, headers={"Connection": "close"})
