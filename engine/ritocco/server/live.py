"""A prediction of this process that has not ended, and what its end says where it failed."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

from ritocco.errors import RitoccoError
from ritocco.prediction import Prediction
from ritocco.server.database import StorageError
from ritocco.server.signals import Signal
from ritocco.server.store import Outcome, Record
from ritocco.shown import said
from ritocco.tickets import Ticket

# No path of the data folder's reaches a client.
_NO_STORAGE = "The server can't store or read this at the moment; its log has more"

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Live:
    """A prediction of this process that has not ended. record: without its input, which may take megabytes.
    pictures: that it makes. steps: taken, and in all. changed: new logs, a new status, the end.
    """

    record: Record
    pictures: int = 1
    ticket: Ticket | None = None
    started: bool = False
    ended: bool = False
    canceled: bool = False
    set_aside: bool = False  # to be run after the next start, or by another server
    dropped: bool = False  # another server's by now
    put_off: bool = False  # to be begun with once more when the database is back
    steps: tuple[int, int] = (0, 0)
    stepped: float = 0.0
    changed: Signal = field(default_factory=Signal)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def prediction(self) -> Prediction | None:
        """What its run says."""
        return None if self.ticket is None else self.ticket.prediction


def failure(live: Live, error: BaseException) -> Outcome:
    """What went wrong, in words; those of other people's exceptions stay in the log."""
    running = live.prediction
    logs = "" if running is None else running.logs
    if isinstance(error, StorageError):
        _log.error("not stored", extra={"prediction": live.record.id, "error": said(error)})
        return Outcome(status="failed", logs=logs, error=_NO_STORAGE)
    if isinstance(error, RitoccoError | TimeoutError):
        return Outcome(status="failed", logs=logs, error=said(error))
    _log.error("prediction broke", exc_info=error, extra={"prediction": live.record.id})
    return Outcome(status="failed", logs=logs, error="Internal error; the server's log has more")
