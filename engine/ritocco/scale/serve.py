"""Ritocco on Ray Serve: `serve run ritocco.scale.serve:app model=/models/inpainting painters=2`.

Two deployments. *Fronts* answer HTTP, as `ritocco serve` does, and keep predictions in a store that they
share. *Painters* have a device and a Batcher each. Ray's own router carries a prediction from one to the
other; it scales painters by the predictions that they hold, replaces those that are gone, and lets those that
go finish.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

import ray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from ray import serve

from ritocco.batcher import Batcher
from ritocco.byte_sizes import parse_budget
from ritocco.device import check_names
from ritocco.errors import RequestError
from ritocco.fetch import Fetcher
from ritocco.loading import load
from ritocco.scale.painter import CLOSE_S, Event, Painter
from ritocco.scale.remote import RemoteBatcher, Stream
from ritocco.server.app import App, create_app
from ritocco.server.hosts import KnownHosts, OwnMachine
from ritocco.server.settings import Settings, read_tokens

_MARGIN_S = 15.0
_HTTP_REQUESTS = 1000
"""At a front at a time: most of them wait."""
_MOST_HOURS = 10 * 365 * 24
_SIZES = 2
"""Of pictures, at a painter; a third takes the place of the one that was not asked for longest."""

_Texts: TypeAlias = Annotated[
    tuple[str, ...], BeforeValidator(lambda given: given.split(",") if isinstance(given, str) else given)
]


class Fleet(BaseModel):
    """What `serve run` takes after the name, and `args` in a YAML file; see `ritocco serve --help`.

    painters, most_painters: Ray keeps between so many; most_painters None keeps `painters`. gpus, cpus: of
    each painter, fractions share one; gpus None takes 1 where the cluster has some, else 0, and then a
    painter computes with `cpus` threads. target: predictions, waiting ones included, for each painter that is
    to be there. capacity: pictures that share a step. keep_sizes: send pictures of one size to painters that
    have it. waiting: predictions of each front that have not ended. database: a URL, else RITOCCO_DATABASE
    where the application is built and where the fronts run; without one there is one front, with its store
    in `data`.
    """

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )  # a URL's password

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    variant: str | None = None
    tokenizer: str | None = None
    memory_budget: str | None = None
    painters: int = Field(1, ge=1)
    most_painters: int | None = Field(None, ge=1)
    gpus: float | None = Field(None, ge=0)
    cpus: float = Field(1, gt=0)
    target: float = Field(0.8, gt=0)
    capacity: int = Field(8, ge=1)
    keep_sizes: bool = False
    time_limit: float | None = Field(None, gt=0)
    fronts: int = Field(1, ge=1)
    front_cpus: float = Field(0.5, ge=0)
    database: str | None = Field(None, repr=False)
    data: Path = Path("ritocco-data")
    waiting: int = Field(64, ge=1)
    retention_hours: float = Field(24.0, gt=0, le=_MOST_HOURS)
    max_work: int | None = Field(None, ge=1)
    outputs: Literal["auto", "url", "data"] = "auto"
    token_file: Path | None = None
    no_tokens: bool = False
    public_url: str | None = None
    allow_host: _Texts = ()
    allow_network: _Texts = ()
    cors_origin: _Texts = ()
    grace: float = Field(30.0, ge=0, le=_MOST_HOURS * 3600)

    @model_validator(mode="after")
    def _agrees(self) -> Fleet:
        if self.most_painters is not None and self.most_painters < self.painters:
            raise ValueError(
                f"most_painters is {self.most_painters}; it must be at least painters, {self.painters}"
            )
        if self.gpus is not None and self.gpus > 1 and not self.gpus.is_integer():
            raise ValueError(f"gpus is {self.gpus}; Ray takes parts of one GPU, or whole ones")
        _ = self.fetcher  # which says what is wrong with a network
        return self

    @property
    def fetcher(self) -> Fetcher:
        """Opens the URLs of pictures, and of webhooks."""
        return Fetcher.from_environment(allow_networks=self.allow_network)


class PainterReplica:
    """A deployment: one device."""

    def __init__(self, fleet: Fleet) -> None:
        engine = load(
            fleet.model,
            device=fleet.device,
            dtype=fleet.dtype,
            backend=fleet.backend,
            variant=fleet.variant,
            tokenizer=fleet.tokenizer,
            memory_budget=fleet.memory_budget,
            fetcher=fleet.fetcher,
        )
        self._painter = Painter(
            Batcher(
                engine,
                capacity=fleet.capacity,
                waiting=_in_hand(fleet) + 1,
                time_limit=fleet.time_limit,
            )
        )
        self._engine = engine

    async def version(self) -> str:
        """Of the checkpoint."""
        return self._painter.version

    @serve.multiplexed(max_num_models_per_replica=_SIZES)
    async def size(self, name: str) -> str:
        """To Ray a size is a model that this replica has loaded, and requests for it come here."""
        return name

    async def paint(
        self, asked: Mapping[str, Any], *, id: str, created_at: str, options: Mapping[str, Any]
    ) -> AsyncIterator[Event]:
        """See `Painter.paint`."""
        if size := serve.get_multiplexed_model_id():
            await self.size(size)
        async for event in self._painter.paint(asked, id=id, created_at=created_at, options=options):
            yield event

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises."""
        self._painter.refuse_broken()

    def __del__(self) -> None:
        """Called by Ray, where nobody waits for an answer any more."""
        if hasattr(self, "_engine"):
            self._painter.close()
            self._engine.close()


