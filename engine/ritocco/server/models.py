"""The one model that is served, its versions, and the secret of its webhooks."""

from __future__ import annotations

from fastapi import APIRouter, Request

from ritocco.prediction import MODEL, VERSION
from ritocco.server.document import (
    STORED,
    Document,
    ModelAnswer,
    PageOfVersions,
    SecretAnswer,
    VersionAnswer,
    problems,
)
from ritocco.server.problems import not_found
from ritocco.server.state import Shared

# Clients rewrite the outputs of versions before 0.3.9.
COG_VERSION = "0.16.0"


def routes(shared: Shared, prefix: str, document: Document) -> APIRouter:
    """Under one prefix."""
    router = APIRouter(prefix=prefix, tags=["models"])

    def refuse_other(owner: str, name: str) -> None:
        if f"{owner}/{name}" != MODEL:
            raise not_found()

    def version(id: str, request: Request) -> VersionAnswer:
        schema = document(shared.base(request, ""))
        return VersionAnswer(id=id, created_at=shared.began, cog_version=COG_VERSION, openapi_schema=schema)

    @router.get("/models/{owner}/{name}", response_model=ModelAnswer, responses=problems(404, *STORED))
    def get_model(owner: str, name: str, request: Request) -> ModelAnswer:
        """The model."""
        refuse_other(owner, name)
        return ModelAnswer(
            url=f"{shared.base(request, prefix)}/models/{MODEL}",
            owner=owner,
            name=name,
            description="Fill in masked parts of images with Stable Diffusion.",
            run_count=shared.store.count(),
            latest_version=version(shared.version, request),
        )

    @router.get("/models/{owner}/{name}/versions", response_model=PageOfVersions, responses=problems(404))
    def list_versions(owner: str, name: str, request: Request) -> PageOfVersions:
        """The version that is served."""
        refuse_other(owner, name)
        return PageOfVersions(previous=None, next=None, results=[version(shared.version, request)])

    @router.get("/models/{owner}/{name}/versions/{id}", response_model=VersionAnswer, responses=problems(404))
    def get_version(owner: str, name: str, id: str, request: Request) -> VersionAnswer:
        """A version, with the schema of its inputs. The original's id stands for the one that is served."""
        refuse_other(owner, name)
        if id not in (shared.version, VERSION):
            raise not_found()
        return version(id, request)

    @router.get("/webhooks/default/secret", response_model=SecretAnswer)
    def get_secret() -> SecretAnswer:
        """The secret that webhooks are signed with."""
        return SecretAnswer(key=shared.webhooks.secret)

    return router
