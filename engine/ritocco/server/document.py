"""The OpenAPI document: what FastAPI makes of the routes, and what the original's clients look for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict

from ritocco.images import data_uri, encode
from ritocco.prediction import MODEL, Prediction
from ritocco.schema import EXTENSIONS_KEY, Options, PredictionInput
from ritocco.server.bodies import CogRequest, PredictionRequest

_REF = "#/components/schemas/{model}"
_WORDS = {
    400: "Malformed",
    401: "No valid token",
    403: "Of a page of another site",
    404: "Not found",
    408: "The body came too slowly",
    409: "The id or key stands for another request",
    413: "Too large",
    415: "Of another type",
    416: "Begins beyond the end",
    422: "Breaks a rule, which is named",
    429: "The queue, or the room for bodies, is full",
    503: "Not now: about to stop, or without its engine or its database",
    507: "The disk is full, or damaged",
}
BODY = (400, 408, 413, 415, 422, 429)
"""What a route may answer that reads a body."""
STORED = (503, 507)
"""What a route may answer that reads or writes what is kept."""


class Problem(BaseModel):
    """The body of every error."""

    title: str
    detail: str
    status: int
    invalid_fields: list[InvalidField] | None = None


class InvalidField(BaseModel):
    """One broken rule."""

    type: str
    field: str
    description: str


class Health(BaseModel):
    """`ok`, or what is wrong."""

    status: str


class CogHealth(BaseModel):
    """In Cog's words."""

    status: Literal["READY", "BUSY", "DEFUNCT"]
    setup: dict[str, str]


class _Page(BaseModel):
    previous: str | None
    next: str | None


class PageOfPredictions(_Page):
    """Predictions, the latest first; URLs of the pages beside."""

    results: list[Prediction]


class FileAnswer(BaseModel):
    """An upload."""

    id: str
    name: str
    content_type: str
    size: int
    etag: str
    checksums: dict[str, str]
    metadata: dict[str, Any]
    created_at: str
    expires_at: str
    urls: dict[str, str]


class PageOfFiles(_Page):
    """Uploads, the latest first."""

    results: list[FileAnswer]


class VersionAnswer(BaseModel):
    """A version of the model."""

    id: str
    created_at: str
    cog_version: str
    openapi_schema: dict[str, Any]


class PageOfVersions(_Page):
    """The versions."""

    results: list[VersionAnswer]


class ModelAnswer(BaseModel):
    """The model."""

    model_config = ConfigDict(protected_namespaces=())

    url: str
    owner: str
    name: str
    description: str
    visibility: str = "private"
    github_url: str | None = None
    paper_url: str | None = None
    license_url: str | None = None
    run_count: int
    cover_image_url: str | None = None
    default_example: dict[str, Any] | None = None
    latest_version: VersionAnswer


class SecretAnswer(BaseModel):
    """`whsec_` and base64."""

    key: str


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's errors, without the gate's."""
    return {status: _answer(_WORDS[status], Problem) for status in statuses}


def predictions(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """A route's answers that show a prediction, beside the usual one."""
    words = {201: "Created", 202: "Accepted, and perhaps not ended"}
    return {status: _answer(words[status], Prediction) for status in statuses}


def health(status: int, words: str) -> dict[int | str, dict[str, Any]]:
    """A route's answer where something is wrong."""
    return {status: _answer(words, Health)}


def _answer(words: str, model: type[BaseModel]) -> dict[str, Any]:
    # By reference: FastAPI would make a validator of each.
    return {"description": words, "content": {"application/json": {"schema": _ref(model)}}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """A route's JSON body, which it reads itself."""
    grey, white = (data_uri(encode(np.full((8, 8, 3), shade, np.uint8), "png")) for shade in (128, 255))
    small = {"width": 64, "height": 64, "num_inference_steps": 1}
    example = {"input": {"image": grey, "mask": white, "prompt": "a yellow cat", **small}}
    content = {"application/json": {"schema": _ref(model), "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def form_of_file() -> dict[str, Any]:
    """The upload's form."""
    schema = {
        "type": "object",
        "required": ["content"],
        "properties": {
            "content": {"type": "string", "format": "binary"},
            "metadata": {"type": "string", "contentMediaType": "application/json"},
        },
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


class Document:
    """Made once, when it is asked for. protected: there are tokens."""

    def __init__(self, app: FastAPI, *, protected: bool) -> None:
        self._app, self._protected = app, protected
        self._lock = threading.Lock()
        self._made: dict[str, Any] = {}

    def __call__(self, base: str | None = None) -> dict[str, Any]:
        """base: URL of the app as a client reaches it, without a slash at the end."""
        with self._lock:
            if not self._made:
                self._made = _document(self._app, protected=self._protected)
        return self._made if base is None else {**self._made, "servers": [{"url": base}]}


def _document(app: FastAPI, *, protected: bool) -> dict[str, Any]:
    made = get_openapi(
        title=MODEL, version=app.version, routes=app.routes, summary=app.summary, description=app.description
    )
    schemas: dict[str, Any] = made["components"]["schemas"]
    schemas["Problem"] = Problem.model_json_schema(ref_template=_REF)
    schemas |= schemas["Problem"].pop("$defs")
    for model in (PredictionRequest, CogRequest):
        schemas[model.__name__] = model.model_json_schema(ref_template=_REF)
        schemas[model.__name__]["properties"]["input"] = {"$ref": _REF.format(model="Input")}
    schemas["Input"] = {**PredictionInput.model_json_schema(), "title": "Input"}
    schemas["Options"] = {
        **Options.model_json_schema(),
        "description": "What is ours and not the original's.",
    }
    schemas["Input"]["properties"][EXTENSIONS_KEY] = {"$ref": _REF.format(model="Options"), "x-order": 12}
    uri = {"type": "string", "format": "uri"}
    schemas["Output"] = {"title": "Output", "type": "array", "items": uri}
    for path in made["paths"].values():
        for method, operation in path.items():
            answers = operation["responses"]
            # FastAPI expects that parameters can be wrong; these are texts, and what is wrong is a Problem.
            if "HTTPValidationError" in str(answers.get("422")):
                del answers["422"]
            # It writes OpenAPI 3.2's `itemSchema` into a document of 3.1.
            if "text/event-stream" in answers.get("200", {}).get("content", ()):
                answers["200"]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
            for status in _of_the_gate(method, operation, protected=protected):
                answers[str(status)] = _answer(_WORDS[status], Problem)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if protected:
        made["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"bearer": []}]
    return made


def _of_the_gate(method: str, operation: dict[str, Any], *, protected: bool) -> Sequence[int]:
    """What is answered before a route is asked; see `gate.py`."""
    if operation.get("security") == []:
        return ()
    if protected:
        return (401,)
    return () if method == "get" else (403,)
