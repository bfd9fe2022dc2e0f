"""A creation over HTTP, in whichever way: the headers that say how, and the prediction that it makes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic.json_schema import SkipJsonSchema
from starlette.concurrency import run_in_threadpool

from ritocco.schema import Violation
from ritocco.server.bodies import PredictionRequest
from ritocco.server.problems import ProblemError
from ritocco.server.settings import MAX_WAIT_S
from ritocco.server.state import Shared
from ritocco.server.store import Record

ID_PATTERN = "^[A-Za-z0-9_-]{1,128}$"
_KEY_PATTERN = "^[!-~]{1,255}$"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preferences:
    """at_once: no wait is wanted. seconds: to wait at most; None where the client does not say."""

    at_once: bool
    seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """base: URL of the API as this client reaches it. fresh: the record was not there before."""

    record: Record
    base: str
    fresh: bool


async def _preferences(
    prefer: Annotated[
        list[str] | SkipJsonSchema[None],
        Header(alias="Prefer", description="`wait`, `wait=n` (60 seconds at most) or `respond-async`."),
    ] = None,
) -> Preferences:
    """[RFC 7240]"""
    at_once, seconds = False, None
    for line in prefer or ():
        for part in line.split(","):
            name, _, value = part.partition(";")[0].strip().partition("=")
            value = value.strip().strip('"')
            if name.strip().lower() == "respond-async":
                at_once = True
            elif name.strip().lower() == "wait":
                if not value:
                    seconds = MAX_WAIT_S
                elif value.isascii() and value.isdigit():
                    seconds = min(float(value[:9]), MAX_WAIT_S)
    return Preferences(at_once=at_once, seconds=seconds)


async def _idempotency_key(
    key: Annotated[
        str | SkipJsonSchema[None],
        Header(
            alias="Idempotency-Key",
            description="Of a creation that may be sent again, and is one prediction all the same.",
            json_schema_extra={"pattern": _KEY_PATTERN},
        ),
    ] = None,
) -> str | None:
    """Raises ProblemError for one that is none."""
    if key is not None and not re.fullmatch(_KEY_PATTERN, key):
        rule = "must be 1 to 255 printable ASCII characters without spaces"
        raise ProblemError(422, "Invalid header", f"Idempotency-Key {rule}")
    return key


Preferred = Annotated[Preferences, Depends(_preferences)]
Key = Annotated[str | None, Depends(_idempotency_key)]


def prediction_id(given: str) -> str:
    """An id of the client's own. Raises ProblemError for one that is none."""
    if not re.fullmatch(ID_PATTERN, given):
        rule = "Must be 1 to 128 letters, digits, hyphens and underscores"
        violation = Violation(type="invalid_type", field="id", description=rule)
        raise ProblemError(422, "Input validation failed", f"- id: {rule}\n", fields=[violation])
    return given


async def accepted(
    shared: Shared,
    request: Request,
    asked: PredictionRequest,
    *,
    prefix: str,
    key: str | None,
    id: str | None = None,
) -> Accepted:
    """Store and run it, or find what was created before. Raises as `Shared.record` and `Jobs.accept`."""
    base = shared.base(request, prefix)
    new = await run_in_threadpool(lambda: shared.record(asked, base=base, key=key, id=id))
    record, fresh = await run_in_threadpool(shared.jobs.accept, new)
    return Accepted(record=record, base=base, fresh=fresh)
