"""The requests that no device holds, waiting or set aside: what a batcher's threads share."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable

from ritocco.errors import BackendError
from ritocco.prediction import Status
from ritocco.tickets import Entry

_log = logging.getLogger(__name__)

INTERRUPTED = "Prediction interrupted; please retry (code: PA)"
"""Of the original's API; applications look for it, and ask again."""


class Pool:
    """changed: held while anything here is read or written, and told of every change. closing: nothing more
    is taken. interrupted: what is not done yet is to end now. reserved: places of requests that are being
    looked at. loops: how many take from it. error: what ended the last that
    failed. outcomes: how many ended how.
    """

    def __init__(self, loops: int) -> None:
        self.changed = threading.Condition()
        self.entries: list[Entry] = []
        self.closing = False
        self.interrupted = False
        self.reserved = 0
        self.loops = loops
        self.error: BaseException | None = None
        self.outcomes: Counter[str] = Counter()
        self.outputs: queue.SimpleQueue[tuple[Entry, Callable[[], None]] | None] = queue.SimpleQueue()

    def put(self, entries: Iterable[Entry]) -> None:
        """Anybody may have these."""
        with self.changed:
            self.entries += entries
            self.changed.notify_all()

    def wake(self) -> None:
        """Have everybody look again."""
        with self.changed:
            self.changed.notify_all()

    def end(self, entry: Entry, status: Status, error: BaseException | None = None) -> None:
        """Write the last of an answer, count it, and let go of whoever waits for it."""
        if entry.ticket.done():
            return
        entry.conclude(status, error)
        with self.changed:
            self.outcomes[status] += 1
        entry.ticket.end(error)

    def cancel(self, entry: Entry) -> None:
        """End one that nobody wants any more."""
        entry.job.request.log.note(f"Canceled after {entry.taken} of {entry.steps} steps")
        self.end(entry, "canceled")

    def stopped(self, error: BaseException | None) -> None:
        """A loop has ended, by `error` or because there was nothing more to do. With the last one nobody is
        left who would take the others.
        """
        with self.changed:
            self.loops -= 1
            self.error = error or self.error
            if self.loops:
                return
            self.closing = True
            left, self.entries = self.entries, []
        for entry in left:
            self.end(entry, "failed", self.error)
        self.outputs.put(None)

    def write_outputs(self) -> None:
        """For the thread that makes files of pictures: until None. What raises ends its entry alone."""
        while (given := self.outputs.get()) is not None:
            entry, work = given
            try:
                work()
            except Exception as error:
                self._abandon(entry, error)
            except BaseException as error:  # a ticket raises it in somebody's thread, which is not to exit
                self._abandon(entry, BackendError(f"{type(error).__name__}: {error}"))
            del given, entry, work  # nobody's pictures are kept while this waits

    def _abandon(self, entry: Entry, error: Exception) -> None:
        """End it, if need be without the last of its answer."""
        _log.error("making files of prediction %s failed", entry.ticket.id, exc_info=error)
        try:
            self.end(entry, "failed", error)
        except BaseException:
            _log.exception("prediction %s has no last answer", entry.ticket.id)
            entry.ticket.end(error)
