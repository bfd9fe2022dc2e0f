"""A run from the page: a prediction of the server's own, followed until it ends or nobody watches it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool

from ritocco.errors import RequestError
from ritocco.pixels import Pixels
from ritocco.prediction import Status
from ritocco.server.bodies import PredictionRequest
from ritocco.server.database import AwayError
from ritocco.server.files import StoredFile
from ritocco.server.live import Live
from ritocco.server.state import Shared
from ritocco.server.store import ENDED, Record

PACE_S = 0.25
"""Between two looks, so that a page gets a few previews a second."""
BEAT_S = 2.0
"""After which a page that gets nothing new is asked whether it is there."""
_SEED = re.compile(r"^Using seed: (-?[0-9]+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """A run at one time. status: `starting` where it waits. done, total: steps, 0 where it has none yet.
    previews: uint8 [N,h,w,3] of the latents. set_aside: the server stops, and runs it after its next start.
    outputs: files of the pictures, once it has succeeded.
    """

    id: str
    status: Status
    done: int = 0
    total: int = 0
    logs: str = ""
    previews: Pixels | None = None
    set_aside: bool = False
    error: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[StoredFile] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.status in ENDED or self.set_aside

    @property
    def seed(self) -> int | None:
        """What its log names."""
        found = _SEED.search(self.logs)
        return None if found is None else int(found[1])


class Runs:
    """Those of one app. At most one for each page, by a name that the page chose."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._of_page: dict[str, str] = {}

    async def follow(self, input: Mapping[str, Any], *, base: str, page: str) -> AsyncIterator[Moment]:
        """Create a prediction as a POST does, and watch it. Closing the generator cancels it.

        input: as over HTTP. base: URL of the API. Raises what a creation raises: RequestError, BusyError,
        StoppingError, BrokenError, StorageError and ProblemError.
        """
        shared = self._shared
        await shared.refuse_if_full()
        record = await run_in_threadpool(self._accepted, input, base)
        self._of_page[page] = record.id
        last: Moment | None = None
        try:
            while last is None or not last.ended:
                live = shared.jobs.live(record.id)
                seen = (False, (0, 0)) if live is None else (live.started, live.steps)
                try:
                    last = await run_in_threadpool(self._moment, record, live)
                except AwayError:  # what runs goes on meanwhile
                    await asyncio.sleep(BEAT_S)
                    continue
                yield last
                if live is not None and not last.ended:
                    await asyncio.sleep(PACE_S)
                    await live.changed.until(lambda live=live, seen=seen: _news(live, seen), BEAT_S)  # type: ignore[misc]
        finally:
            if self._of_page.get(page) == record.id:
                del self._of_page[page]
            if last is None or not last.ended:  # nobody watches
                asyncio.get_running_loop().run_in_executor(None, shared.jobs.cancel, record.id)

    def cancel(self, page: str) -> bool:
        """End what a page runs. Whether there was something."""
        id = self._of_page.get(page)
        if id is not None:
            self._shared.jobs.cancel(id)
        return id is not None

    def _accepted(self, input: Mapping[str, Any], base: str) -> Record:
        most = self._shared.settings.max_body_bytes
        size = sum(len(value) for value in input.values() if isinstance(value, str))
        if size > most:
            rule = f"this server takes {most} at a time"
            raise RequestError(f"input.image: {size} characters with the mask; {rule}", field="input.image")
        asked = PredictionRequest(input=dict(input))
        record, _ = self._shared.jobs.accept(self._shared.record(asked, base=base, key=None, id=None))
        return record

    def _moment(self, record: Record, live: Live | None) -> Moment:
        store = self._shared.store
        held = store.get(record.id, brief=True) or record
        if held.status in ENDED:
            outputs = store.files.outputs(record.id) if held.status == "succeeded" else ()
            return Moment(
                id=held.id,
                status=held.status,
                logs=held.logs,
                error=held.error,
                metrics=held.metrics,
                outputs=[one for one in outputs if store.files.there(one)],
            )
        running = None if live is None else live.prediction
        done, total = (0, 0) if live is None else live.steps
        return Moment(
            id=held.id,
            status="processing" if live is not None and live.started else "starting",
            done=done,
            total=total,
            logs=held.logs if running is None else running.logs,
            previews=_seen(live),
            set_aside=live is None or live.set_aside,
        )


def _news(live: Live, seen: tuple[bool, tuple[int, int]]) -> bool:
    return live.ended or live.set_aside or (live.started, live.steps) != seen


def _seen(live: Live | None) -> Pixels | None:
    """The last preview, and a look for the next."""
    found = None if live is None or live.ticket is None else live.ticket.look()
    return None if found is None else np.asarray(found.pictures())
