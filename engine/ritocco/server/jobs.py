"""From the queue to the batcher and back: what was accepted is run, and what ended is written down.

Threads: the caller's accept and cancel; a few prepare, and others what has pictures to fetch; the batcher's
call `on_start`, which waits for the store, and `on_step`; one writes ends, in their order. Where the store's
database is away, what waits is tried again, and what ended is kept until it can be written down.
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

from ritocco.errors import BusyError, DeviceLostError, RequestError, RitoccoError
from ritocco.fetch import without_paths
from ritocco.server.answers import answer
from ritocco.server.database import AwayError, StorageError
from ritocco.server.dispatch import Dispatch
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
_DAMAGED = "What was asked for can't be read any more; please retry"
_NOT_STORED = "The result could not be stored; the server's log has more"
_BARE = Outcome(status="failed", error=_NOT_STORED)

_log = logging.getLogger(__name__)


class StoppingError(RitoccoError):
    """The server is about to stop and accepts nothing more."""


class BrokenError(RitoccoError):
    """The engine fails at everything, and enough waits to try it with."""


class Jobs:
    """Everything between the routes and the batcher. Its methods may be called from any thread."""

    def __init__(
        self, store: Store, batcher: Dispatch, webhooks: Webhooks, metrics: Metrics, settings: Settings
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
        self.send_last(self._store.due())
        self.run(self._store.queued())

    def run(self, ids: Sequence[str]) -> None:
        """Run what was accepted elsewhere, or before."""
        suspects = []
        for id in ids:
            if (record := self._store.get(id)) is not None:
                live = self._known(record)
                if record.attempts:
                    suspects.append(live)
                else:
                    self._start([live])
        self._start(suspects)  # which are opened one after the other: one of them may have ended a process

    def run_forgotten(self) -> None:
        """Run what is ours and known to nobody here: the connection was lost while it was stored."""
        if any(id not in self._lives for id in self._store.queued()) and not self._stopping:
            with self._accepting:
                self.run([id for id in self._store.queued() if id not in self._lives])

    def send_last(self, ids: Sequence[str]) -> None:
        """Send the last events of predictions that ended elsewhere, or before."""
        for id in ids:
            if (record := self._store.get(id)) is not None:
                self._send(record, "completed")

    def accept(self, new: Record) -> tuple[Record, bool]:
        """Store a prediction and run it; raises as `Store.accept`, StoppingError and BrokenError."""
        self.refuse_stopping()
        if self._lives and not self._batcher.healthy:
            raise BrokenError("the engine fails at everything")
        with self._accepting:
            record, fresh = self._store.accept(new)
            if fresh:
                self._metrics.accepted.inc()
                self._start([self._known(record)])
        return record, fresh

    def refuse_stopping(self) -> None:
        """Raises StoppingError where nothing more is accepted."""
        if self._stopping:
            raise StoppingError("the server is about to stop")

    @property
    def healthy(self) -> bool:
        """Whether the batcher takes requests, and some engine works."""
        return self._batcher.healthy

    def live(self, id: str) -> Live | None:
        """The run of a prediction; None where it ended, or never was."""
        return self._lives.get(id)

    def cancel(self, id: str) -> None:
        """End a prediction: one that waits at once, one that runs between two steps, and one that another
        server runs once that has heard of it. Raises StorageError.
        """
        live = self._lives.get(id)
        if live is None:
            with self._accepting:  # it may have been stored this moment
                live = self._lives.get(id)
        if live is not None:
            self.end(live)
        try:
            self._store.ask_to_cancel(id)  # it may be another server's, which this one has yet to hear
        except StorageError:
            if live is None:
                raise

    def end(self, live: Live) -> None:
        """Cancel what is run here."""
        with live.lock:
            live.canceled = True
            ticket, waiting = live.ticket, not live.started
        if ticket is not None:
            ticket.cancel()
        if waiting:
            self._finish(live, Outcome(status="canceled"))

    def drop(self, live: Live) -> None:
        """It is another server's by now: nothing of it is written down here."""
        with live.lock:
            live.dropped, ticket = True, live.ticket
        if ticket is not None:
            ticket.cancel()
        self._forget(live)

    @property
    def lost(self) -> bool:
        """Whether nothing will be computed in this process any more."""
        return self._lost

    @property
    def stopping(self) -> bool:
        """Whether nothing more is accepted."""
        return self._stopping

    def begin_stop(self) -> None:
        """Accept nothing more; what waits is left for the next start, or to others; what runs goes on."""
        self._stopping = True
        with self._room:
            self._room.notify_all()
        for live in self.lives():
            with live.lock:
                live.set_aside = live.set_aside or not live.started
            if live.set_aside and live.ticket is not None:
                live.ticket.cancel()
            live.changed.notify()
        with suppress(StorageError):  # then they are left when this server is seen to be gone
            self._store.release([live.record.id for live in self.lives() if live.set_aside])

    def hurry(self) -> None:
        """What runs gets no more time: a `stop` that waits for it goes on."""
        self._hurried = True
        with self._room:
            self._room.notify_all()

    def stop(self) -> None:
        """`begin_stop`, then wait `grace_s` for what runs; the rest is run after the next start."""
        self.begin_stop()
        self._await_ends(self._settings.grace_s, lambda: self._hurried)
        for live in self.lives():
            with live.lock:
                live.set_aside = True
            if live.ticket is not None:
                live.ticket.cancel()
            live.changed.notify()
        self._await_ends(_AFTER_GRACE_S)
        for pool in (self._preparers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)  # one may be fetching a picture
        self._writer.shutdown(wait=True)
        for live in self.lives():
            with suppress(StorageError):
                self._requeue(live)

    def lives(self) -> list[Live]:
        """What is run here, or waits for it."""
        with self._lock:
            return list(self._lives.values())

    def _await_ends(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        deadline = time.monotonic() + seconds
        with self._room:
            while any(one.started for one in self.lives()) and not enough():
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self._room.wait(left)

    def _figures(self) -> tuple[int, int, int]:
        """Waiting and running predictions, and the pictures of the latter."""
        lives = self.lives()
        running = [one for one in lives if one.started]
        return len(lives) - len(running), len(running), sum(one.pictures for one in running)

    def _known(self, record: Record) -> Live:
        asked = record.input.get("num_outputs")
        live = Live(replace(record, input={}), int(asked) if isinstance(asked, int | float) else 1)
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
            if record is None:
                self._forget(live)
                return True
            if live.canceled or live.dropped or self._stopping:
                return True
            if record.damaged:
                raise RequestError(_DAMAGED)
            given = with_own_files(self._store.files, record.input)
            if not fetch and is_elsewhere(given):
                return False
            if not self._store.prepare(record.id):  # it has ended, or is another server's
                self._forget(live)
                return True
            try:
                ticket = self._submitted(live, given)
            finally:
                self._write(self._store.prepared, record.id)
        except RequestError as error:
            self._finish(live, Outcome(status="failed", error=str(error)))
        except DeviceLostError as error:
            self._device_lost(live, error)
        except AwayError as error:
            self._put_off(live, error)
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
            unwanted = live.canceled or live.set_aside or live.dropped
        if unwanted:
            ticket.cancel()
        ticket.add_done_callback(lambda _: self._write(self._ended, live))

    def _submitted(self, live: Live, given: Mapping[str, Any]) -> Ticket | None:
        """Its place in the batcher, waited for; None where it is not wanted any more."""
        while not (live.canceled or live.dropped or self._stopping):
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
        have ended the process, the store knows of it.
        """
        with live.lock:
            if live.canceled or live.set_aside or live.dropped:
                return False
            live.started = True
        try:
            if not self._store.start(live.record.id):
                return False
        except AwayError:
            live.started, live.put_off = False, True
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
        try:
            self._take_result(live)
        except Exception:  # whatever it was, it is over
            _log.exception("not written down", extra={"prediction": live.record.id})
            self._finish(live, _BARE)

    def _take_result(self, live: Live) -> None:
        ticket = live.ticket
        assert ticket is not None  # noqa: S101 - it was its callback
        if live.dropped:
            return
        try:
            prediction = ticket.result(0)
        except DeviceLostError as error:
            self._device_lost(live, error)
            return
        except BaseException as error:  # also what ended the batcher's own thread
            self._finish(live, failure(live, error))
            return
        if prediction.status == "canceled" and not live.canceled:
            if live.set_aside:
                self._requeue(live)
                self._forget(live)
                return
            if live.put_off:
                self._put_off(live, None)
                return
        outcome = Outcome(
            status=prediction.status,
            logs=prediction.logs,
            error=prediction.error,
            metrics=prediction.metrics,
        )
        self._finish(live, outcome, prediction.output or ())

    def _requeue(self, live: Live) -> None:
        self._store.requeue(live.record.id)
        self._store.release([live.record.id])

    def _put_off(self, live: Live, error: AwayError | None) -> None:
        """Begin with it once more when the database may be back."""
        if error is not None:
            _log.warning("put off", extra={"prediction": live.record.id, "error": said(error)})
        with live.lock:
            live.ticket, live.put_off = None, False
            canceled = live.canceled
        if canceled:
            self._finish(live, Outcome(status="canceled"))
        elif not self._stopping:
            _later(self._start, [live])

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
        """Write an end down. Where the database is away, try again later; where the disk refuses, or this is
        nothing that can be stored, fail; where the disk refuses that too, try again later.
        """
        if live.dropped:
            return
        id = live.record.id
        files: list[StoredFile] = []
        try:
            for place, uri in enumerate(output):
                files.append(self._written(id, place, uri))
            ended = self._store.finish(id, outcome, files)
        except AwayError as error:  # the files stay: whether they are known nobody said
            _log.warning("kept", extra={"prediction": id, "error": said(error)})
            _later(self._write, self._finish, live, outcome, output)
            return
        except Exception as error:
            self._store.files.unlink([one.id for one in files])
            refused = isinstance(error, StorageError)
            told = {"prediction": id, "error": said(error)}
            _log.error("not stored", extra=told, exc_info=None if refused else error)
            if output:
                self._finish(live, Outcome(status="failed", logs=outcome.logs, error=_NOT_STORED))
            elif not refused and outcome != _BARE:
                self._finish(live, _BARE)
            elif not self._stopping:
                _later(self._write, self._finish, live, outcome)
            return
        self._forget(live)
        if ended:
            self.tell_end(id)

    def tell_end(self, id: str) -> None:
        """To the figures, the log and the client that wants to hear of it."""
        try:
            record = self._store.get(id)
        except StorageError as refused:
            _log.warning("told later", extra={"prediction": id, "error": said(refused)})
            if not self._stopping:  # else after the next start
                _later(self._write, self.tell_end, id)
            return
        if record is not None:
            self._metrics.ended(record)
            error = None if record.error is None else without_paths(record.error)
            _log.info("prediction", extra={"prediction": id, "status": record.status, "error": error})
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
            if self._lives.get(live.record.id) is live:
                del self._lives[live.record.id]
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


def _later(work: Callable[..., None], *arguments: Any) -> None:
    again = threading.Timer(_RETRY_STORING_S, work, arguments)
    again.daemon = True
    again.start()