class FrontReplica:
    """A deployment: HTTP, and the store."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, painters: Any, fleet: Fleet
    ) -> None:
        self._fleet, self._painters = fleet, painters
        self._version = await painters.version.remote()

    def __serve_build_asgi_app__(self) -> App:
        """Called by Ray after the construction."""
        fleet = self._fleet
        batcher = RemoteBatcher(self._stream, self._version)
        tokens = () if fleet.token_file is None else read_tokens(fleet.token_file)
        app = create_app(batcher, _settings(fleet, tokens))
        if not fleet.token_file:
            public = urlsplit(fleet.public_url or "").hostname
            app.add_middleware(KnownHosts, names=[*fleet.allow_host, *([public] if public else ())])
            if not fleet.no_tokens:
                app.add_middleware(OwnMachine)
        return app

    def _stream(
        self, size: str, asked: Mapping[str, Any], *, id: str, created_at: str, options: Mapping[str, Any]
    ) -> Stream:
        name = size if self._fleet.keep_sizes else ""
        painters = self._painters.options(stream=True, multiplexed_model_id=name)
        stream: Stream = painters.paint.remote(asked, id=id, created_at=created_at, options=options)
        return stream


def app(args: Mapping[str, Any]) -> Any:
    """The application, as `serve run` and a YAML file's `import_path` take it.

    args: of `Fleet`. Raises ValidationError and RequestError for what makes no sense on any machine.
    """
    fleet = Fleet.model_validate(args)
    check_names(fleet.device, fleet.dtype, fleet.backend)
    if fleet.memory_budget is not None:
        parse_budget(fleet.memory_budget)
    _settings(fleet, ())  # the tokens' file is one of the machines that have fronts
    gpus = fleet.gpus
    if gpus is None:
        gpus = 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0.0
    painters = serve.deployment(
        PainterReplica,
        name="painters",
        ray_actor_options={"num_gpus": gpus, "num_cpus": fleet.cpus},
        max_ongoing_requests=_in_hand(fleet),
        graceful_shutdown_timeout_s=max(CLOSE_S, fleet.grace) + _MARGIN_S,
        **_scaled(fleet),
    )
    fronts = serve.deployment(
        serve.ingress()(FrontReplica),
        name="fronts",
        num_replicas=fleet.fronts,
        ray_actor_options={"num_cpus": fleet.front_cpus},
        max_ongoing_requests=_HTTP_REQUESTS,
        graceful_shutdown_timeout_s=fleet.grace + 2 * _MARGIN_S,
    )
    return fronts.bind(painters.bind(fleet), fleet)


def _in_hand(fleet: Fleet) -> int:
    """Predictions at a painter: enough to choose from. Where sizes are kept together Ray sends it all of its
    own while it takes more, and the next painter gets none: so a step's worth, and a few that are ready.
    """
    return fleet.capacity + max(1, fleet.capacity // 4) if fleet.keep_sizes else 4 * fleet.capacity


def _scaled(fleet: Fleet) -> dict[str, Any]:
    if fleet.most_painters is None:
        return {"num_replicas": fleet.painters}
    scaling = {"min_replicas": fleet.painters, "max_replicas": fleet.most_painters}
    return {"autoscaling_config": scaling | {"target_ongoing_requests": fleet.target}}


def _settings(fleet: Fleet, tokens: Sequence[str]) -> Settings:
    """Of a front. Raises RequestError."""
    database = fleet.database or os.environ.get("RITOCCO_DATABASE") or None
    if fleet.fronts > 1 and database is None:
        rule = "more than 1 need a store in common: name a database, or set RITOCCO_DATABASE, here and there"
        raise RequestError(f"fronts is {fleet.fronts}; {rule}", field="fronts")
    return Settings(
        tokens=tokens,
        data=fleet.data if database is None else None,
        database=database,
        waiting=fleet.waiting,
        retention_s=fleet.retention_hours * 3600,
        max_work=fleet.max_work,
        outputs=fleet.outputs,
        public_url=fleet.public_url,
        cors_origins=fleet.cors_origin,
        fetcher=fleet.fetcher,
        grace_s=fleet.grace,
    )
