"""The side with the clients: what the server takes for a Batcher, and painters elsewhere do.

A prediction whose painter is gone before a device worked on it goes to another; one that was being worked on
has failed, as when a process is killed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

from ritocco import errors
from ritocco.batcher import Snapshot
from ritocco.errors import BusyError, DeviceLostError, RitoccoError
from ritocco.prediction import Prediction, timestamp
from ritocco.scale.painter import Event
from ritocco.schema import parse_input
from ritocco.shown import said
from ritocco.stages import measured
from ritocco.tickets import Ticket

ATTEMPTS = 3
"""Painters that one prediction may outlive before it began: it may be what ended them."""
BROKEN = 3
"""Painters lost one after the other, after which this is not called healthy."""

_log = logging.getLogger(__name__)


class Stream(Protocol):
    """Events of one prediction, taken by one thread; another may cancel."""

    def __iter__(self) -> Iterator[Event]: ...

    def cancel(self) -> Any: ...


class Painters(Protocol):
    """Where painters are found. Raises what it likes where one is gone, and so may its streams."""

    def __call__(
        self, size: str, asked: Mapping[str, Any], *, id: str, created_at: str, options: Mapping[str, Any]
    ) -> Stream:
        """Have a prediction painted. size: `512x512`, by which those that may share steps stay together."""


class RemoteBatcher:
    """Has the members of a Batcher that the server uses (`Dispatch`). Safe to use from several threads."""

    lost = False
    """Painters come back by themselves."""

    def __init__(self, painters: Painters, version: str) -> None:
        """version: of the checkpoint that all of them paint with."""
        self.version = version
        self._painters = painters
        self._lock = threading.Lock()
        self._tickets: set[_RemoteTicket] = set()
        self._outcomes: Counter[str] = Counter()
        self._failures, self._lost_at = 0, float("-inf")

    @property
    def healthy(self) -> bool:
        """Whether the last painters that were asked did not all go."""
        return self._failures < BROKEN

    def submit(
        self,
        input: Mapping[str, Any],
        *,
        on_start: Callable[[], bool | None] | None = None,
        on_step: Callable[[int, int], bool | None] | None = None,
        id: str | None = None,
        created_at: str | None = None,
        **options: Any,
    ) -> Ticket:
        """See `Batcher.submit`; pictures are opened by the painter. `on_start` and `on_step` are called in a
        thread of this prediction's own. Raises RequestError.
        """
        fields, _, _ = parse_input(input, allow_local=bool(options.get("allow_local", False)))
        prediction = Prediction(version=self.version)
        if id is not None:
            prediction.id = id
        if created_at is not None:
            prediction.created_at = created_at
        size = f"{fields.width}x{fields.height}"

        def ask() -> Stream:
            return self._painters(
                size, input, id=prediction.id, created_at=prediction.created_at, options=options
            )

        ticket = _RemoteTicket(prediction, ask, on_start, on_step, self._heard)
        with self._lock:
            self._tickets.add(ticket)
        ticket.add_done_callback(self._ended)
        threading.Thread(target=ticket.follow, name="ritocco-remote", daemon=True).start()
        return ticket

    def snapshot(self) -> Snapshot:
        """What this knows; steps are the painters'."""
        with self._lock:
            begun = [one for one in self._tickets if one.begun]
            waiting, outcomes = len(self._tickets) - len(begun), dict(self._outcomes)
        return Snapshot(
            waiting=waiting,
            set_aside=0,
            running=len(begun),
            lanes=0,
            steps={},
            step_seconds=(),
            outcomes=outcomes,
            healthy=self.healthy,
            engines=0,
        )

    def _heard(self, asked_at: float, *, gone: bool) -> None:
        """What was asked before the last loss went with that painter, and is no other one's end."""
        with self._lock:
            if not gone:
                self._failures = 0
            elif asked_at > self._lost_at:
                self._failures, self._lost_at = self._failures + 1, time.monotonic()

    def _ended(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _RemoteTicket)  # noqa: S101 - it was its callback
        with self._lock:
            self._tickets.discard(ticket)
            self._outcomes[ticket.prediction.status] += 1


