"""Predictions: create, get, list, cancel, stream."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from ritocco.prediction import MODEL, Prediction
from ritocco.schema import validated
from ritocco.server.answers import answer
from ritocco.server.bodies import CogRequest, PredictionRequest, read_json
from ritocco.server.database import AwayError
from ritocco.server.document import PageOfPredictions, body_of, problems
from ritocco.server.problems import ProblemError, not_found
from ritocco.server.state import POLL_S, Shared, idempotency_key, prediction_id, preferences
from ritocco.server.store import ENDED, Record

PAGE = 100
_CANCEL_WAIT_S = 2.0
_CURSOR = re.compile(r"([<>])([0-9]{1,18})")
_POSITION = re.compile(r"([0-9]{1,12})-([0-9])")
_REASONS = {"failed": "error", "canceled": "canceled"}


def _found(id: str, request: Request) -> Record:
    record: Record | None = request.app.state.shared.store.get(id)
    if record is None:
        raise not_found()
    return record


def _streamed(name: str, request: Request) -> Record:
    record: Record | None = request.app.state.shared.store.by_stream(name)
    if record is None:
        raise not_found()
    return record


Found = Annotated[Record, Depends(_found)]
Streamed = Annotated[Record, Depends(_streamed)]


def routes(shared: Shared, prefix: str) -> APIRouter:
    """Under one prefix. At the root, a creation without `version` is Cog's."""
    router = APIRouter(prefix=prefix, tags=["predictions"])

    @router.post(
        "/predictions",
        status_code=201,
        response_model=Prediction,
        responses=problems(400, 401, 408, 413, 415, 422, 429, 503),
        openapi_extra=body_of(PredictionRequest),
    )
    async def create(request: Request) -> Response:
        """Create a prediction. `Prefer: wait` or `wait=n` holds the answer for at most 60 or n seconds."""
        key = idempotency_key(request)
        await shared.refuse_if_full(key=key)
        body = await read_json(request)
        if prefix or "version" in body:
            return await created(request, validated(PredictionRequest, body, prefix=""), key)
        return await cog_created(request, validated(CogRequest, body, prefix=""), key)

    @router.post(
        "/models/{owner}/{name}/predictions",
        status_code=201,
        response_model=Prediction,
        responses=problems(400, 401, 404, 408, 413, 415, 422, 429, 503),
        openapi_extra=body_of(PredictionRequest),
    )
    async def create_by_model(owner: str, name: str, request: Request) -> Response:
        """Create a prediction of a model's latest version."""
        if f"{owner}/{name}" != MODEL:
            raise not_found()
        key = idempotency_key(request)
        await shared.refuse_if_full(key=key)
        return await created(request, validated(PredictionRequest, await read_json(request), prefix=""), key)

    async def accepted(
        request: Request, asked: PredictionRequest, key: str | None, id: str | None = None
    ) -> tuple[Record, str]:
        base = shared.base(request, prefix)
        new = await run_in_threadpool(lambda: shared.record(asked, base=base, key=key, id=id))
        record, _ = await run_in_threadpool(shared.jobs.accept, new)
        return record, base

    async def created(request: Request, asked: PredictionRequest, key: str | None) -> Response:
        record, base = await accepted(request, asked, key)
        at_once, seconds = preferences(request)
        if seconds and not at_once:
            await shared.wait(record.id, seconds)
        return _json(await shared.answer(record, base, patient=False), 201)

    async def cog_created(
        request: Request, asked: CogRequest, key: str | None, id: str | None = None
    ) -> Response:
        """Synchronous, unless the client prefers otherwise: 202 with what has not ended."""
        given = id or asked.id
        record, base = await accepted(request, asked, key, None if given is None else prediction_id(given))
        at_once, seconds = preferences(request)
        if not at_once:
            await shared.wait(record.id, seconds)
        made = await shared.answer(record, base)
        return _json(made, 200 if made.status in ENDED and not at_once else 202)

    if not prefix:

        @router.put(
            "/predictions/{id}",
            response_model=Prediction,
            responses=problems(400, 401, 408, 409, 413, 415, 422, 429, 503),
            openapi_extra=body_of(CogRequest),
        )
        async def put(id: str, request: Request) -> Response:
            """Create a prediction of this id, or wait for the one that there is."""
            prediction_id(id)
            key = idempotency_key(request)
            await shared.refuse_if_full(key=key, id=id)
            asked = validated(CogRequest, await read_json(request), prefix="")
            if asked.id not in (None, id):
                raise ProblemError(422, "Input validation failed", "- id: Must be the one in the path\n")
            return await cog_created(request, asked, key, id)

    @router.get("/predictions", response_model=PageOfPredictions, responses=problems(401, 422))
    async def list_predictions(
        request: Request, cursor: Annotated[str | None, Query(description="Of a page's URLs.")] = None
    ) -> Response:
        """The latest predictions, a hundred a page. Outputs are URLs here; long inputs are cut."""
        place = _cursor(cursor)
        page = await run_in_threadpool(lambda: shared.store.page(size=PAGE, **place))
        base = shared.base(request, prefix)
        made = [await shared.answer(one, base, brief=True) for one in page.records]
        # From an empty page too there is a way back.
        seqs = [one.seq for one in page.records] or [0, place.get("after", 0) + 1]

        def link(there: bool, sign: str, seq: int) -> str | None:
            text = base64.urlsafe_b64encode(f"{sign}{seq}".encode("ascii")).decode("ascii")
            return f"{base}/predictions?cursor={text}" if there else None

        held = PageOfPredictions(
            previous=link(page.newer, ">", seqs[0]), next=link(page.older, "<", seqs[-1]), results=made
        )
        return _json(held)

    @router.get("/predictions/{id}", response_model=Prediction, responses=problems(401, 404))
    async def get(request: Request, record: Found) -> Response:
        """A prediction as it stands."""
        return _json(await shared.answer(record, shared.base(request, prefix)))

    @router.post("/predictions/{id}/cancel", response_model=Prediction, responses=problems(401, 404))
    async def cancel(request: Request, record: Found) -> Response:
        """End a prediction between two steps. One that has ended stays as it is."""
        await run_in_threadpool(shared.jobs.cancel, record.id)
        await shared.wait(record.id, _CANCEL_WAIT_S)
        return _json(await shared.answer(record, shared.base(request, prefix)))

    @router.get(
        "/stream/{name}",
        response_class=EventSourceResponse,
        responses=problems(404),
        openapi_extra={"security": []},
    )
    async def stream(
        record: Streamed,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events: `logs`, `output` for each picture, `error`, and `done` at the end."""
        async for event in _events(shared, record, last_event_id):
            yield event

    return router


async def _events(shared: Shared, record: Record, last: str | None) -> AsyncIterator[ServerSentEvent]:
    """An id is `characters of logs - outputs` that were sent, so that a client goes on where it was."""
    place = _POSITION.fullmatch(last or "")
    sent, pictures = (int(place[1]), int(place[2])) if place else (0, 0)
    while True:
        live = shared.jobs.live(record.id)
        try:
            prediction = await run_in_threadpool(_current, shared, record, live)
        except AwayError:
            if not shared.others_go_on:
                raise
            await asyncio.sleep(POLL_S)
            continue
        if len(prediction.logs) > sent:
            text, sent = prediction.logs[sent:], len(prediction.logs)
            yield ServerSentEvent(event="logs", raw_data=text.removesuffix("\n"), id=f"{sent}-{pictures}")
        if prediction.status in ENDED:
            break
        if live is not None and live.set_aside:  # the server is about to stop
            return
        if live is None:
            if not shared.others_go_on:
                return
            await asyncio.sleep(POLL_S)
            continue
        length = sent

        def changed(live: Any = live, length: int = length) -> bool:
            return (
                live.ended or live.set_aside or len(live.prediction.logs if live.prediction else "") > length
            )

        await live.changed.until(changed)
    for uri in (prediction.output or [])[pictures:]:
        pictures += 1
        yield ServerSentEvent(event="output", raw_data=uri, id=f"{sent}-{pictures}")
    if prediction.status == "failed":
        yield ServerSentEvent(event="error", raw_data=prediction.error or "", id=f"{sent}-{pictures}")
    reason = _REASONS.get(prediction.status)
    done = "{}" if reason is None else json.dumps({"reason": reason})
    yield ServerSentEvent(event="done", raw_data=done, id=f"{sent}-{pictures}")


def _current(shared: Shared, record: Record, live: Any) -> Prediction:
    held = shared.store.now(record) or record
    running = None if live is None else live.prediction
    return answer(shared.store, held, running, base=record.base, outputs=shared.settings.outputs)


def _cursor(text: str | None) -> dict[str, int]:
    """What a cursor of ours says. Raises ProblemError for another."""
    if text is None:
        return {}
    try:
        found = _CURSOR.fullmatch(base64.b64decode(text, altchars=b"-_", validate=True).decode("ascii"))
    except (binascii.Error, ValueError):
        found = None
    if found is None:
        raise ProblemError(422, "Invalid cursor", "cursor must be one of a page's URLs")
    return {"before" if found[1] == "<" else "after": int(found[2])}


def _json(model: Prediction | PageOfPredictions, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")
