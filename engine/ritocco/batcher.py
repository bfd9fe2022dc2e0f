"""Many requests, one device: lanes join and leave between steps, whatever their steps and guidance.

`policy.py` says who moves next, and how long anybody waits at most; `device_loop.py` does it, one thread for
each engine; `pool.py` holds who waits.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from ritocco.backends.runtime import LatentSize
from ritocco.device_loop import DeviceLoop
from ritocco.engine import Engine, OnStep
from ritocco.errors import BackendError, BusyError, DeviceLostError, RequestError
from ritocco.policy import remaining
from ritocco.pool import INTERRUPTED, Pool
from ritocco.prediction import Prediction
from ritocco.schema import PredictionInput
from ritocco.shown import shown
from ritocco.stages import Job
from ritocco.tickets import Entry, Ticket

if TYPE_CHECKING:
    import asyncio

AGEING = 0.1
"""Seconds of work that a second of waiting weighs; see `policy.py`."""
_LEAST_RETRY = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A batcher at one moment.

    waiting: requests that wait for their first step. set_aside: those that others have passed after some.
    running, lanes: those on a device, and their pictures. steps: how many were taken, by pictures in them.
    step_seconds: of a step, for each engine by size (width and height in pixels) and UNet rows. outcomes:
    predictions that ended, by status. healthy: see `Batcher.healthy`. engines: how many work. memory: see
    `Engine.memory`, for each.
    """

    waiting: int
    set_aside: int
    running: int
    lanes: int
    steps: Mapping[int, int]
    step_seconds: Sequence[Mapping[tuple[int, int, int], float]]
    outcomes: Mapping[str, int]
    healthy: bool
    engines: int
    memory: Sequence[Mapping[str, int]] = ()

    @property
    def fill(self) -> float:
        """Pictures in a step, on average; 0 before the first."""
        taken = sum(self.steps.values())
        return sum(lanes * steps for lanes, steps in self.steps.items()) / taken if taken else 0.0


