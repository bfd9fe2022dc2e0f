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
from ritocco.server.bodies import PredictionRequest, read_json
from ritocco.server.creation import Accepted, Key, Preferences, Preferred, accepted
from ritocco.server.database import AwayError
from ritocco.server.document import BODY, STORED, PageOfPredictions, body_of, problems
from ritocco.server.problems import ProblemError, not_found
from ritocco.server.state import POLL_S, Shared
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
    """Under one prefix. At the root, creations are Cog's; see `cog.py`."""
    router = APIRouter(prefix=prefix, tags=["predictions"])

    if prefix:

        @router.post(
            "/predictions",
            status_code=201,
            response_model=Prediction,
            responses=problems(409, *BODY, *STORED),
            openapi_extra=body_of(PredictionRequest),
        )
        async def create(request: Request, key: Key, preferred: Preferred) -> Response:
            """Create a prediction. `Prefer: wait=n` holds the answer for at most n seconds."""
            await shared.refuse_if_full(key=key)
            asked = validated(PredictionRequest, await read_json(request), prefix="")
            held = await accepted(shared, request, asked, prefix=prefix, key=key)
            return await created(shared, held, preferred)

    @router.post(
        "/models/{owner}/{name}/predictions",
        status_code=201,
        response_model=Prediction,
        responses=problems(404, 409, *BODY, *STORED),
        openapi_extra=body_of(PredictionRequest),
    )
    async def create_by_model(
        owner: str, name: str, request: Request, key: Key, preferred: Preferred
    ) -> Response:
        """Create a prediction of a model's latest version."""
        if f"{owner}/{name}" != MODEL:
            raise not_found()
        await shared.refuse_if_full(key=key)
        asked = validated(PredictionRequest, await read_json(request), prefix="")
        held = await accepted(shared, request, asked, prefix=prefix, key=key)
        return await created(shared, held, preferred)

    @router.get("/predictions", response_model=PageOfPredictions, responses=problems(422, *STORED))
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
        return shown(held)

    @router.get("/predictions/{id}", response_model=Prediction, responses=problems(404, *STORED))
    async def get(request: Request, record: Found) -> Response:
        """A prediction as it stands."""
        return shown(await shared.answer(record, shared.base(request, prefix)))

    @router.post("/predictions/{id}/cancel", response_model=Prediction, responses=problems(404, *STORED))
    async def cancel(request: Request, record: Found) -> Response:
        """End a prediction between two steps. One that has ended stays as it is."""
        await run_in_threadpool(shared.jobs.cancel, record.id)
        await shared.wait(record.id, _CANCEL_WAIT_S)
        return shown(await shared.answer(record, shared.base(request, prefix)))

    @router.get(
        "/stream/{name}",
        response_class=EventSourceResponse,
        responses=problems(404, *STORED),
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


async def created(shared: Shared, held: Accepted, preferred: Preferences) -> Response:
    """The answer to a creation in Replicate's way, once the client does not want to wait any more."""
    if preferred.seconds and not preferred.at_once:
        await shared.wait(held.record.id, preferred.seconds)
    return shown(await shared.answer(held.record, held.base, patient=False), 201)


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


def shown(model: Prediction | PageOfPredictions, status: int = 200) -> Response:
    """As JSON."""
    return Response(model.model_dump_json(), status, media_type="application/json")
