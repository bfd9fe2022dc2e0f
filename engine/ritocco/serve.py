"""`ritocco serve` and `ritocco ui`: the server on the command line. What it needs, it imports as it runs."""

from __future__ import annotations

import inspect
import ipaddress
import logging
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from ritocco.cli_options import Backend, Devices, Dtype, MemoryBudget, Model, TokenizerFolder, Variant
from ritocco.errors import BackendError, RequestError
from ritocco.fetch import Fetcher

if TYPE_CHECKING:
    import uvicorn

    from ritocco.server.again import Listener
    from ritocco.server.app import App

_DATA = Path("ritocco-data")
_DAY_H = 24.0
_MIB = 1 << 20
_MAX_HEADER_BYTES = 32 << 10
_BACKLOG = 2048
_MOST_CONNECTIONS, _OWN_FILES = 10_000, 200


def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one, and prints it.")] = 5000,
    token_file: Annotated[
        Path | None, typer.Option(help="Bearer tokens, one a line. Needed beyond this machine.")
    ] = None,
    no_tokens: Annotated[
        bool, typer.Option("--no-tokens", help="Let everybody in who can reach a public address.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of predictions and files. Default: ritocco-data.")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            envvar="RITOCCO_DATABASE",
            help="postgresql://..., for several servers, in the place of --data; see docs/many-servers.md.",
        ),
    ] = None,
    gone_after: Annotated[
        float, typer.Option(help="Seconds after which another server on the database is taken for gone.")
    ] = 10.0,
    device: Devices = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    memory_budget: MemoryBudget = None,
    variant: Variant = None,
    tokenizer: TokenizerFolder = None,
    waiting: Annotated[int, typer.Option(min=1, help="Most predictions unfinished at a time.")] = 64,
    retention_hours: Annotated[float, typer.Option(help="Hours that inputs and outputs are kept.")] = _DAY_H,
    max_work: Annotated[
        int | None, typer.Option(min=1, help="Most steps x outputs x pixels of a prediction.")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds that a prediction may take.")] = None,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest request, MiB.")] = 64,
    max_upload_mib: Annotated[int, typer.Option(min=1, help="Largest uploaded file, MiB.")] = 32,
    outputs: Annotated[
        str, typer.Option(help="url, data, or auto: URLs where reached by https, else data URIs.")
    ] = "auto",
    public_url: Annotated[str | None, typer.Option(help="Root under which clients reach it.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Further names of this server, where it has no tokens.")
    ] = None,
    allow_network: Annotated[
        list[str] | None, typer.Option(help="Network that pictures and webhooks may be in: 10.0.0.0/8.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Web page that may call: https://app.example.")
    ] = None,
    grace: Annotated[float, typer.Option(help="Seconds that running predictions get at SIGTERM.")] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="The playground too, under /ui/.")] = False,
) -> None:
    """Serve Replicate's API on this machine."""
    try:
        import uvicorn

        from ritocco.loading import load_on_each
        from ritocco.server import again
        from ritocco.server.app import create_app
        from ritocco.server.connections import limited
        from ritocco.server.hosts import KnownHosts
        from ritocco.server.settings import Settings, read_tokens

        if ui:
            import ritocco.ui.playground  # now, since loading may take minutes
    except ModuleNotFoundError as error:
        extra = "ui" if error.name == "gradio" else "server"
        raise BackendError(f'the server needs {error.name}; pip install "ritocco[{extra}]"') from error
    tokens = () if token_file is None else read_tokens(token_file)
    if not (tokens or no_tokens or _is_loopback(host)):
        raise RequestError(
            f"--host is {host!r}, which others can reach; name --token-file, or let everybody in with "
            "--no-tokens",
            field="host",
        )
    fetcher = Fetcher.from_environment(allow_networks=tuple(allow_network or ()))
    settings = Settings(
        tokens=tokens,
        data=data or (_DATA if database is None else None),
        database=database,
        gone_after_s=gone_after,
        waiting=waiting,
        retention_s=retention_hours * 3600,
        max_work=max_work,
        time_limit_s=time_limit,
        max_body_bytes=max_body_mib * _MIB,
        max_upload_bytes=max_upload_mib * _MIB,
        outputs=_one_of("outputs", outputs),
        public_url=public_url,
        cors_origins=tuple(cors_origin or ()),
        fetcher=fetcher,
        grace_s=grace,
    )
    _log_to_stderr(log_level)
    load: dict[str, Any] = {"dtype": dtype, "backend": backend, "memory_budget": memory_budget}
    load |= {"variant": variant, "tokenizer": tokenizer, "fetcher": fetcher}
    engines = load_on_each(model, device, **load)
    app = create_app(engines, settings)
    if ui:
        ritocco.ui.mount(app, hosts=[host, *(allow_host or ())])
    if not tokens:
        names = [host, urlsplit(public_url or "").hostname or host, *(allow_host or ())]
        app.add_middleware(KnownHosts, names=names)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,  # there is one of ours, without names that open something
        server_header=False,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        http=limited(_most_connections()),
        ws="none",
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(grace) + 15,
    )
    listener = again.inherited() or config.bind_socket()
    try:
        _server(config, app, listener, page=ui).run(sockets=[listener.dup()])
    finally:
        app.close()
        if app.lost:
            again.start(listener)
        for engine in engines:
            engine.close()