class Batcher:
    """Many requests, one device, or several engines of one checkpoint, one device each, behind one queue.

    A request's pictures do not depend on who shares its steps, but for the last bits of floats where a
    runtime rounds differently at another batch size. Safe to use from several threads. It ends with `close`,
    with the interpreter, and where nobody holds it or one of its tickets any more.
    """

    def __init__(
        self,
        engines: Engine | Sequence[Engine],
        *,
        capacity: int = 8,
        waiting: int = 64,
        time_limit: float | None = None,
        ageing: float = AGEING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start a thread for each engine, and one that makes files.

        capacity: pictures that share a step at most; a request's own, up to four, always do. waiting:
        requests that are not on a device at most. time_limit: seconds that a request may take from the begin
        of its work on a device, the time that it is set aside included; None for no limit. ageing: over 0,
        see `policy.py`. clock: seconds, for tests.
        An engine may be used directly beside it: its `predict` takes the device for a whole prediction.
        Raises RequestError.
        """
        engines = _checked([engines] if isinstance(engines, Engine) else engines)
        for name, value, fits, rule in (
            ("capacity", capacity, _counts(capacity), "it must be a whole number of at least 1"),
            ("waiting", waiting, _counts(waiting), "it must be a whole number of at least 1"),
            ("ageing", ageing, _over_0(ageing), "it must be over 0"),
            (
                "time_limit",
                time_limit,
                time_limit is None or _over_0(time_limit),
                "it must be over 0, or None",
            ),
        ):
            if not fits:
                raise RequestError(f"{name} is {shown(value)}; {rule}", field=name)
        if len({(one.version, one.traits.dtype) for one in engines}) > 1:
            raise RequestError("engines must be of one checkpoint in one dtype", field="engines")
        self._core = core = _Core(engines, capacity=capacity, ageing=ageing, clock=clock)
        self._engines, self._waiting, self._time_limit, self._clock = engines, waiting, time_limit, clock
        self._keys = count()
        # At the interpreter's exit too: no thread is to be inside a network when it goes.
        self._finalizer = weakref.finalize(self, core.close, drain=False, timeout=60.0)

    def submit(
        self,
        input: Mapping[str, Any] | PredictionInput,
        *,
        on_start: Callable[[], bool | None] | None = None,
        on_step: OnStep | None = None,
        id: str | None = None,
        created_at: str | None = None,
        **options: Any,
    ) -> Ticket:
        """Check a request in this thread, and queue it.

        input, options: as for `Engine.predict`. on_start: called once, before a device works on it and its
        status is `processing`; returning False cancels it. on_step: see `OnStep`. Both are called in the
        batcher's thread, and everybody waits for them; what they raise is the end of this request alone.
        id, created_at: of the prediction, where they are given.
        Raises BusyError, before anything is looked at; RequestError and FetchError; BackendError where the
        batcher is closed, or has no engine that works.
        """
        pool = self._core.pool
        with pool.changed:
            self._refuse_closed()
            if len(pool.entries) + pool.reserved >= self._waiting:
                raise BusyError(f"{self._waiting} requests are waiting", retry_after=self._retry_after())
            pool.reserved += 1
        try:
            arrived = self._clock()
            engine = next((one for one in self._engines if not one.closed), self._engines[0])
            job = engine.check(input, **options)
            if id is not None:
                job.prediction.id = id
            if created_at is not None:
                job.prediction.created_at = created_at
            job.prediction.logs = job.request.log.text()
            ticket = _HeldTicket(job, self._core.is_own_thread, pool.wake, self)
            with pool.changed:
                self._refuse_closed()
                key = next(self._keys)
                pool.put([Entry(ticket, job, key, arrived, self._time_limit, on_start, on_step)])
        finally:
            with pool.changed:
                pool.reserved -= 1
        return ticket

    async def predict(self, input: Mapping[str, Any] | PredictionInput, **options: Any) -> Prediction:
        """`submit`, and wait for the result. Cancelling the task cancels the request.

        The request is checked, and its URLs fetched, in a thread of asyncio's. Raises as `submit` and
        `Ticket.result` do.
        """
        import asyncio  # which takes a while, and who calls this has it

        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        def tell(_: Ticket) -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile, and nobody awaits this any more
                loop.call_soon_threadsafe(end)

        submitted = asyncio.ensure_future(asyncio.to_thread(self.submit, input, **options))
        try:
            ticket = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel_submitted)
            raise
        ticket.add_done_callback(tell)
        try:
            await ended
        except asyncio.CancelledError:
            ticket.cancel()
            raise
        return ticket.result(0)

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and wait for the threads; the engines stay open.

        drain: finish what was submitted; else it ends as `failed`, between two steps, with the text that
        tells clients to ask again. timeout: seconds for the draining, and again for the rest. In one of the
        batcher's own threads (`on_step`, a callback) it does not wait.
        """
        self._core.close(drain=drain, timeout=timeout)
        self._finalizer.detach()

    @property
    def version(self) -> str:
        """Of the checkpoint: that of its predictions."""
        return self._engines[0].version

    @property
    def healthy(self) -> bool:
        """Whether requests are taken, and some engine works: the last ones on it did not all fail."""
        core = self._core
        return not core.pool.closing and any(loop.healthy for loop in core.loops)

    @property
    def lost(self) -> bool:
        """Whether the last engine's device stopped computing: only another process gets it back."""
        pool = self._core.pool
        return pool.closing and isinstance(pool.error, DeviceLostError)

    def snapshot(self) -> Snapshot:
        """How it stands."""
        core = self._core
        with core.pool.changed:
            waiting = list(core.pool.entries)
            outcomes = dict(core.pool.outcomes)
        running = [entry for loop in core.loops for entry in loop.entries]
        steps = sum((loop.steps.copy() for loop in core.loops), start=type(core.loops[0].steps)())
        return Snapshot(
            waiting=sum(not entry.first for entry in waiting),
            set_aside=sum(bool(entry.first) for entry in waiting),
            running=len(running),
            lanes=sum(entry.job.request.fields.num_outputs for entry in running),
            steps=dict(sorted(steps.items())),
            step_seconds=[_in_pixels(loop.times.measured()) for loop in core.loops],
            outcomes=outcomes,
            healthy=self.healthy,
            engines=sum(loop.healthy for loop in core.loops),
            memory=[one.memory for one in self._engines],
        )

    def _refuse_closed(self) -> None:
        pool = self._core.pool
        if pool.error is not None and pool.closing:
            kind = DeviceLostError if isinstance(pool.error, DeviceLostError) else BackendError
            raise kind(f"this batcher has no engine left ({pool.error})")
        if pool.closing:
            raise BackendError("this batcher is closed; make another")

    def _retry_after(self) -> float:
        """Seconds until the least of what is in the house is done."""
        loops, now = self._core.loops, self._clock()
        everybody = [*self._core.pool.entries, *(entry for loop in loops for entry in loop.entries)]
        least = min((remaining(one.work(now), loops[0].times) for one in everybody), default=0.0)
        return max(least / len(loops), _LEAST_RETRY)

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self.close(drain=kind is None)


class _Core:
    """What the threads hold: not the Batcher, which goes where nobody else holds it."""

    def __init__(
        self, engines: Sequence[Engine], *, capacity: int, ageing: float, clock: Callable[[], float]
    ) -> None:
        self.pool = Pool(len(engines))
        self.loops = [
            DeviceLoop(
                engine, self.pool, capacity=capacity, ageing=ageing, clock=clock, shared=len(engines) > 1
            )
            for engine in engines
        ]
        self._devices = [
            threading.Thread(target=loop.run, name=f"ritocco-{engine.traits.device}", daemon=True)
            for loop, engine in zip(self.loops, engines, strict=True)
        ]
        self._files = threading.Thread(target=self.pool.write_outputs, name="ritocco-files", daemon=True)
        for thread in (*self._devices, self._files):
            thread.start()

    def is_own_thread(self) -> bool:
        """Whether this thread is one of these."""
        return threading.current_thread() in (*self._devices, self._files)

    def close(self, *, drain: bool, timeout: float | None) -> None:
        """See `Batcher.close`."""
        pool = self.pool
        with pool.changed:
            pool.closing = True
            pool.interrupted = pool.interrupted or not drain
            pool.changed.notify_all()
        if self.is_own_thread():
            return
        if not _joined(self._devices, timeout):
            with pool.changed:
                pool.interrupted = True
                pool.changed.notify_all()
            if not drain or not _joined(self._devices, timeout):
                self._give_up()
        _joined([self._files], timeout)

    def _give_up(self) -> None:
        """A network does not return: nobody is to wait for it."""
        pool = self.pool
        with pool.changed:
            left, pool.entries = pool.entries, []
        for entry in (*left, *(entry for loop in self.loops for entry in loop.entries)):
            pool.end(entry, "failed", BackendError(INTERRUPTED))
        pool.outputs.put(None)


class _HeldTicket(Ticket):
    """Keeps its batcher at work until it has ended."""

    def __init__(self, job: Job, own: Callable[[], bool], wake: Callable[[], None], batcher: Batcher) -> None:
        request = job.request
        super().__init__(job.prediction, own, wake, steps=len(request.table), seconds=request.seconds)
        self._batcher: Batcher | None = batcher

    def end(self, error: BaseException | None) -> None:
        """See `Ticket.end`."""
        super().end(error)
        self._batcher = None


def _joined(threads: Sequence[threading.Thread], timeout: float | None) -> bool:
    """Whether they have ended within so many seconds, for all of them."""
    until = None if timeout is None else time.monotonic() + timeout
    for thread in threads:
        thread.join(None if until is None else max(0.0, until - time.monotonic()))
    return not any(one.is_alive() for one in threads)


def _cancel_submitted(submitted: asyncio.Future[Ticket]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def _in_pixels(measured: Mapping[tuple[LatentSize, int], float]) -> dict[tuple[int, int, int], float]:
    return {(8 * size.width, 8 * size.height, rows): seconds for (size, rows), seconds in measured.items()}


def _checked(engines: object) -> list[Engine]:
    """Raises RequestError for what is no list of engines, each of which is another one."""
    held = list(engines) if isinstance(engines, Sequence) else []
    rule = "it must be an Engine, or a list of at least one"
    if not held or not all(isinstance(one, Engine) for one in held):
        raise RequestError(f"engines is {shown(engines)}; {rule}", field="engines")
    if len({id(one) for one in held}) < len(held):
        rule = "each engine may stand there once: one thread drives it"
        raise RequestError(f"engines is {shown(engines)}; {rule}", field="engines")
    return held


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _over_0(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
