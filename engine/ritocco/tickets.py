"""A ticket for a request that was handed to a batcher, and what the batcher keeps of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ritocco import stages
from ritocco.backends.runtime import Lane
from ritocco.errors import BackendError, RitoccoError
from ritocco.policy import Work
from ritocco.prediction import Prediction, Status
from ritocco.preview import Preview

_log = logging.getLogger(__name__)


class Ticket:
    """A request on its way through a Batcher; it always ends. Safe to use from several threads.

    id: of the prediction. prediction: live; its status goes from `starting` to `processing` to `succeeded`,
    `failed` or `canceled`, and its logs grow with every step. The status changes last: who sees it ended
    sees all of it.
    steps: in all; 0 where another process counts them. seconds: spent so far, by phase; they are the
    prediction's metrics at its end.
    """

    def __init__(
        self,
        prediction: Prediction,
        own: Callable[[], bool],
        wake: Callable[[], None],
        *,
        steps: int = 0,
        seconds: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """own: whether this thread is one of the batcher's. wake: tells the batcher to look."""
        self.id, self.prediction = prediction.id, prediction
        self.steps, self.seconds = steps, seconds
        self.cancelled = False
        self.looked_at = False
        self._preview: Preview | None = None
        self._own, self._wake = own, wake
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Ticket], None]] = []

    def result(self, timeout: float | None = None) -> Prediction:
        """Wait for the end. timeout: seconds, for ever where None.

        Returns the prediction: `succeeded`, `canceled`, or `failed` where every picture was flagged. Raises
        what `Engine.predict` would have raised; TimeLimitError; BackendError where the batcher was closed, or
        where one of its own threads (in `on_step`, or in a callback) would wait for itself; and TimeoutError.
        """
        if not self.done() and self._own():
            raise BackendError("a batcher's own thread can't wait for a result: do so in another")
        if not self._ended.wait(timeout):
            raise TimeoutError(f"prediction {self.id} is not done after {timeout} seconds")
        if self._error is not None:
            raise self._error
        return self.prediction

    def cancel(self) -> None:
        """Stop it between two steps. Of no effect once the pictures are decoded."""
        self.cancelled = True
        self._wake()

    def look(self) -> Preview | None:
        """What it looks like, as of the step after the last look; the next step answers this one.

        None before that, once it has ended, and where no step follows. Who is not looked at pays nothing.
        """
        self.looked_at = True
        return self._preview

    def show(self, preview: Preview) -> None:
        """For the batcher: answer those who looked."""
        with self._lock:
            if not self.done():
                self._preview, self.looked_at = preview, False

    def done(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    def add_done_callback(self, fn: Callable[[Ticket], None]) -> None:
        """Call `fn` with this ticket at its end, in a thread of the batcher, which waits for it; at once and
        in this one where it has ended. What it raises is logged.
        """
        with self._lock:
            if not self.done():
                self._callbacks.append(fn)
                return
        self._call(fn)

    def end(self, error: BaseException | None) -> None:
        """For the batcher: the first end counts. error: what `result` raises."""
        with self._lock:
            if self.done():
                return
            self._error, self._preview = error, None
            callbacks, self._callbacks = self._callbacks, []
            self._ended.set()
        for fn in callbacks:
            self._call(fn)

    def _call(self, fn: Callable[[Ticket], None]) -> None:
        try:
            fn(self)
        except BaseException:  # the batcher's thread goes on
            _log.exception("a done callback of prediction %s failed", self.id)


@dataclass(slots=True, eq=False)
class Entry:
    """A request inside a batcher. Belongs to whoever took it from the pool.

    key: the order of arrival. arrived, deadline: of the batcher's clock, in seconds; the latter is known once
    it has begun. limit: seconds from its begin to its end. first: its lanes as they begin; empty before text
    and picture are encoded. lanes: as they were when they last left the device.
    taken: steps. alone: it goes by itself, because a step that it had part in failed. left_the_device: it has
    ended, or its pictures are being made into files.
    """

    ticket: Ticket
    job: stages.Job
    key: int
    arrived: float
    limit: float | None = None
    on_start: Callable[[], bool | None] | None = None
    on_step: Callable[[int, int], bool | None] | None = None
    deadline: float | None = None
    first: list[Lane] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    taken: int = 0
    alone: bool = False
    left_the_device: bool = False

    @property
    def steps(self) -> int:
        """In all."""
        return len(self.job.request.table)

    @property
    def rows(self) -> int:
        """Of the UNet, for each lane."""
        return 2 if self.job.request.fields.guidance_scale > 1 else 1

    def work(self, now: float, most: int | None = None) -> Work:
        """As the policy sees it. most: see `Work`."""
        count = self.job.request.fields.num_outputs
        return Work(
            key=self.key,
            size=self.job.size,
            lanes=count,
            rows=count * self.rows,
            left=self.steps - self.taken,
            age=now - self.arrived,
            started=bool(self.first),
            alone=self.alone,
            most=most,
        )

    def conclude(self, status: Status, error: BaseException | None = None) -> None:
        """Write the last of the answer."""
        if error is not None:
            said = str(error) if isinstance(error, RitoccoError) else f"{type(error).__name__}: {error}"
            self.job.prediction.error = said
        stages.conclude(self.job, status)
        self.first = self.lanes = []

    def again(self, error: BaseException) -> None:
        """Back to before the first step: results depend on the input alone, so only time is lost."""
        self.job.request.log.note(f"A step of several requests failed ({error}); starting again, alone")
        self.lanes, self.taken, self.alone = list(self.first), 0, True

    def forget(self, error: BaseException) -> None:
        """Back to before anything was computed: what was may lie on a device that is lost."""
        if self.first:
            self.job.request.log.note(f"{error}; starting again")
        self.first, self.lanes, self.taken = [], [], 0
