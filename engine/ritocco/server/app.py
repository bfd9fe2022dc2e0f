"""`create_app`: the routes, the gate before them, the queue behind them. The server's file to read first."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from ritocco.batcher import Batcher
from ritocco.engine import Engine
from ritocco.errors import BackendError
from ritocco.fetch import Fetcher
from ritocco.prediction import VERSION, timestamp
from ritocco.server import cog, health, models, predictions, uploads
from ritocco.server.database import StorageError, setting
from ritocco.server.dispatch import Dispatch
from ritocco.server.document import Document
from ritocco.server.gate import PREFIXES, SEND_TIMEOUT_S, BodyLimits, Gate, SendLimits
from ritocco.server.jobs import FETCHING, Jobs
from ritocco.server.logs import AccessLog
from ritocco.server.metrics import Metrics
from ritocco.server.problems import install
from ritocco.server.sessions import Sessions, Tokens
from ritocco.server.settings import Settings
from ritocco.server.state import Shared
from ritocco.server.store import Store
from ritocco.server.webhooks import Webhooks

if TYPE_CHECKING:
    from ritocco.server.tending import Tending

_CLEAN_EVERY_S = 600.0

_log = logging.getLogger(__name__)


class Room(Protocol):
    """Something that holds what people sent."""

    def clean(self, retention_s: float) -> None:
        """Remove what is older than so many seconds."""

    def close(self) -> None:
        """Remove it all."""


class App(FastAPI):
    """Owns threads and a folder: `close` it where nobody runs its lifespan, as under another app."""

    _parts: _Parts

    def build_middleware_stack(self) -> ASGIApp:
        """The framework's, inside what has to see its answers to errors too."""
        return SendLimits(AccessLog(super().build_middleware_stack()), seconds=SEND_TIMEOUT_S)

    @property
    def lost(self) -> bool:
        """Whether the device is lost to this process: `close`, and start another, which goes on."""
        return self._parts.shared.jobs.lost

    def begin_stop(self) -> None:
        """Accept nothing more; `close` has to follow."""
        self._parts.shared.jobs.begin_stop()

    def drain(self) -> None:
        """Accept nothing more, and finish what runs within `grace_s`; `close` has to follow."""
        self._parts.drain()

    def hurry(self) -> None:
        """Have `drain` and `close` wait for no prediction: what runs begins again after the next start."""
        self._parts.shared.jobs.hurry()

    def keep(self, room: Room) -> None:
        """Have a room beside the data folder cleaned and closed with it."""
        self._parts.rooms.append(room)

    def close(self) -> None:
        """Finish what runs, within the settings' `grace_s`, and let go of everything. Again does nothing."""
        self._parts.close()


