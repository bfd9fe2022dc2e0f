"""How many lanes may share a step with each request under a budget, planned while the device works."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from ritocco.schema import PredictionInput
from ritocco.tickets import Entry

_log = logging.getLogger(__name__)


class StepBounds:
    """A plan of a size that was not asked for before takes seconds: whoever waits for one moves alone."""

    def __init__(self, plan: Callable[[PredictionInput], int]) -> None:
        """plan: how many; it is called in a thread of its own."""
        self._plan = plan
        self._planned: dict[Entry, Future[int]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ritocco-plans")

    def look_at(self, entries: Iterable[Entry]) -> None:
        """Plan for those that are new, and forget who is none of these."""
        before, self._planned = self._planned, {}
        for one in entries:
            if one in before:
                self._planned[one] = before.pop(one)
                continue
            with suppress(RuntimeError):  # closed, or the interpreter is about to end
                self._planned[one] = self._thread.submit(self._learned, one)
        for gone in before.values():
            gone.cancel()

    def of(self, entry: Entry) -> int:
        """1 where it is not known, or not yet."""
        planned = self._planned.get(entry)
        return planned.result() if planned is not None and planned.done() else 1

    def close(self) -> None:
        """Plan no more; does not wait."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _learned(self, entry: Entry) -> int:
        try:
            return self._plan(entry.job.request.fields)
        except Exception:
            _log.warning(
                "no plan of company for prediction %s: it moves alone", entry.ticket.id, exc_info=True
            )
            return 1
