"""Creations in Cog's way, at the root: without `version`, or under an id of the client's own."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from ritocco.prediction import Prediction
from ritocco.schema import validated
from ritocco.server.bodies import CogRequest, PredictionRequest, read_json
from ritocco.server.creation import ID_PATTERN, Accepted, Key, Preferences, Preferred, accepted, prediction_id
from ritocco.server.document import BODY, STORED, body_of, predictions, problems
from ritocco.server.predictions import created, shown
from ritocco.server.problems import ProblemError
from ritocco.server.state import Shared
from ritocco.server.store import ENDED


def routes(shared: Shared) -> APIRouter:
    """At the root, in the place of the other way to create."""
    router = APIRouter(tags=["predictions"])

    async def answered(held: Accepted, preferred: Preferences) -> Response:
        """Once it has ended, unless the client prefers otherwise; 202 says that it was accepted."""
        if not preferred.at_once:
            await shared.wait(held.record.id, preferred.seconds)
        made = await shared.answer(held.record, held.base)
        only_accepted = held.fresh and preferred.at_once
        return shown(made, 200 if made.status in ENDED and not only_accepted else 202)

    @router.post(
        "/predictions",
        response_model=Prediction,
        responses=predictions(201, 202) | problems(409, *BODY, *STORED),
        openapi_extra=body_of(CogRequest),
    )
    async def create(request: Request, key: Key, preferred: Preferred) -> Response:
        """Create a prediction and wait for its end; with `version`, as under `/v1`."""
        await shared.refuse_if_full(key=key)
        body = await read_json(request)
        if "version" in body:
            asked = validated(PredictionRequest, body, prefix="")
            return await created(
                shared, await accepted(shared, request, asked, prefix="", key=key), preferred
            )
        told = validated(CogRequest, body, prefix="")
        id = None if told.id is None else prediction_id(told.id)
        held = await accepted(shared, request, told, prefix="", key=key, id=id)
        return await answered(held, preferred)

    @router.put(
        "/predictions/{id}",
        response_model=Prediction,
        responses=predictions(202) | problems(409, *BODY, *STORED),
        openapi_extra=body_of(CogRequest),
    )
    async def put(
        id: Annotated[str, Path(json_schema_extra={"pattern": ID_PATTERN})],
        request: Request,
        key: Key,
        preferred: Preferred,
    ) -> Response:
        """Create a prediction of this id and wait for its end, or for that of the one that there is."""
        prediction_id(id)
        await shared.refuse_if_full(key=key, id=id)
        asked = validated(CogRequest, await read_json(request), prefix="")
        if asked.id not in (None, id):
            raise ProblemError(422, "Input validation failed", "- id: Must be the one in the path\n")
        held = await accepted(shared, request, asked, prefix="", key=key, id=id)
        return await answered(held, preferred)

    return router