class _RemoteTicket(Ticket):
    """Its prediction is a copy of the painter's, one event behind. begun: a device has worked on it."""

    def __init__(
        self,
        prediction: Prediction,
        ask: Callable[[], Stream],
        on_start: Callable[[], bool | None] | None,
        on_step: Callable[[int, int], bool | None] | None,
        heard: Callable[..., None],
    ) -> None:
        super().__init__(prediction, lambda: False, self._cancel_stream)
        self.begun = False
        self._taken: tuple[int, int] | None = None
        self._seconds: Mapping[str, float] = {}
        self._since = time.monotonic()
        self._ask, self._on_start, self._on_step, self._heard = ask, on_start, on_step, heard
        self._stream: Stream | None = None
        self._streaming = threading.Lock()

    def follow(self) -> None:
        """In its own thread, to the end."""
        for left in reversed(range(ATTEMPTS)):
            asked_at = time.monotonic()
            try:
                self._listen()
            except RitoccoError as error:
                self._conclude("failed", error)
                return
            except Exception as error:
                if self.cancelled:
                    self._conclude_canceled()
                    return
                self._heard(asked_at, gone=True)
                _log.warning("a painter is gone", extra={"prediction": self.id, "error": said(error)})
                if self.begun or not left:
                    self._conclude("failed", DeviceLostError(f"the painter is gone: {said(error)}"))
                    return
            else:
                self._heard(asked_at, gone=False)
                return

    def _listen(self) -> None:
        """To its end. Raises what the stream raises, ConnectionError where another painter is to be asked."""
        with self._streaming:
            if self.cancelled:
                self._conclude_canceled()
                return
            stream = self._stream = self._ask()
        try:
            for event in stream:
                match event["event"]:
                    case "start":
                        self._start(event)
                    case "step":
                        self._hear(event["done"], event)
                        self._call_on_step(event["done"], event["total"])
                    case "end":
                        self._take_over(event)
                    case _:
                        self._refused(event)
                if self.done():
                    return
            raise ConnectionError("its events ended early")
        finally:
            if not self.done():
                with suppress(Exception):  # it may be gone
                    stream.cancel()

    def _hear(self, done: int, event: Event) -> None:
        self._taken = (done, event["total"])
        self._seconds = event["metrics"] or self._seconds
        self.prediction.logs = event["logs"] or self.prediction.logs

    def _start(self, event: Event) -> None:
        if self.begun:
            return
        self.begun, self._since = True, time.monotonic()
        self._hear(0, event)
        self.prediction.started_at = timestamp()
        self.prediction.status = "processing"
        if self._on_start is not None and self._on_start() is False:
            self.cancel()

    def _call_on_step(self, done: int, total: int) -> None:
        if self._on_step is not None and self._on_step(done, total) is False:
            self.cancel()

    def _take_over(self, event: Event) -> None:
        prediction = self.prediction
        for name in ("output", "error", "logs", "metrics", "started_at"):
            setattr(prediction, name, event[name])
        prediction.status = event["status"]
        self.end(None)

    def _refused(self, event: Event) -> None:
        error = error_of(event)
        if isinstance(error, BusyError | DeviceLostError) and not self.begun:
            raise ConnectionError(said(error))
        self.prediction.logs = event.get("logs", self.prediction.logs)
        self._conclude("failed", error)

    def _conclude_canceled(self) -> None:
        """As the painter does, which nobody hears any more; as of the last event."""
        steps = "0 steps" if self._taken is None else "{} of {} steps".format(*self._taken)
        self.prediction.logs += f"Canceled after {steps}\n"
        spent = {**self._seconds, "predict_time": time.monotonic() - self._since}
        self.prediction.metrics = measured(spent)
        self._conclude("canceled")

    def _conclude(self, status: Any, error: Exception | None = None) -> None:
        if error is not None:
            self.prediction.error = said(error)
        self.prediction.status = status
        self.end(error)

    def _cancel_stream(self) -> None:
        with self._streaming:
            stream = self._stream
        if stream is not None:
            stream.cancel()


def error_of(event: Event) -> Exception:
    """What was raised over there."""
    kind = getattr(errors, event["kind"], None)
    if event["kind"] == "InputError":
        kind = errors.RequestError
    text = event["text"]
    if kind is None or not issubclass(kind, RitoccoError):
        return RuntimeError(text)
    named = {name: event[name] for name in ("field", "step", "retry_after") if name in event}
    error: Exception = kind(text, **named)
    return error
