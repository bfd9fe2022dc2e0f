"""The answer of `predict`: every field of the HTTP answer of the model that this one stands in for."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from ritocco.schema import echo
from ritocco.shown import plain

MODEL = "stability-ai/stable-diffusion-inpainting"
VERSION = "95b7223104132402a9ae91cc677285bc5eb997834bd2349fa486f53910fd68b3"

Status: TypeAlias = Literal["starting", "processing", "succeeded", "failed", "canceled"]

# Crockford's base32 without i, l, o and u; 26 letters hold 130 bits, so an id can't be guessed.
_ID_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id() -> str:
    """A random id: 26 lower-case letters and digits, 130 bits, safe in URLs and file names."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(26))


def timestamp() -> str:
    """Now in UTC, ISO 8601 with milliseconds: `2025-07-12T07:27:54.577Z`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Urls(BaseModel):
    """Where a server answers about a prediction; empty texts where no server made it."""

    cancel: str = ""
    get: str = ""
    stream: str = ""
    web: str = ""


class Prediction(BaseModel):
    """The answer: every field of the HTTP answer, plus pictures, which are not part of its JSON.

    input: what was asked, as `echo` writes it. output: URIs, one per image; None until there are some.
    metrics: seconds and counts, `predict_time` among them. images: PIL images in the order of `output`.
    before, mask: PIL images of the size painted at, once it has ended; for notebooks.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_assignment=True)

    id: str = Field(default_factory=new_id)
    model: str = MODEL
    version: str = VERSION
    input: Annotated[dict[str, Any], BeforeValidator(echo)] = Field(default_factory=dict)
    logs: str = ""
    output: list[str] | None = None
    data_removed: bool = False
    error: str | None = None
    status: Status = "starting"
    created_at: str = Field(default_factory=timestamp)
    started_at: str | None = None
    completed_at: str | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    urls: Urls = Field(default_factory=Urls)
    images: SkipJsonSchema[list[Any]] = Field(default_factory=list, exclude=True, repr=False)

    before: SkipJsonSchema[Any] = Field(default=None, exclude=True, repr=False)
    mask: SkipJsonSchema[Any] = Field(default=None, exclude=True, repr=False)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Without megabytes of data URIs."""
        for name, value in super().__repr_args__():
            yield name, [plain(one) for one in value] if name == "output" and value else value

    def _repr_html_(self) -> str:
        from ritocco.notebook import prediction_html

        return prediction_html(self)

    def _repr_png_(self) -> bytes | None:
        from ritocco.notebook import prediction_png

        return prediction_png(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """The HTTP answer as JSON text."""
        return self.model_dump_json(indent=indent)