def create_app(engine: Engine | Sequence[Engine] | Dispatch, settings: Settings | None = None) -> App:
    """Replicate's API as an ASGI app, to run with uvicorn or to mount under a prefix of another app.

    engine: one, several of one checkpoint, a Batcher, or what stands for one; the caller closes the latter.
    Raises BackendError where the data folder or the database can't be used.
    """
    settings = settings or Settings()
    parts = _Parts(engine, settings)
    shared = parts.shared

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(app.close)

    app = App(
        title="ritocco",
        version=version("ritocco"),
        summary="Stable Diffusion inpainting with Replicate's API.",
        openapi_url=None,  # a route of ours, since it is behind the gate under every prefix
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.shared, app._parts = shared, parts
    document = Document(app, protected=bool(settings.tokens))
    app.openapi = document  # type: ignore[method-assign]
    routers = [(health.routes(shared), True), (cog.routes(shared), True)]
    for prefix in PREFIXES:  # the document shows one of them, and what is Cog's
        routers += [
            (predictions.routes(shared, prefix), prefix in ("", "/v1")),
            (uploads.routes(shared, prefix), prefix == "/v1"),
            (models.routes(shared, prefix, document), prefix == "/v1"),
        ]
    for router, shown in routers:
        app.include_router(router, include_in_schema=shown)

    @app.get("/openapi.json", include_in_schema=False)
    def openapi(request: Request) -> dict[str, Any]:
        """The OpenAPI document."""
        return document(shared.base(request, ""))

    install(app, [route for router, _ in routers for route in router.routes], shared.metrics)
    # Outermost last.
    app.add_middleware(
        BodyLimits,
        most=settings.max_body_bytes,
        most_upload=settings.max_upload_bytes,
        seconds=settings.body_timeout_s,
        metrics=shared.metrics,
    )
    app.add_middleware(
        Gate,
        sessions=shared.sessions,
        origins=settings.cors_origins,
        public_url=settings.public_url,
        metrics=shared.metrics,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Prefer"],
        )
    parts.begin()
    return app


class _Parts:
    """What has to be closed, in its order."""

    def __init__(self, engine: Engine | Sequence[Engine] | Dispatch, settings: Settings) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        store = self._store(settings)
        self._owned: Batcher | None = None
        try:
            self._put_together(engine, settings, store)
        except BaseException as error:
            if self._owned is not None:
                self._owned.close(drain=False)
            store.close()
            if self._temporary is not None:
                self._temporary.cleanup()
            if isinstance(error, StorageError):
                raise BackendError(f"what an earlier process left can't be read: {error}") from error
            raise

    def _put_together(
        self, engine: Engine | Sequence[Engine] | Dispatch, settings: Settings, store: Store
    ) -> None:
        batcher: Dispatch
        if isinstance(engine, Engine | Sequence):
            engines = [engine] if isinstance(engine, Engine) else list(engine)
            batcher = self._owned = Batcher(
                engines,
                waiting=settings.waiting + FETCHING,  # canceled ones may still be fetching
                time_limit=settings.time_limit_s,
            )
        else:
            batcher = engine
        metrics = Metrics()
        webhooks = Webhooks(store, settings.fetcher or Fetcher.from_environment())
        self.shared = Shared(
            settings=settings,
            store=store,
            jobs=Jobs(store, batcher, webhooks, metrics, settings),
            webhooks=webhooks,
            metrics=metrics,
            sessions=Sessions(Tokens(settings.tokens)),
            version=batcher.version or VERSION,
            began=setting(store.database, "began", timestamp()),
        )
        self._tending = _tending(self.shared)
        self.rooms: list[Room] = []
        self._draining, self._drained = threading.Lock(), False
        self._closing = threading.Lock()
        self._closed = False
        self._wake = threading.Event()
        self._cleaner = threading.Thread(target=self._clean, name="ritocco-clean", daemon=True)
        self._cleaner.start()

    def _store(self, settings: Settings) -> Store:
        if settings.database is not None:
            return _shared_store(settings, settings.database)
        folder = settings.data
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="ritocco-")
            folder = Path(self._temporary.name)
        return Store(folder, waiting=settings.waiting)

    def begin(self) -> None:
        """Take up what an earlier process left, and what other servers do. Raises BackendError."""
        try:
            self.shared.jobs.resume()
        except BaseException as error:
            self.close()
            if isinstance(error, StorageError):
                raise BackendError(f"what an earlier process left can't be read: {error}") from error
            raise
        if self._tending is not None:
            self._tending.start()

    def drain(self) -> None:
        with self._draining:
            if not self._drained:
                self.shared.jobs.stop()
                self._drained = True

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._wake.set()
            self.drain()
            if self._owned is not None:
                self._owned.close(drain=False, timeout=self.shared.settings.grace_s)
            self.shared.webhooks.close()
            self._cleaner.join()
            if self._tending is not None:
                self._tending.close()
            for room in self.rooms:
                room.close()
            self.shared.store.close()
            if self._temporary is not None:
                self._temporary.cleanup()

    def _clean(self) -> None:
        every = min(_CLEAN_EVERY_S, self.shared.settings.retention_s / 10)
        while not self._wake.wait(every):
            for room in self.rooms:
                room.clean(self.shared.settings.retention_s)
            try:
                removed = self.shared.store.clean(self.shared.settings.retention_s)
            except StorageError as error:
                _log.error("not cleaned", extra={"error": str(error)})
            else:
                if removed:
                    _log.info("cleaned", extra={"predictions": removed})


def _shared_store(settings: Settings, url: str) -> Store:
    try:
        from ritocco.server.shared_store import SharedStore
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ritocco"):
            raise
        raise BackendError(f'a database needs {error.name}; pip install "ritocco[postgres]"') from error
    return SharedStore(url, waiting=settings.waiting, gone_after_s=settings.gone_after_s)


def _tending(shared: Shared) -> Tending | None:
    if not shared.store.has_others:
        return None
    from ritocco.server.shared_store import SharedStore
    from ritocco.server.tending import Tending

    assert isinstance(shared.store, SharedStore)  # noqa: S101 - nothing else has others
    return Tending(shared.store, shared.jobs, shared.webhooks)
