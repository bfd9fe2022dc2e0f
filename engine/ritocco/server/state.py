"""What the routes share, and how a request's words become a prediction."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from ritocco.errors import BusyError
from ritocco.prediction import MODEL, VERSION, Prediction, new_id
from ritocco.schema import InputError, PredictionInput, Violation, echo, parse_input
from ritocco.server.answers import answer
from ritocco.server.bodies import PredictionRequest
from ritocco.server.database import AwayError
from ritocco.server.jobs import Jobs
from ritocco.server.live import Live
from ritocco.server.metrics import Metrics
from ritocco.server.problems import ProblemError
from ritocco.server.sessions import Sessions
from ritocco.server.settings import Settings
from ritocco.server.store import ENDED, Record, Store
from ritocco.server.webhooks import Webhooks
from ritocco.shown import plain

POLL_S = 0.5
"""Between two looks at a prediction that another server runs."""
_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]{1,5})?|\[[0-9a-fA-F:.]+\](:[0-9]{1,5})?")
_HEX = re.compile(r"[0-9a-f]{64}")
_NAMED = 20  # of the unknown inputs, whose names the prediction's logs tell


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """Parts of one app. version: of the checkpoint that is served. began: when its data folder was made."""

    settings: Settings
    store: Store
    jobs: Jobs
    webhooks: Webhooks
    metrics: Metrics
    sessions: Sessions
    version: str
    began: str

    def base(self, request: Request, prefix: str) -> str:
        """The API's URL as this client reaches it, without a slash at the end."""
        root = self.settings.public_url
        if root is None:
            host = request.headers.get("host", "")
            if not _HOST.fullmatch(host):
                name, port = request.scope.get("server") or ("localhost", None)
                host = name if port is None else f"{name}:{port}"
            root = f"{request.scope.get('scheme', 'http')}://{host}{request.scope.get('root_path', '')}"
        return root.rstrip("/") + prefix

    def version_of(self, asked: str | None) -> str:
        """The version that a request means: 64 hex digits. Raises ProblemError for one that is not served."""
        if asked is None or asked == MODEL:
            return self.version
        hexes = asked.removeprefix(f"{MODEL}:")
        if _HEX.fullmatch(hexes) and hexes in (self.version, VERSION):
            return hexes
        detail = "The specified version does not exist (or perhaps you don't have permission to use it?)"
        raise ProblemError(422, "Invalid version or not permitted", detail)

    async def refuse_if_full(self, *, key: str | None = None, id: str | None = None) -> None:
        """Before a body is read, so that refusing costs little. Raises BusyError and StoppingError."""
        self.jobs.refuse_stopping()

        def full() -> bool:
            held = self.store.unfinished() >= self.settings.waiting
            return held and not self.store.repeated(key=key, id=id)

        if await run_in_threadpool(full):
            raise BusyError("the queue is full", retry_after=1.0)

    def record(self, asked: PredictionRequest, *, base: str, key: str | None, id: str | None) -> Record:
        """The prediction that a request asks for. key: of no use beside an id, under which it may be repeated
        too. Raises InputError and ProblemError.
        """
        version = self.version_of(asked.version)
        fields, _, ignored = parse_input(asked.input, allow_local=False)
        self._refuse_too_much(fields)
        unknown = set(ignored)
        held = echo({name: value for name, value in asked.input.items() if name not in unknown})
        told = [version, _with_whole_numbers(held), asked.webhook, asked.webhook_events_filter]
        return Record(
            id=id or new_id(),
            key=key if id is None else None,
            input=held | {plain(name): None for name in ignored[:_NAMED]},
            version=version,
            base=base,
            stream=new_id(),
            digest=hashlib.sha256(json.dumps(told, sort_keys=True).encode("ascii")).hexdigest(),
            webhook=asked.webhook,
            webhook_events=asked.webhook_events_filter or (),
        )

    def _refuse_too_much(self, fields: PredictionInput) -> None:
        most = self.settings.max_work
        work = fields.num_inference_steps * fields.num_outputs * fields.width * fields.height
        if most is not None and work > most:
            name = "input.num_inference_steps"
            description = (
                f"num_inference_steps x num_outputs x width x height is {work}; "
                f"it must be less than or equal to {most} on this server"
            )
            violation = Violation(type="number_lte", field=name, description=description)
            raise InputError(f"{name}: {description}", field=name, violations=(violation,))

    async def answer(
        self, record: Record, base: str, *, patient: bool = True, brief: bool = False
    ) -> Prediction:
        """The prediction as clients get it. patient: false says `starting` of whatever has not ended: clients
        take any other status of a creation for its end.
        """

        def made() -> Prediction:
            live = self.jobs.live(record.id)
            running = None if live is None or not patient else live.prediction
            held = self.store.now(record) or record
            outputs = self.settings.outputs
            said = answer(self.store, held, running, base=base, outputs=outputs, brief=brief)
            if not patient and held.status not in ENDED:
                said.status, said.started_at = "starting", None
            return said

        return await run_in_threadpool(made)

    async def wait(self, id: str, seconds: float | None) -> None:
        """Until the prediction ended, the time is up, or the server stops before it begins."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            live = self.jobs.live(id)
            if live is not None:
                await live.changed.until(partial(_is_over, live), left)
            if left == 0 or not self.others_go_on or await run_in_threadpool(self._has_ended, id):
                return
            await asyncio.sleep(POLL_S if left is None else min(POLL_S, left))

    @property
    def others_go_on(self) -> bool:
        """Whether a prediction that is not run here may end elsewhere, and is worth another look."""
        return self.store.has_others and not self.jobs.stopping

    def _has_ended(self, id: str) -> bool:
        try:
            return self.store.has_ended(id)
        except AwayError:
            return False  # when it is back, there will be more to say


def _with_whole_numbers(held: Any) -> Any:
    """JSON has one kind of number: 7.0 asks for what 7 does."""
    match held:
        case float() if held.is_integer():
            return int(held)
        case dict():
            return {name: _with_whole_numbers(value) for name, value in held.items()}
        case list():
            return [_with_whole_numbers(value) for value in held]
    return held


def _is_over(live: Live) -> bool:
    return live.ended or live.set_aside
