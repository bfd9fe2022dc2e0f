"""The OpenAPI document: what FastAPI makes of the routes, and what the original's clients look for."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict

from ritocco.prediction import MODEL, Prediction
from ritocco.schema import EXTENSIONS_KEY, Options, PredictionInput
from ritocco.server.bodies import CogRequest, PredictionRequest

_REF = "#/components/schemas/{model}"
_WORDS = {
    400: "Malformed",
    401: "No valid token",
    404: "Not found",
    408: "The body came too slowly",
    409: "The id stands for another request",
    413: "Too large",
    415: "Of another type",
    422: "Breaks a rule, which is named",
    429: "The queue is full",
    503: "About to stop, or without its database",
}


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
    """A route's errors. By reference: FastAPI would make a validator of each."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Problem")}}}
    return {status: {"description": _WORDS[status], "content": content} for status in statuses}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """A route's JSON body, which it reads itself."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


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


def document(app: FastAPI, *, protected: bool) -> dict[str, Any]:
    """Made once. protected: there are tokens."""
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
    # FastAPI writes OpenAPI 3.2's `itemSchema` into a document of 3.1.
    made["paths"]["/v1/stream/{name}"]["get"]["responses"]["200"]["content"] = {
        "text/event-stream": {"schema": {"type": "string"}}
    }
    # It expects that parameters can be wrong; these are texts, and whatever is wrong is a Problem.
    for operation in (one for path in made["paths"].values() for one in path.values()):
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if protected:
        made["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"bearer": []}]
    return made
