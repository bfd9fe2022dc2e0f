"""Errors as clients get them: the bodies of the original, whatever went wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from ritocco.errors import BusyError, RequestError
from ritocco.schema import InputError, Violation
from ritocco.server.database import AwayError, StorageError
from ritocco.server.jobs import BrokenError, StoppingError
from ritocco.server.metrics import Metrics
from ritocco.server.store import ConflictError
from ritocco.shown import plain

_log = logging.getLogger(__name__)
_TITLES = {404: "Not found", 405: "Method not allowed"}


class ProblemError(Exception):
    """An answer that is an error. Its fields are those of the body."""

    def __init__(
        self,
        status: int,
        title: str,
        detail: str,
        *,
        fields: Sequence[Violation] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.title, self.detail = status, title, detail
        self.fields, self.headers = tuple(fields), dict(headers or {})

    def response(self) -> JSONResponse:
        """The answer."""
        body: dict[str, Any] = {"title": self.title, "detail": self.detail, "status": self.status}
        if self.fields:
            body["invalid_fields"] = [
                {"type": one.type, "field": one.field or "(root)", "description": one.description}
                for one in self.fields
            ]
        return JSONResponse(body, self.status, self.headers)


class StalledError(Exception):
    """The client takes nothing of its answer."""


def not_found(what: str = "The requested resource could not be found.") -> ProblemError:
    """404."""
    return ProblemError(404, "Not found", what)


def unauthenticated() -> ProblemError:
    """401, in the words of the original."""
    detail = "You did not pass a valid authentication token"
    return ProblemError(401, "Unauthenticated", detail, headers={"WWW-Authenticate": "Bearer"})


def throttled(retry_after_s: float) -> ProblemError:
    """429."""
    seconds = max(1, math.ceil(retry_after_s))
    detail = f"Request was throttled. Your rate limit resets in ~{seconds}s."
    return ProblemError(429, "Too many requests", detail, headers={"Retry-After": str(seconds)})


def invalid(violations: Sequence[Violation]) -> ProblemError:
    """422: an input that breaks rules, with one line for each."""
    detail = "".join(f"- {one.field or '(root)'}: {one.description}\n" for one in violations)
    return ProblemError(422, "Input validation failed", detail, fields=violations)


def problem_of(error: Exception) -> ProblemError:
    """What an exception becomes."""
    match error:
        case ProblemError():
            return error
        case InputError():
            return invalid(error.violations)
        case ConflictError():
            return ProblemError(409, "Conflict", str(error))
        case RequestError():
            return invalid([Violation(type="invalid_type", field=error.field, description=str(error))])
        case BusyError():
            return throttled(error.retry_after)
        case StoppingError():
            detail = "The server is about to stop; ask again in a moment."
            return ProblemError(503, "Stopping", detail, headers={"Retry-After": "5"})
        case BrokenError():
            detail = "The engine fails at what it is given; ask again in a moment."
            return ProblemError(503, "Engine broken", detail, headers={"Retry-After": "30"})
        case AwayError():
            _log.error("storage", extra={"error": str(error)})
            detail = "The server can't reach its database; ask again in a moment."
            return ProblemError(503, "Database away", detail, headers={"Retry-After": "5"})
        case StorageError():
            _log.error("storage", extra={"error": str(error)})
            return ProblemError(
                507, "Insufficient storage", "The server can't store or read this at the moment."
            )
        case RequestValidationError():
            return invalid([_violation(one) for one in error.errors()])
        case HTTPException():
            title = _TITLES.get(error.status_code, "Bad request")
            return ProblemError(error.status_code, title, str(error.detail), headers=error.headers)
    _log.error("internal error", exc_info=error)
    return ProblemError(500, "Internal error", "The server made a mistake; its log has more.")


def install(app: FastAPI, routes: Sequence[BaseRoute], metrics: Metrics) -> None:
    """Make every error of the app's routes such an answer."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect | StalledError):  # nobody is there to read it
            return Response(status_code=400)
        made = problem_of(error)
        if made.status == 405:  # the framework names the methods of the first route alone
            made.headers["Allow"] = ", ".join(_methods(routes, request.scope))
        metrics.refused.labels(str(made.status)).inc()
        return made.response()

    for kind in (
        *(ProblemError, RequestError, BusyError, StoppingError, BrokenError, StorageError),
        *(RequestValidationError, HTTPException, ClientDisconnect, Exception),
    ):
        app.add_exception_handler(kind, handle)


def _methods(routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
    """Those that a path has."""
    here = [route for route in routes if route.matches(scope)[0] is not Match.NONE]
    return sorted({method for route in here for method in getattr(route, "methods", None) or ()})


def _violation(detail: Mapping[str, Any]) -> Violation:
    place = ".".join(plain(str(part)) for part in detail["loc"][1:])
    return Violation(type="invalid_type", field=place, description=plain(str(detail["msg"]), 200))
