"""This server shows the others on its database that it lives."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from ritocco.server.database import AwayError
from ritocco.server.postgres import Postgres

_MOST_EVERY_S = 1.0
_BEATS = 5
_BEAT = (
    "INSERT INTO servers VALUES (?, clock_timestamp()) "
    "ON CONFLICT (id) DO UPDATE SET seen = clock_timestamp()"
)


class Pulse:
    """A thread that does nothing else, so that nothing holds it up."""

    def __init__(self, database: Postgres, id: str, *, gone_after_s: float) -> None:
        """gone_after_s: seconds after which a server that was not seen is gone. Raises AwayError."""
        self._database, self._id, self._gone_after_s = database, id, gone_after_s
        self.every_s = min(_MOST_EVERY_S, gone_after_s / _BEATS)
        self._wake = threading.Event()
        self._last = self._since = time.monotonic()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="ritocco-pulse", daemon=True)
        self._thread.start()

    @property
    def may_judge(self) -> bool:
        """Whether a server that was not seen is gone: not where the database was away, and all of them have
        yet to come back; nor where this process stood still.
        """
        now = time.monotonic()
        return now - self._since >= self._gone_after_s and now - self._last < self._gone_after_s / 2

    def close(self) -> None:
        """No more beats."""
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._wake.wait(self.every_s):
            with suppress(AwayError):
                self._beat()

    def _beat(self) -> None:
        try:
            self._database.beat(_BEAT, (self._id,))
        except AwayError:
            self._last = float("-inf")
            raise
        now = time.monotonic()
        if now - self._last > self._gone_after_s / 2:
            self._since = now
        self._last = now
