"""From the queue on disk to the batcher and back: what was accepted is run, and what ended is written down.

Threads: the caller's accept and cancel; a few prepare, and others what has pictures to fetch; the batcher's
call `on_start`, which waits for the disk, and `on_step`; one writes ends, in their order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ritocco.batcher import Batcher
from ritocco.errors import BusyError, DeviceLostError, RequestError, RitoccoError
from ritocco.server.answers import answer
from ritocco.server.database import StorageError
from ritocco.server.files import StoredFile
from ritocco.server.inputs import is_elsewhere, with_own_files
from ritocco.server.live import Live, failure
from ritocco.server.metrics import Metrics
from ritocco.server.settings import Settings
from ritocco.server.store import INTERRUPTED, Outcome, Record, Store
from ritocco.server.webhooks import Event, Webhooks
from ritocco.shown import said
from ritocco.sources import decode_data_uri
from ritocco.tickets import Ticket

FETCHING = 16
"""Predictions that may wait for other servers at a time."""
_PREPARING = 4
_RETRY_STORING_S = 5.0
_AFTER_GRACE_S = 10.0
# No path of the data folder's reaches a client.
_NOT_STORED = "The result could not be stored; the server's log has more"

_log = logging.getLogger(__name__)


class StoppingError(RitoccoError):
    """The server is about to stop and accepts nothing more."""


class BrokenError(RitoccoError):
    """The engine fails at everything, and enough waits to try it with."""


class Jobs:
    """Everything between the routes and the batcher. Its methods may be called from any thread."""

    def __init__(
        self, store: Store, batcher: Batcher, webhooks: Webhooks, metrics: Metrics, settings: Settings
    ) -> None:
        self._store, self._batcher, self._webhooks = store, batcher, webhooks
        self._metrics, self._settings = metrics, settings
        self._lives: dict[str, Live] = {}
        self._lock, self._accepting = threading.Lock(), threading.Lock()
        self._room = threading.Condition()
        self._stopping = self._hurried = False
        self._lost = False
        self._preparers = ThreadPoolExecutor(_PREPARING, thread_name_prefix="ritocco-prepare")
        self._fetchers = ThreadPoolExecutor(FETCHING, thread_name_prefix="ritocco-fetch")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ritocco-write")
        metrics.watch(self._figures, batcher.snapshot)

    def resume(self) -> None:
        """Take up what an earlier process left."""
        for id in self._store.due():
            if (record := self._store.get(id)) is not None:
                self._send(record, "completed")
        suspects = []
        for id in self._store.queued():
            if (record := self._store.get(id)) is not None:
                live = self._known(record)
                if record.attempts:
                    suspects.append(live)
                else:
                    self._start([live])
        self._start(suspects)  # which are opened one after the other: one of them may have ended a process

    def accept(self, new: Record) -> tuple[Record, bool]:
        """Store a prediction and run it; raises as `Store.accept`, StoppingError and BrokenError."""
        if self._stopping:
            raise StoppingError("the server is about to stop")
        if self._lives and not self._batcher.healthy:
            raise BrokenError("the engine fails at everything")
        with self._accepting:
            record, fresh = self._store.accept(new)
            if fresh:
                self._metrics.accepted.inc()
                self._start([self._known(record)])
        return record, fresh

    @property
    def healthy(self) -> bool:
        """Whether the batcher takes requests, and some engine works."""
        return self._batcher.healthy

    def live(self, id: str) -> Live | None:
        """The run of a prediction; None where it ended, or never was."""
        return self._lives.get(id)

    def cancel(self, id: str) -> None:
        """End a prediction: one that waits at once, one that runs between two steps."""
        live = self._lives.get(id)
        if live is None:
            with self._accepting:  # it may have been stored this moment
                live = self._lives.get(id)
        if live is None:
            return
        with live.lock:
            live.canceled = True
            ticket, waiting = live.ticket, not live.started
        if ticket is not None:
            ticket.cancel()
        if waiting:
            self._finish(live, Outcome(status="canceled"))

    @property
    def lost(self) -> bool:
        """Whether nothing will be computed in this process any more."""
        return self._lost

    @property
    def stopping(self) -> bool:
        """Whether nothing more is accepted."""
        return self._stopping

    def begin_stop(self) -> None:
        """Accept nothing more; what waits is left for the next start, what runs goes on."""
        self._stopping = True
        with self._room:
            self._room.notify_all()
        for live in self._all():
            with live.lock:
                live.set_aside = live.set_aside or not live.started
            if live.set_aside and live.ticket is not None:
                live.ticket.cancel()
            live.changed.notify()

    def hurry(self) -> None:
        """What runs gets no more time: a `stop` that waits for it goes on."""
        self._hurried = True
        with self._room:
            self._room.notify_all()

    def stop(self) -> None:
        """`begin_stop`, then wait `grace_s` for what runs; the rest is run after the next start."""
        self.begin_stop()
        self._await_ends(self._settings.grace_s, lambda: self._hurried)
        for live in self._all():
            with live.lock:
                live.set_aside = True
            if live.ticket is not None:
                live.ticket.cancel()
            live.changed.notify()
        self._await_ends(_AFTER_GRACE_S)
        for pool in (self._preparers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)  # one may be fetching a picture
        self._writer.shutdown(wait=True)
        for live in self._all():
            with suppress(StorageError):
                self._store.requeue(live.record.id)

    def _all(self) -> list[Live]:
        with self._lock:
            return list(self._lives.values())

    def _await_ends(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        deadline = time.monotonic() + seconds
        with self._room:
            while any(one.started for one in self._all()) and not enough():
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self._room.wait(left)

    def _figures(self) -> tuple[int, int, int]:
        """Waiting and running predictions, and the pictures of the latter."""
        lives = self._all()
        running = [one for one in lives if one.started]
        return len(lives) - len(running), len(running), sum(one.pictures for one in running)

    def _known(self, record: Record) -> Live:
        live = Live(replace(record, input={}), int(record.input.get("num_outputs") or 1))
        with self._lock:
            self._lives[record.id] = live
        live.set_aside = self._stopping
        return live

    def _start(self, lives: Sequence[Live], *, fetch: bool = False) -> None:
        """Prepare them in a thread, one after the other."""
        pool = self._fetchers if fetch else self._preparers
        with suppress(RuntimeError):  # shut down meanwhile: they stay in the queue on disk
            pool.submit(self._prepare_all, lives, fetch=fetch)

    def _prepare_all(self, lives: Sequence[Live], *, fetch: bool) -> None:
        elsewhere = [live for live in lives if not self._prepare(live, fetch=fetch)]
        if elsewhere:
            self._start(elsewhere, fetch=True)

    def _prepare(self, live: Live, *, fetch: bool) -> bool:
        """Hand it to the batcher. False where a picture has to be fetched, and this is not the place."""
        try:
            record = self._store.get(live.record.id)
            if record is None or live.canceled or self._stopping:
                return True
            given = with_own_files(self._store.files, record.input)
            if not fetch and is_elsewhere(given):
                return False
            self._store.prepare(record.id)
            try:
                ticket = self._submitted(live, given)
            finally:
                self._write(self._store.prepared, record.id)
        except RequestError as error:
            self._finish(live, Outcome(status="failed", error=str(error)))
        except DeviceLostError as error:
            self._device_lost(live, error)
        except Exception as error:
            if not self._stopping:  # else it is run after the next start
                self._finish(live, failure(live, error))
        else:
            if ticket is not None:
                self._adopt(live, ticket)
        return True

    def _adopt(self, live: Live, ticket: Ticket) -> None:
        ticket.prediction.input = {}  # the disk has it, and megabytes would wait here
        with live.lock:
            live.ticket = ticket
            unwanted = live.canceled or live.set_aside
        if unwanted:
            ticket.cancel()
        ticket.add_done_callback(lambda _: self._write(self._ended, live))

    def _submitted(self, live: Live, given: Mapping[str, Any]) -> Ticket | None:
        """Its place in the batcher, waited for; None where it is not wanted any more."""
        while not (live.canceled or self._stopping):
            try:
                return self._batcher.submit(
                    given,
                    id=live.record.id,
                    created_at=live.record.created_at,
                    on_start=lambda: self._begun(live),
                    on_step=lambda done, total: self._stepped(live, done, total),
                    allow_local=False,  # no path of a client's reaches the disk
                )
            except BusyError as busy:
                with self._room:
                    self._room.wait(busy.retry_after)
        return None

    def _begun(self, live: Live) -> bool:
        """Whether it is still wanted. On the batcher's thread, before the device works on it: once that may
        have ended the process, the disk knows of it.
        """
        with live.lock:
            if live.canceled or live.set_aside:
                return False
            live.started = True
        if not self._store.start(live.record.id):
            return False
        self._send(live.record, "start", live)
        live.changed.notify()
        return True

    def _stepped(self, live: Live, done: int, total: int) -> None:
        """On the batcher's thread: nothing here waits."""
        live.steps = (done, total)
        now = time.monotonic()
        if live.stepped:
            self._metrics.step_seconds.observe(now - live.stepped)
        live.stepped = now
        self._send(live.record, "logs", live)
        live.changed.notify()

    def _ended(self, live: Live) -> None:
        ticket = live.ticket
        assert ticket is not None  # noqa: S101 - it was its callback
        try:
            prediction = ticket.result(0)
        except DeviceLostError as error:
            self._device_lost(live, error)
            return
        except Exception as error:
            self._finish(live, failure(live, error))
            return
        if prediction.status == "canceled" and live.set_aside and not live.canceled:
            self._store.requeue(live.record.id)
            self._forget(live)
            return
        outcome = Outcome(
            status=prediction.status,
            logs=prediction.logs,
            error=prediction.error,
            metrics=prediction.metrics,
        )
        self._finish(live, outcome, prediction.output or ())

    def _device_lost(self, live: Live, error: DeviceLostError) -> None:
        """What had begun has failed, as when a process is killed. The rest waits on the disk for the next
        process, since this one has no engine any more; nothing more is accepted.
        """
        running = live.prediction
        begun = running is not None and running.started_at is not None
        if self._batcher.lost and not self._lost:
            self._lost = True
            _log.critical("device lost", extra={"error": said(error)})
            self.begin_stop()
        if begun or not self._batcher.lost:
            self._finish(
                live, Outcome(status="failed", logs=running.logs if running else "", error=INTERRUPTED)
            )
        else:
            self._forget(live)

    def _finish(self, live: Live, outcome: Outcome, output: Any = ()) -> None:
        """Write an end down. Where the disk refuses, fail; where it refuses that too, try again later."""
        id = live.record.id
        files: list[StoredFile] = []
        try:
            for place, uri in enumerate(output):
                files.append(self._written(id, place, uri))
            ended = self._store.finish(id, outcome, files)
        except StorageError as error:
            self._store.files.unlink([one.id for one in files])
            _log.error("not stored", extra={"prediction": id, "error": said(error)})
            if output:
                self._finish(live, Outcome(status="failed", logs=outcome.logs, error=_NOT_STORED))
            elif not self._stopping:
                again = threading.Timer(_RETRY_STORING_S, self._write, (self._finish, live, outcome))
                again.daemon = True
                again.start()
            return
        self._forget(live)
        if ended and (record := self._store.get(id)) is not None:
            self._metrics.ended(record)
            _log.info("prediction", extra={"prediction": id, "status": record.status, "error": record.error})
            if record.status == "succeeded":
                self._send(record, "output")
            self._send(record, "completed")

    def _written(self, id: str, place: int, uri: str) -> StoredFile:
        kind, data = decode_data_uri(uri)
        suffix = {"image/jpeg": "jpg", "image/webp": "webp"}.get(kind, "png")
        name = f"out-{place}.{suffix}"
        return self._store.files.write(data, name=name, content_type=kind, prediction=id, place=place)

    def _forget(self, live: Live) -> None:
        with self._lock:
            self._lives.pop(live.record.id, None)
        live.ended = True
        live.started = False
        live.changed.notify()
        with self._room:
            self._room.notify_all()

    def _write(self, work: Callable[..., None], *arguments: Any) -> None:
        def guarded() -> None:
            try:
                work(*arguments)
            except Exception:
                _log.exception("not written down")

        with suppress(RuntimeError):  # shut down meanwhile
            self._writer.submit(guarded)

    def _send(self, record: Record, event: Event, live: Live | None = None) -> None:
        lean = replace(record, input={})  # a message may wait for long
        brief = live is not None  # while it runs, many are sent

        def body() -> bytes:
            held = self._store.get(lean.id, brief=brief) or lean
            running = None if live is None else live.prediction
            made = answer(self._store, held, running, base=lean.base, outputs=self._settings.outputs)
            return made.to_json().encode("utf-8")

        self._webhooks.send(lean, event, body)
