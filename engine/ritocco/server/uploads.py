"""Files: uploads of clients, which they name in an input; outputs, open to whoever knows their name."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.responses import MalformedRangeHeader, RangeNotSatisfiable

from ritocco.schema import Violation, echo
from ritocco.server.bodies import strict_object
from ritocco.server.database import StorageError
from ritocco.server.document import BODY, STORED, FileAnswer, PageOfFiles, form_of_file, problems
from ritocco.server.files import StoredFile
from ritocco.server.problems import ProblemError, not_found
from ritocco.server.state import Shared
from ritocco.shown import plain, said

_MAX_METADATA = 16 << 10
_NAME_CHARS = 200


def _found(id: str, request: Request) -> StoredFile:
    file: StoredFile | None = request.app.state.shared.store.files.find(id)
    if file is None or file.prediction is not None:
        raise not_found()
    return file


Found = Annotated[StoredFile, Depends(_found)]


def routes(shared: Shared, prefix: str) -> APIRouter:
    """Under one prefix."""
    router = APIRouter(prefix=prefix, tags=["files"])

    def shown(file: StoredFile, base: str) -> FileAnswer:
        made = datetime.fromisoformat(file.created_at)
        gone = made + timedelta(seconds=shared.settings.retention_s)
        return FileAnswer(
            id=file.id,
            name=file.name,
            content_type=file.content_type,
            size=file.size,
            etag=file.sha256,
            checksums={"sha256": file.sha256},
            metadata=echo(json.loads(file.metadata)),
            created_at=file.created_at,
            expires_at=gone.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            urls={"get": f"{base}/files/{file.id}"},
        )

    @router.post(
        "/files",
        status_code=201,
        response_model=FileAnswer,
        responses=problems(*BODY, *STORED),
        openapi_extra=form_of_file(),
    )
    async def upload(request: Request) -> FileAnswer:
        """Keep a file, whose URL can then be an input. Parts: `content`; `metadata`, a JSON object."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            detail = f"Content-Type is {plain(kind)!r}; it must be multipart/form-data"
            raise ProblemError(415, "Unsupported media type", detail)
        async with _form(request) as form:
            content = form.get("content")
            if not isinstance(content, UploadFile):
                raise _wrong("content", "required", "content is required, and is a file")
            data = await content.read(shared.settings.max_upload_bytes + 1)
            if len(data) > shared.settings.max_upload_bytes:
                detail = f"A file may have at most {shared.settings.max_upload_bytes} bytes"
                raise ProblemError(413, "Payload too large", detail)
            name = plain(content.filename or "file", _NAME_CHARS)
            content_type = plain(content.content_type or "application/octet-stream", _NAME_CHARS)
            metadata = await _metadata(form)

        def keep() -> StoredFile:
            made = shared.store.files.write(data, name=name, content_type=content_type, metadata=metadata)
            shared.store.files.record(made)
            return made

        return shown(await run_in_threadpool(keep), shared.base(request, prefix))

    @router.get("/files", response_model=PageOfFiles, responses=problems(*STORED))
    async def list_files(request: Request) -> PageOfFiles:
        """The latest hundred uploads."""
        held = await run_in_threadpool(shared.store.files.uploads, 100)
        base = shared.base(request, prefix)
        return PageOfFiles(previous=None, next=None, results=[shown(one, base) for one in held])

    @router.get("/files/{id}", response_model=FileAnswer, responses=problems(404, *STORED))
    async def get(request: Request, file: Found) -> FileAnswer:
        """What is known of an upload."""
        return shown(file, shared.base(request, prefix))

    @router.delete("/files/{id}", status_code=204, responses=problems(404, *STORED))
    def delete(file: Found) -> Response:
        """Delete an upload."""
        if not shared.store.files.delete(file.id):
            raise not_found()
        return Response(status_code=204)

    def output(id: str, name: str) -> Response:
        """A picture. No token: the address can't be guessed."""
        file = shared.store.files.find(id)
        if file is None or file.prediction is None or file.name != name:
            raise not_found()
        if not shared.store.files.there(file):
            raise not_found()
        headers = {
            "Cache-Control": "private, max-age=3600",
            "Content-Security-Policy": "default-src 'none'",
            "X-Content-Type-Options": "nosniff",
        }
        path = shared.store.files.path(file)
        if path is None:
            return Response(shared.store.files.read(file), media_type=file.content_type, headers=headers)
        return _Picture(path, media_type=file.content_type, headers=headers)

    kinds: dict[str, Any] = {"image/png": {}, "image/jpeg": {}, "image/webp": {}}
    pictures: dict[int | str, dict[str, Any]] = {
        200: {"content": kinds},
        206: {"description": "A part", "content": kinds | {"multipart/byteranges": {}}},
    }
    router.get(
        "/outputs/{id}/{name}",
        response_class=FileResponse,
        responses=pictures | problems(404, 416, *STORED),
        openapi_extra={"security": []},
    )(output)
    router.head("/outputs/{id}/{name}", include_in_schema=False)(output)
    return router


class _Picture(FileResponse):
    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        """None where it is no range, which is passed over then. [RFC 9110, 14.2]"""
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            return []
        except RangeNotSatisfiable:
            detail = f"The file has {file_size} bytes"
            beyond = {"Content-Range": f"bytes */{file_size}"}
            raise ProblemError(416, "Range not satisfiable", detail, headers=beyond) from None


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    """Its parts, large ones in the system's folder for temporary files. Raises StorageError, ProblemError."""
    try:
        async with request.form(max_files=8, max_fields=8, max_part_size=_MAX_METADATA) as form:
            yield form
    except UnicodeError as error:  # the charset is one that decodes nothing
        raise ProblemError(400, "Malformed form", f"The form can't be read: {said(error, 200)}") from None
    except OSError as error:
        raise StorageError(f"nothing can be stored: {error}") from error


async def _metadata(form: FormData) -> str:
    """The part `metadata` as JSON text of an object; some clients send it as a file."""
    given = form.get("metadata")
    if not given or (isinstance(given, UploadFile) and not given.size):
        return "{}"
    try:
        raw = await given.read(_MAX_METADATA + 1) if isinstance(given, UploadFile) else given.encode()
        held = strict_object(raw) if len(raw) <= _MAX_METADATA else None
    except ValueError:
        held = None
    # `echo` changes what answers can't hold: half a surrogate pair, an endless number, what is nested deeply.
    if held is None or echo(held) != held:
        rule = f"Must be a JSON object of at most {_MAX_METADATA} bytes and 16 levels, of texts and numbers"
        raise _wrong("metadata", "invalid_type", rule)
    return json.dumps(held)


def _wrong(field: str, kind: str, description: str) -> ProblemError:
    violation = Violation(type=kind, field=field, description=description)
    return ProblemError(422, "Input validation failed", f"- {field}: {description}\n", fields=[violation])
