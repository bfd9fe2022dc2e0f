"""The page on a server's app: room, actions, Gradio, and what stands before it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI
from starlette.requests import Request
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Scope

from ritocco.server.hosts import KnownHosts
from ritocco.server.sessions import LOGIN, LOGOUT, PAGE
from ritocco.ui.actions import Actions
from ritocco.ui.front import Front
from ritocco.ui.login import Login
from ritocco.ui.page import BASE, build
from ritocco.ui.room import Room
from ritocco.ui.style import CSS, HEAD, theme

if TYPE_CHECKING:
    from ritocco.server.app import App
    from ritocco.server.settings import Settings
    from ritocco.server.state import Shared

_LOOK_S = 0.05
"""From a call to its begin, at most."""
_UPLOADS = 32
"""Of the largest size, and of a MiB at least, for which there is room."""


def mount(app: App, *, hosts: Sequence[str] = ()) -> None:
    """The page, under `/ui/` of an app of `create_app`, before its first request.

    hosts: names under which it answers besides addresses, `localhost` and that of the public URL, where the
    app has no tokens: another site's page could reach it under a name of its own.
    """
    shared: Shared = app.state.shared
    settings = shared.settings
    closed = bool(shared.sessions.tokens)
    room = Room(settings.data, most_bytes=_UPLOADS * max(settings.max_upload_bytes, 1 << 20))
    app.keep(room)
    actions = Actions(shared, room)
    gradio = _beside_a_loop(
        lambda: _gradio(build(actions, waiting=settings.waiting, logout=closed), room, settings)
    )

    async def start() -> None:
        gradio.get_blocks().run_startup_events()

    def base(scope: Scope) -> str:
        outside = {**scope, "root_path": str(scope.get("root_path", "")).removesuffix(PAGE)}
        return shared.base(Request(outside), "/v1")

    front: ASGIApp = Front(
        gradio,
        room=room,
        start=start,
        stopping=lambda: shared.jobs.stopping,
        base=base,
        base_key=BASE,
        placed=settings.public_url is not None,
        calls={
            number: [(one.label, one.data_model) for one in call.inputs]
            for number, call in gradio.get_blocks().fns.items()
        },
    )
    if not closed:
        names = [*hosts, urlsplit(settings.public_url or "").hostname or "localhost"]
        front = KnownHosts(front, names=names)
    shared.sessions.has_page = True
    login = Login(shared.sessions, public_url=settings.public_url)
    app.router.routes += [
        Route(LOGIN, login.login, methods=["GET", "POST"], include_in_schema=False),
        Route(LOGOUT, login.logout, methods=["POST"], include_in_schema=False),
        Mount(PAGE, front),
    ]


def _gradio(blocks: gr.Blocks, room: Room, settings: Settings) -> Any:
    """Gradio's app, with everything off that the page does not need, and its files in the room."""
    outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    public = settings.public_url
    gr.mount_gradio_app(
        outer,
        blocks,
        PAGE,
        footer_links=[],
        run_history=False,
        root_path=None if public is None else f"{public.rstrip('/')}{PAGE}",
        allowed_paths=[],
        show_error=False,
        max_file_size=settings.max_upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
        head=HEAD,
    )
    app: Any = next(route.app for route in outer.routes if isinstance(route, Mount))
    app.uploaded_file_dir = str(room.path)
    for block in blocks.blocks.values():
        block.GRADIO_CACHE = str(room.path)
    # After every call it would make a table of the last ten thousand.
    vars(blocks._queue).update(compute_analytics_summary=lambda records: None)
    # Gradio's queue looks for calls a thousand times a second, which takes a tenth of a core for ever.
    blocks._queue.sleep_when_free = _LOOK_S
    return app


def _beside_a_loop(make: Callable[[], Any]) -> Any:
    """`make()` where an event loop runs: elsewhere Gradio makes some, sets them, and leaves them open."""

    async def made() -> Any:
        return make()

    with ThreadPoolExecutor(1, thread_name_prefix="ritocco-page") as pool:
        return pool.submit(asyncio.run, made()).result()
