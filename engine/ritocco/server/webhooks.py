"""Webhooks: signed, sent off the inference thread, each prediction's in order, the last until it arrives.

The signature is Standard Webhooks', as of the original: `v1,` and the base64 of HMAC-SHA256 of
"id.timestamp.body". [github.com/standard-webhooks/standard-webhooks, spec]
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import hmac
import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from ritocco.errors import RitoccoError
from ritocco.fetch import Fetcher, without_paths
from ritocco.prediction import new_id
from ritocco.server.database import StorageError, setting
from ritocco.server.store import Record, Store
from ritocco.server.turns import Lane, Turns

Event: TypeAlias = Literal["start", "output", "logs", "completed"]
# Of the original, where a request names none.
DEFAULT_EVENTS: tuple[Event, ...] = ("output", "completed")
LOGS_EVERY_S = 0.5
_ATTEMPTS = 8  # of the last event: over about two minutes
_FIRST_PAUSE_S = 1.0
_HASTY_S = 5.0  # of the other events, seconds in which they have to be taken
_WORKERS = 32
_LANES = 2  # of a receiver
_MOST_WAITING = 100  # in a lane, beyond which all but last events are dropped
_MOST_LAST = 1000

_log = logging.getLogger(__name__)


def new_secret() -> str:
    """`whsec_` and 32 random bytes in standard base64: clients split it at its one underscore."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode("ascii")


def signed(secret: str, message: str, body: bytes, *, at: int) -> dict[str, str]:
    """The three headers of a message. at: seconds since the epoch."""
    key = base64.b64decode(secret.partition("_")[2])
    digest = hmac.new(key, f"{message}.{at}.".encode("ascii") + body, hashlib.sha256).digest()
    signature = f"v1,{base64.b64encode(digest).decode('ascii')}"
    return {"webhook-id": message, "webhook-timestamp": str(at), "webhook-signature": signature}


@dataclass(slots=True)
class _Message:
    """body: made when it is sent, so that it says what holds then."""

    record: Record
    event: Event
    body: Callable[[], bytes]
    id: str = field(default_factory=lambda: f"msg_{new_id()}")
    attempts: int = 0
    arrived: bool = False


@dataclass(slots=True)
class _Queue:
    """Of one receiver. logs: at most one of each prediction, behind everything else."""

    others: deque[_Message] = field(default_factory=deque)
    logs: dict[str, _Message] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.others) + len(self.logs)

    def put(self, message: _Message) -> None:
        """One that waits is superseded by a later event, or says of itself what a later one of logs would."""
        if message.event == "logs":
            self.logs.setdefault(message.record.id, message)
            return
        if message.event in ("output", "completed"):
            self.logs.pop(message.record.id, None)
        self.others.append(message)

    def take(self) -> _Message:
        return self.others.popleft() if self.others else self.logs.pop(next(iter(self.logs)))


