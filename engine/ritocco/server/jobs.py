"""From the queue on disk to the batcher and back: what was accepted is run, and what ended is written down.

Threads: the caller's accept and cancel; a few prepare (they fetch pictures); the batcher's call `on_step`;
one writes starts and ends, in their order.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ritocco.batcher import Batcher
from ritocco.errors import BusyError, DeviceLostError, RequestError, RitoccoError
from ritocco.images import data_uri
from ritocco.prediction import Prediction
from ritocco.server.answers import answer
from ritocco.server.database import StorageError
from ritocco.server.files import StoredFile
from ritocco.server.metrics import Metrics
from ritocco.server.settings import Settings
from ritocco.server.signals import Signal
from ritocco.server.store import INTERRUPTED, Outcome, Record, Store
from ritocco.server.webhooks import Event, Webhooks
from ritocco.shown import said
from ritocco.sources import decode_data_uri
from ritocco.tickets import Ticket

_PREPARING = 8
_RETRY_STORING_S = 5.0
_AFTER_GRACE_S = 10.0
# The address of a file of ours, under whatever name the server was reached.
_OWN_FILE = re.compile(
    r"https?://[^/?#]+/(?:[^?#]*/)?(?:files|outputs)/([0-9a-hjkmnp-tv-z]{26})(?:/[^/?#]*)?"
)

_log = logging.getLogger(__name__)


class StoppingError(RitoccoError):
    """The server is about to stop and accepts nothing more."""


@dataclass(eq=False, slots=True)
class Live:
    """A prediction of this process that has not ended. changed: new logs, a new status, the end."""

    record: Record
    ticket: Ticket | None = None
    started: bool = False
    ended: bool = False
    canceled: bool = False
    set_aside: bool = False  # to be run after the next start
    stepped: float = 0.0
    changed: Signal = field(default_factory=Signal)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def prediction(self) -> Prediction | None:
        """What its run says."""
        return None if self.ticket is None else self.ticket.prediction


class Jobs:
    """Everything between the routes and the batcher. Its methods may be called from any thread."""

    def __init__(
        self, store: Store, batcher: Batcher, webhooks: Webhooks, metrics: Metrics, settings: Settings
    ) -> None:
        self._store, self._batcher, self._webhooks = store, batcher, webhooks
        self._metrics, self._settings = metrics, settings
        self._lives: dict[str, Live] = {}
        self._lock = threading.Lock()
        self._room = threading.Condition()
        self._stopping = False
        self._lost = False
        self._preparers = ThreadPoolExecutor(_PREPARING, thread_name_prefix="ritocco-prepare")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ritocco-write")
        metrics.watch(self._figures, batcher.snapshot)

    def resume(self) -> None:
        """Take up what an earlier process left."""
        for id in self._store.due():
            if (record := self._store.get(id)) is not None:
                self._send(record, "completed")
        for id in self._store.queued():
            if (record := self._store.get(id)) is not None:
                self._run(record)

    def accept(self, new: Record) -> tuple[Record, bool]:
        """Store a prediction and run it; see `Store.accept` for what is raised, and StoppingError."""
        if self._stopping:
            raise StoppingError("the server is about to stop")
        record, fresh = self._store.accept(new)
        if fresh:
            self._metrics.accepted.inc()
            self._run(record)
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

    def stop(self) -> None:
        """`begin_stop`, then wait `grace_s` for what runs; the rest is run after the next start."""
        self.begin_stop()
        self._await_ends(self._settings.grace_s)
        for live in self._all():
            with live.lock:
                live.set_aside = True
            if live.ticket is not None:
                live.ticket.cancel()
            live.changed.notify()
        self._await_ends(_AFTER_GRACE_S)
        self._preparers.shutdown(wait=False, cancel_futures=True)  # one may be fetching a picture
        self._writer.shutdown(wait=True)
        for live in self._all():
            with suppress(StorageError):
                self._store.requeue(live.record.id)

    def _all(self) -> list[Live]:
        with self._lock:
            return list(self._lives.values())

    def _await_ends(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._room:
            while any(one.started for one in self._all()) and (left := deadline - time.monotonic()) > 0:
                self._room.wait(left)

    def _figures(self) -> tuple[int, int, int]:
        """Waiting and running predictions, and the pictures of the latter."""
        lives = self._all()
        running = [one for one in lives if one.started]
        pictures = sum(int(one.record.input.get("num_outputs") or 1) for one in running)
        return len(lives) - len(running), len(running), pictures

    def _run(self, record: Record) -> None:
        live = Live(record)
        with self._lock:
            self._lives[record.id] = live
        with suppress(RuntimeError):  # shut down meanwhile: it stays in the queue on disk
            self._preparers.submit(self._prepare, live)

    def _prepare(self, live: Live) -> None:
        try:
            ticket = self._submitted(live, self._with_own_files(live.record.input))
        except RequestError as error:
            self._finish(live, Outcome(status="failed", error=str(error)))
        except DeviceLostError as error:
            self._device_lost(live, error)
        except Exception as error:
            if not self._stopping:  # else it is run after the next start
                self._finish(live, _failure(live, error))
        else:
            if ticket is None:
                return
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
                    on_step=lambda done, total: self._stepped(live),
                    allow_local=False,  # no path of a client's reaches the disk
                )
            except BusyError as busy:
                with self._room:
                    self._room.wait(busy.retry_after)
        return None

    def _with_own_files(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Files of ours come from the disk: the server need not reach itself, nor be public."""
        made = dict(given)
        for name in ("image", "mask"):
            found = _OWN_FILE.match(made.get(name) or "")
            file = None if found is None else self._store.files.find(found[1])
            if file is not None:
                made[name] = data_uri(self._store.files.read(file), "png")  # the type is not believed anyway
        return made

    def _stepped(self, live: Live) -> None:
        """On the batcher's thread: nothing here waits."""
        now = time.monotonic()
        if not live.started:
            with live.lock:
                live.started = True
            self._write(self._started, live)
        elif live.stepped:
            self._metrics.step_seconds.observe(now - live.stepped)
        live.stepped = now
        self._send(live.record, "logs", live)
        live.changed.notify()

    def _started(self, live: Live) -> None:
        if self._store.start(live.record.id):
            self._send(live.record, "start", live)

    def _ended(self, live: Live) -> None:
        ticket = live.ticket
        assert ticket is not None  # noqa: S101 - it was its callback
        try:
            prediction = ticket.result(0)
        except DeviceLostError as error:
            self._device_lost(live, error)
            return
        except Exception as error:
            self._finish(live, _failure(live, error))
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
                text = f"The result could not be stored: {said(error)}"
                self._finish(live, Outcome(status="failed", logs=outcome.logs, error=text))
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


def _failure(live: Live, error: Exception) -> Outcome:
    """What went wrong, in words; those of other people's exceptions stay in the log."""
    running = live.prediction
    logs = "" if running is None else running.logs
    if isinstance(error, RitoccoError | TimeoutError):
        return Outcome(status="failed", logs=logs, error=said(error))
    _log.error("prediction broke", exc_info=error, extra={"prediction": live.record.id})
    return Outcome(status="failed", logs=logs, error="Internal error; the server's log has more")
