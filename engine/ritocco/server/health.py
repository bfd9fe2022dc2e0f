"""Is it alive, is it ready, how much is it doing. Health needs no token; the figures do."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ritocco.server.database import StorageError
from ritocco.server.document import CogHealth, Health, health
from ritocco.server.state import Shared
from ritocco.shown import said

_log = logging.getLogger(__name__)
_OPEN: dict[str, Any] = {"security": []}


def routes(shared: Shared) -> APIRouter:
    """At the root."""
    router = APIRouter(tags=["health"])

    def unready() -> str:
        """Why nothing would be accepted; empty where it would."""
        if shared.jobs.stopping and not shared.jobs.lost:
            return "stopping"
        if not shared.jobs.healthy:
            return "engine"
        try:
            if not shared.store.writable():
                return "storage"
            return "full" if shared.store.unfinished() >= shared.settings.waiting else ""
        except StorageError as error:
            _log.error("not ready", extra={"error": said(error)})
            return "storage"

    @router.head("/livez", include_in_schema=False)
    @router.get(
        "/livez",
        openapi_extra=_OPEN,
        response_model=Health,
        responses=health(503, "The device is lost to this process: start another"),
    )
    async def livez() -> JSONResponse:
        """The process answers, and can compute."""
        lost = shared.jobs.lost
        return JSONResponse({"status": "device lost" if lost else "ok"}, 503 if lost else 200)

    @router.head("/readyz", include_in_schema=False)
    @router.get(
        "/readyz",
        openapi_extra=_OPEN,
        response_model=Health,
        responses=health(503, "Stopping, no engine that works, or a disk that refuses or is damaged"),
    )
    def readyz() -> JSONResponse:
        """Predictions are accepted, if perhaps not this moment: a full queue is no reason to be replaced."""
        why = unready()
        ready = why in ("", "full")
        return JSONResponse({"status": "ok" if ready else why}, 200 if ready else 503)

    @router.head("/health-check", include_in_schema=False)
    @router.get("/health-check", response_model=CogHealth, openapi_extra=_OPEN)
    def health_check() -> dict[str, Any]:
        """Cog's words for it."""
        why = unready()
        status = {"": "READY", "full": "BUSY"}.get(why, "DEFUNCT")
        setup = {"started_at": shared.began, "completed_at": shared.began, "logs": "", "status": "succeeded"}
        return {"status": status, "setup": setup}

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(shared.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