class Webhooks:
    """Workers that deliver, each receiver's messages one at a time; see `turns.py`.

    A receiver is a host; its predictions' messages go through `_LANES` queues, a prediction's through one.
    """

    def __init__(self, store: Store, fetcher: Fetcher) -> None:
        self.secret = setting(store.database, "webhook_secret", new_secret())
        self._store, self._fetcher = store, fetcher
        self._hasty = replace(fetcher, timeout_s=min(_HASTY_S, fetcher.timeout_s))
        self._queues: dict[Lane, _Queue] = {}
        self._ready = Turns(_WORKERS)  # those with messages that no worker is busy with
        self._later: list[tuple[float, int, _Message]] = []  # heap, by monotonic seconds
        self._numbers = itertools.count()
        self._last_logs: dict[str, float] = {}
        self._last: set[str] = set()  # predictions whose last event is on its way
        self._changed = threading.Condition()
        self._stopping = False
        self._idle = 0
        self._threads: list[threading.Thread] = []

    def send(self, record: Record, event: Event, body: Callable[[], bytes]) -> None:
        """Queue a message, where the prediction asks for this event."""
        if event == "completed":
            self._last_logs.pop(record.id, None)
        if record.webhook is None or event not in (record.webhook_events or DEFAULT_EVENTS):
            return
        if event == "logs":
            now = time.monotonic()
            if now - self._last_logs.get(record.id, -LOGS_EVERY_S) < LOGS_EVERY_S:
                return
            self._last_logs[record.id] = now
        message = _Message(record, event, body)
        with self._changed:
            if event == "completed":
                if record.id in self._last:
                    return
                self._last.add(record.id)
                message.id = _last_id(record)
            self._put(message)

    def sends_last(self, id: str) -> bool:
        """Whether the last event of a prediction is on its way."""
        with self._changed:
            return id in self._last

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is due now, within the time; last events that remain are sent after the next start."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _put(self, message: _Message) -> None:
        """Under the lock."""
        key = (_host(message.record.webhook), hash(message.record.id) % _LANES)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue()
            self._ready.add(key)
        if len(queue) >= (_MOST_LAST if message.event == "completed" else _MOST_WAITING):
            said = {"prediction": message.record.id, "event": message.event}
            _log.warning("webhook dropped", extra=said)  # a last one is still due, after the next start
            if message.event == "completed":
                self._last.discard(message.record.id)
            return
        queue.put(message)
        if len(self._ready) > self._idle and len(self._threads) < _WORKERS and not self._stopping:
            name = f"ritocco-webhooks-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._changed.notify()

    def _work(self) -> None:
        while (found := self._next()) is not None:
            key, message = found
            seconds = 0.0
            try:
                seconds = self._deliver(message)
            except Exception:  # a worker goes on, whatever a message did
                _log.exception("webhook failed", extra={"prediction": message.record.id})
            with self._changed:
                self._ready.done(key, seconds)
                if self._queues[key]:
                    self._ready.add(key)
                else:
                    del self._queues[key]
                self._changed.notify()

    def _next(self) -> tuple[Lane, _Message] | None:
        """The next message once it is due, and its queue; None where it is time to stop."""
        with self._changed:
            while True:
                while self._later and self._later[0][0] <= time.monotonic():
                    self._put(heapq.heappop(self._later)[2])
                if (key := self._ready.take()) is not None:
                    return key, self._queues[key].take()
                if self._stopping:  # those who are busy take what may not be taken now
                    return None
                self._idle += 1
                self._changed.wait(self._later[0][0] - time.monotonic() if self._later else None)
                self._idle -= 1

    def _deliver(self, message: _Message) -> float:
        """One attempt. A last message that fails, for whatever reason, is tried again.

        Returns the seconds that the receiver took.
        """
        if message.event != "completed":
            with suppress(StorageError):
                return self._attempt(message, self._hasty)[1]
            return 0.0
        id, seconds = message.record.id, 0.0
        try:
            over = message.arrived or not self._store.is_due(id)  # another server may have sent it
            if not over:
                message.arrived, seconds = self._attempt(message, self._fetcher)
                over = message.arrived or message.attempts >= _ATTEMPTS
            if over:
                self._store.delivered(id)
        except StorageError as error:
            _log.warning("webhook put off", extra={"prediction": id, "error": str(error)})
            over, pause_s = False, _FIRST_PAUSE_S
        else:
            pause_s = _FIRST_PAUSE_S * 2 ** (message.attempts - 1)
        with self._changed:
            if over:
                self._last.discard(id)
            else:
                heapq.heappush(self._later, (time.monotonic() + pause_s, next(self._numbers), message))
                self._changed.notify()
        return seconds

    def _attempt(self, message: _Message, fetcher: Fetcher) -> tuple[bool, float]:
        """Whether it arrived, and the seconds that it took. Raises StorageError, before it is sent."""
        url = message.record.webhook or ""
        body = message.body()
        message.attempts += 1
        headers = {"Content-Type": "application/json"}
        headers |= signed(self.secret, message.id, body, at=int(time.time()))
        said: dict[str, object] = {"prediction": message.record.id, "event": message.event}
        begun = time.monotonic()
        try:
            status = fetcher.post(url, body, headers, field="webhook")
            arrived, why = 200 <= status < 300, f"status {status}"
        except RitoccoError as error:
            # Receivers' paths tend to be secrets.
            arrived, why = False, without_paths(str(error))
        said |= {"attempt": message.attempts, "outcome": "delivered" if arrived else why}
        seconds = time.monotonic() - begun
        _log.info("webhook", extra=said)
        return arrived, seconds


def _last_id(record: Record) -> str:
    """The same whoever sends it, after a restart too: receivers drop repetitions by it."""
    return f"msg_{hashlib.sha256(record.stream.encode('ascii')).hexdigest()[:26]}"


def _host(url: str | None) -> str:
    try:
        return (urlsplit(url or "").hostname or "").rstrip(".")
    except ValueError:  # none that the fetcher would open
        return ""
