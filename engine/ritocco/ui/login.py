"""The way in for browsers: a form that takes a token once, and a cookie for the page alone."""

from __future__ import annotations

from html import escape
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope

from ritocco.server.sessions import COOKIE, PAGE, Sessions

_MOST_BYTES = 4096
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "same-origin",  # without any, browsers send the form with the origin null
    "X-Content-Type-Options": "nosniff",
}
_FORM = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ritocco: log in</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 24rem; margin: 15vh auto; padding: 0 1rem;
  color: #1f2937; background: #fff; }}
input, button {{ font: inherit; width: 100%; box-sizing: border-box; padding: .5rem; margin-top: .35rem; }}
button {{ margin-top: 1rem; background: #1d4ed8; color: #fff; border: 0; border-radius: .35rem; }}
[role=alert] {{ color: #991b1b; }}
</style>
</head>
<body>
<main>
<h1>ritocco</h1>
{error}
<form method="post" action="login">
<label for="token">Token of this server</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button>
</form>
</main>
</body>
</html>
"""


class Login:
    """Form and cookie. public_url: of the server, where it is known."""

    def __init__(self, sessions: Sessions, *, public_url: str | None) -> None:
        self._sessions, self._public = sessions, urlsplit(public_url or "")

    async def login(self, request: Request) -> Response:
        """The form, and what it sends."""
        if not self._sessions.tokens:
            return RedirectResponse("./", 303, _HEADERS)
        if request.method != "POST":
            return _form("")
        value = self._sessions.open(await _token(request))
        if value is None:
            return _form("That is no token of this server.", status=401)
        answer = RedirectResponse("./", 303, _HEADERS)
        answer.set_cookie(COOKIE, value, max_age=int(self._sessions.seconds), **self._narrow(request.scope))
        return answer

    async def logout(self, request: Request) -> Response:
        """Close the session, in this process too."""
        self._sessions.close(request.cookies.get(COOKIE))
        answer = RedirectResponse("login", 303, _HEADERS)
        answer.set_cookie(COOKIE, "", max_age=0, **self._narrow(request.scope))
        return answer

    def _narrow(self, scope: Scope) -> dict[str, Any]:
        """Whom the cookie is sent to: this page, over what it came by, never from another site."""
        root = scope.get("root_path", "").removesuffix(PAGE)
        public = self._public.path.rstrip("/") if self._public.netloc else root
        secure = scope.get("scheme") == "https" or self._public.scheme == "https"
        return {"path": f"{public}{PAGE}", "secure": secure, "httponly": True, "samesite": "strict"}


async def _token(request: Request) -> str:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            return ""
    try:
        return parse_qs(body.decode("utf-8")).get("token", [""])[0].strip()
    except (UnicodeDecodeError, ValueError):
        return ""


def _form(error: str, *, status: int = 200) -> Response:
    said = f'<p role="alert">{escape(error)}</p>' if error else ""
    return HTMLResponse(_FORM.format(error=said), status, _HEADERS)
