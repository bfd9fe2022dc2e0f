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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ritocco.errors import RitoccoError
from ritocco.fetch import Fetcher
from ritocco.prediction import new_id
from ritocco.server.store import Record, Store

Event: TypeAlias = Literal["start", "output", "logs", "completed"]
# Of the original, where a request names none.
DEFAULT_EVENTS: tuple[Event, ...] = ("output", "completed")
LOGS_EVERY_S = 0.5
_ATTEMPTS = 8  # of the last event: over about two minutes
_FIRST_PAUSE_S = 1.0
_MOST_WAITING = 1000  # of each worker, beyond which all but last events are dropped
_WORKERS = 4

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


@dataclass(order=True, slots=True)
class _Message:
    """due: monotonic seconds. body: made when it is sent, so that it says what holds then."""

    due: float
    number: int
    record: Record = field(compare=False)
    event: Event = field(compare=False)
    body: Callable[[], bytes] = field(compare=False)
    id: str = field(compare=False, default_factory=lambda: f"msg_{new_id()}")
    attempts: int = field(compare=False, default=0)


class Webhooks:
    """Workers that deliver; a prediction's messages all go through one of them."""

    def __init__(self, store: Store, fetcher: Fetcher) -> None:
        self.secret = store.database.setting("webhook_secret", new_secret())
        self._workers = [_Worker(store, fetcher, self.secret, number) for number in range(_WORKERS)]
        self._last_logs: dict[str, float] = {}
        self._numbers = itertools.count()

    def send(self, record: Record, event: Event, body: Callable[[], bytes]) -> None:
        """Queue a message, where the prediction asks for this event."""
        if record.webhook is None or event not in (record.webhook_events or DEFAULT_EVENTS):
            return
        if event == "logs":
            now = time.monotonic()
            if now - self._last_logs.get(record.id, -LOGS_EVERY_S) < LOGS_EVERY_S:
                return
            self._last_logs[record.id] = now
        if event == "completed":
            self._last_logs.pop(record.id, None)
        worker = self._workers[hash(record.id) % _WORKERS]
        worker.put(_Message(time.monotonic(), next(self._numbers), record, event, body))

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is due now, within the time; last events that remain are sent after the next start."""
        deadline = time.monotonic() + timeout_s
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))


class _Worker:
    def __init__(self, store: Store, fetcher: Fetcher, secret: str, number: int) -> None:
        self._store, self._fetcher, self._secret = store, fetcher, secret
        self._messages: list[_Message] = []
        self._changed = threading.Condition()
        self._stopping = False
        self.thread = threading.Thread(target=self._work, name=f"ritocco-webhooks-{number}", daemon=True)
        self.thread.start()

    def put(self, message: _Message) -> None:
        with self._changed:
            if len(self._messages) >= _MOST_WAITING and message.event != "completed":
                _log.warning(
                    "webhook dropped", extra={"prediction": message.record.id, "event": message.event}
                )
                return
            heapq.heappush(self._messages, message)
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def _work(self) -> None:
        while (message := self._next()) is not None:
            try:
                self._deliver(message)
            except Exception:  # a worker goes on, whatever a message did
                _log.exception("webhook failed", extra={"prediction": message.record.id})

    def _next(self) -> _Message | None:
        """The next message once it is due; None where it is time to stop."""
        with self._changed:
            while True:
                left = self._messages[0].due - time.monotonic() if self._messages else None
                if left is not None and left <= 0:
                    return heapq.heappop(self._messages)
                if self._stopping:
                    return None
                self._changed.wait(left)

    def _deliver(self, message: _Message) -> None:
        url = message.record.webhook or ""
        message.attempts += 1
        body = message.body()
        headers = {"Content-Type": "application/json"}
        headers |= signed(self._secret, message.id, body, at=int(time.time()))
        said: dict[str, object] = {"prediction": message.record.id, "event": message.event}
        try:
            status = self._fetcher.post(url, body, headers, field="webhook")
            arrived, why = 200 <= status < 300, f"status {status}"
        except RitoccoError as error:
            arrived, why = False, str(error)
        said |= {"attempt": message.attempts, "outcome": "delivered" if arrived else why}
        _log.info("webhook", extra=said)
        if message.event != "completed":
            return
        if arrived or message.attempts >= _ATTEMPTS:
            self._store.delivered(message.record.id)
        else:
            message.due = time.monotonic() + _FIRST_PAUSE_S * 2 ** (message.attempts - 1)
            self.put(message)