def with_page() -> Callable[..., None]:
    """The command `ritocco ui`: as `serve` with the playground, and all its other options."""

    @wraps(serve)
    def page(**options: Any) -> None:
        serve(**options, ui=True)

    asked = inspect.signature(serve, eval_str=True)  # of texts Typer sees the types, and no option
    kept = [one for one in asked.parameters.values() if one.name != "ui"]
    page.__signature__ = asked.replace(parameters=kept)  # type: ignore[attr-defined]
    page.__doc__ = "Serve the playground, a page to paint masks on, under /ui/ beside Replicate's API."
    return page


def _server(config: uvicorn.Config, app: App, listener: Listener, *, page: bool) -> uvicorn.Server:
    """Uvicorn's, which says where it listens, lets go of whoever would wait in vain at SIGTERM, and ends
    where the device is lost; then `listener` stays open for the next process.
    """
    import uvicorn

    class Server(uvicorn.Server):
        _asked = False

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            typer.echo(f"listening on {url}", err=True)
            if page:
                typer.echo(f"the playground is at {url}/ui/", err=True)

        async def shutdown(self, sockets: Any = None) -> None:
            if not app.lost:
                listener.close()
            await super().shutdown(sockets)

        async def on_tick(self, counter: int) -> bool:
            return app.lost or await super().on_tick(counter)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            def stop() -> None:
                app.drain()
                super(Server, self).handle_exit(sig, frame)

            # The handler interrupts whatever holds locks, so these are asked for elsewhere.
            asked, self._asked = self._asked, True
            threading.Thread(target=app.hurry if asked else stop, name="ritocco-stop").start()

    return Server(config)


def _most_connections() -> int:
    """What the system lets a process open, less what the server does itself; a shell's limit is raised."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return _MOST_CONNECTIONS
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # macOS says "infinite", and takes less
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(_MOST_CONNECTIONS, allowed - _OWN_FILES))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _one_of(name: str, given: str) -> Literal["auto", "url", "data"]:
    match given:
        case "auto" | "url" | "data":
            return given
    raise RequestError(f"--{name} is {given!r}; it must be auto, url or data", field=name)


def _log_to_stderr(level: str) -> None:
    from ritocco.server.logs import JsonLines

    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise RequestError(
            f"--log-level is {level!r}; it must be debug, info, warning or error", field="log_level"
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("ritocco", "uvicorn", "asyncio", "psycopg"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(number if name != "psycopg" else max(number, logging.WARNING))
