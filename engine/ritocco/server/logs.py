"""Structured logs: one JSON object a line, without secrets, prompts or pictures."""

from __future__ import annotations

import json
import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ritocco.server.gate import local_path
from ritocco.shown import plain

_SECRET_PART = re.compile(r"(/(?:outputs|stream)/)[^/]+")

_log = logging.getLogger(__name__)


class AccessLog:
    """One line for each request: no query, no headers, no body, and no name that opens something."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if status != 500:
                raise  # else it was answered, and logged with that
        finally:
            path = plain(_SECRET_PART.sub(r"\1...", local_path(scope)), 200)
            ms = round(1000 * (time.perf_counter() - begun), 1)
            said = {"method": plain(scope["method"], 20), "path": path, "status": status, "ms": ms}
            _log.info("request", extra=said)


_USUAL = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and whatever `extra` held."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        held = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        held |= {name: value for name, value in record.__dict__.items() if name not in _USUAL}
        if record.exc_info:
            held["exception"] = self.formatException(record.exc_info)
        return json.dumps(held, default=str)
