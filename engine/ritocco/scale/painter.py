"""The side with a device: a Batcher whose predictions are asked for, and told of, as plain events.

    start    total, logs, metrics             a device works on it
    step     done, total, logs, metrics       not each: those that came in a tenth of a second are one
    end      status, output, error, logs, metrics, started_at
    refused  kind, text, field, step          what `submit` or `result` raised

Events are dicts of numbers and texts, since errors of ours do not survive being pickled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ritocco.batcher import Batcher
from ritocco.errors import DeviceLostError, RitoccoError
from ritocco.shown import said
from ritocco.stages import measured
from ritocco.tickets import Ticket

Event = dict[str, Any]

STEP_EVERY_S = 0.1
CLOSE_S = 60.0

_log = logging.getLogger(__name__)


class Painter:
    """One Batcher behind one stream of events for each prediction. For one event loop."""

    def __init__(self, batcher: Batcher) -> None:
        """batcher: this closes it."""
        self._batcher = batcher

    @property
    def version(self) -> str:
        """Of the checkpoint."""
        return self._batcher.version

    def refuse_broken(self) -> None:
        """Raises DeviceLostError where another process has to take over."""
        if self._batcher.lost:
            raise DeviceLostError("this painter's device has stopped computing")

    async def paint(
        self, asked: Mapping[str, Any], *, id: str, created_at: str, options: Mapping[str, Any]
    ) -> AsyncIterator[Event]:
        """A prediction, from its first event to its last. Who stops listening cancels it."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        teller = _Teller(lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        submitted = asyncio.ensure_future(
            asyncio.to_thread(
                self._batcher.submit,
                asked,
                id=id,
                created_at=created_at,
                on_start=teller.start,
                on_step=teller.step,
                **options,
            )
        )
        ticket: Ticket | None = None
        try:
            try:
                ticket = await asyncio.shield(submitted)
            except Exception as error:
                yield refusal(error)
                return
            teller.follow(ticket)
            ticket.add_done_callback(lambda _: teller.tell(None))
            while (event := await events.get()) is not None:
                yield (
                    event | {"total": ticket.steps} | _so_far(ticket) if event["event"] == "start" else event
                )
            yield _end(ticket)
        finally:
            if ticket is not None:
                ticket.cancel()  # of no effect where it has ended
            elif not submitted.cancelled():
                submitted.add_done_callback(_cancel)

    def close(self) -> None:
        """Finish what was begun."""
        self._batcher.close(drain=True, timeout=CLOSE_S)


class _Teller:
    """In the batcher's threads: from its calls to events."""

    def __init__(self, tell: Any) -> None:
        self.tell = tell
        self._ticket: Ticket | None = None
        self._told = 0.0

    def follow(self, ticket: Ticket) -> None:
        self._ticket = ticket

    def start(self) -> bool:
        self.tell({"event": "start"})
        return True

    def step(self, done: int, total: int) -> bool:
        now = time.monotonic()
        if now - self._told >= STEP_EVERY_S or done == total:
            self._told = now
            self.tell({"event": "step", "done": done, "total": total, **_so_far(self._ticket)})
        return True


def refusal(error: Exception) -> Event:
    """An error as an event: of ours by name, of others only that there was one, and the log has more."""
    if not isinstance(error, RitoccoError):
        _log.error("a prediction broke", exc_info=error)
    event: Event = {"event": "refused", "kind": type(error).__name__, "text": said(error)}
    for name in ("field", "step", "retry_after"):
        if hasattr(error, name):
            event[name] = getattr(error, name)
    return event


def _so_far(ticket: Ticket | None) -> Event:
    """What a canceled prediction leaves, since who cancels it hears no more of it."""
    if ticket is None:
        return {"logs": "", "metrics": {}}
    return {"logs": ticket.prediction.logs, "metrics": measured(ticket.seconds)}


def _end(ticket: Ticket) -> Event:
    try:
        prediction = ticket.result(0)
    except Exception as error:
        return refusal(error) | {"logs": ticket.prediction.logs}
    told = {
        name: getattr(prediction, name)
        for name in ("status", "output", "error", "logs", "metrics", "started_at")
    }
    return {"event": "end", **told}


def _cancel(submitted: asyncio.Future[Ticket]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()
