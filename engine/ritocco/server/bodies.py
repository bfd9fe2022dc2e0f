"""Requests' JSON: strict, since what two parsers read differently is how checks are passed by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool

from ritocco.schema import Boolean, Text, type_error
from ritocco.server.problems import ProblemError
from ritocco.shown import plain, said

MAX_WEBHOOK_CHARS = 2048
MAX_VALUES = 10_000
_EVENTS = ("start", "output", "logs", "completed")
_SMALL = 1 << 16


async def read_json(request: Request) -> dict[str, Any]:
    """The body, an object.

    Raises ProblemError: 415 for another type, 413 for too many values, 400 for what is not strictly JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        # Pages of other sites may send the other types without asking.
        detail = f"Content-Type is {plain(kind)!r}; it must be application/json"
        raise ProblemError(415, "Unsupported media type", detail)
    raw = await request.body()
    return _parsed(raw) if len(raw) < _SMALL else await run_in_threadpool(_parsed, raw)


def strict_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, none of whose keys stands there twice. Raises ValueError with the reason."""
    try:
        # Of bytes `json.loads` takes UTF-16 and UTF-32 too, in which `_values_beyond` can't count.
        held = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(held, dict):
        raise ValueError("it must be an object")
    return held


def _parsed(raw: bytes) -> dict[str, Any]:
    if _values_beyond(raw, MAX_VALUES):
        raise ProblemError(413, "Payload too large", f"The body may hold at most {MAX_VALUES} values")
    try:
        return strict_object(raw)
    except ValueError as error:  # not JSON, not UTF-8, a number of thousands of digits
        raise ProblemError(400, "Malformed JSON", f"The body is not valid JSON: {said(error, 200)}") from None


def _values_beyond(raw: bytes, most: int) -> bool:
    """Whether a text of JSON holds more values than that, told by the marks before them: a value of two bytes
    takes fifty times as many once it is parsed, and then each is walked through again and again.
    """
    if _marks(raw) <= most:
        return False
    without_escapes = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if without_escapes.count(b'"') > 4 * (most + 1):  # each member of an object is two texts at most
        return True
    return _marks(b"".join(without_escapes.split(b'"')[::2])) > most


def _marks(raw: bytes) -> int:
    return sum(raw.count(mark) for mark in (b",", b"[", b"{"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {plain(twice)!r} stands there twice")
    return made


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _input(value: object) -> object:
    if not isinstance(value, Mapping):
        raise type_error("object", value)
    return value


def _webhook(value: str) -> str:
    if not value.startswith(("https://", "http://")):
        raise PydanticCustomError("invalid_type", "Must be an http(s) URL")
    if len(value) > MAX_WEBHOOK_CHARS:
        raise PydanticCustomError(
            "invalid_type", "Must have at most {most} characters", {"most": MAX_WEBHOOK_CHARS}
        )
    return value


def _events(value: object) -> object:
    if not isinstance(value, list):
        raise type_error("array", value)
    if any(one not in _EVENTS for one in value):
        raise PydanticCustomError("invalid_type", "Must hold only start, output, logs and completed")
    return tuple(dict.fromkeys(value))


class PredictionRequest(BaseModel):
    """What creates a prediction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: Annotated[dict[str, Any], BeforeValidator(_input)] = Field(description="The twelve inputs.")
    version: Text | None = Field(
        default=None,
        description="64 hex digits, `owner/name:hex` or `owner/name`; the model served, if missing.",
    )
    webhook: Annotated[Text, AfterValidator(_webhook)] | None = Field(
        default=None, description="http(s) URL that is told of events."
    )
    webhook_events_filter: Annotated[tuple[str, ...], BeforeValidator(_events)] | None = Field(
        default=None, description="Of start, output, logs and completed; output and completed, if missing."
    )
    stream: Boolean | None = Field(default=None, description="Accepted; every prediction has a stream.")


class CogRequest(PredictionRequest):
    """What creates a prediction in Cog's way; the last three fields are taken and not used."""

    id: Text | None = Field(default=None, description="The prediction's id.")
    created_at: Text | None = None
    output_file_prefix: Text | None = None
    context: dict[str, Any] | None = None
