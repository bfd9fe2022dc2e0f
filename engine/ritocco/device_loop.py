"""The thread that owns an engine's device: one turn after the other, as the policy says."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ritocco import stages
from ritocco.backends.runtime import Runtime
from ritocco.engine import Engine
from ritocco.errors import BackendError, DeviceLostError, TimeLimitError
from ritocco.pixels import Pixels
from ritocco.policy import Turn, decide, in_order
from ritocco.pool import INTERRUPTED, Pool
from ritocco.prediction import timestamp
from ritocco.preview import Preview
from ritocco.seats import Seats
from ritocco.step_bounds import StepBounds
from ritocco.step_times import StepTimes
from ritocco.tickets import Entry

_log = logging.getLogger(__name__)

LEAST_SEATS = 4
"""Pictures of the largest request, which move together."""
BROKEN = 3
"""Failures one after the other, of whatever requests, after which an engine is not called healthy."""
PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""After a failure of such an engine, each double the last: it is not to fail at all that waits."""


class DeviceLoop:
    """Takes requests from the pool, moves them, and puts those back that others have to pass.

    failures: turns that failed since one did not. steps: how many, by lanes.
    """

    def __init__(
        self,
        engine: Engine,
        pool: Pool,
        *,
        capacity: int,
        ageing: float,
        clock: Callable[[], float],
        shared: bool,
    ) -> None:
        """shared: whether other loops take from the pool, so that nobody keeps a seat without moving."""
        self.times = StepTimes()
        self.failures = 0
        self.steps: Counter[int] = Counter()
        self._engine, self._pool, self._clock = engine, pool, clock
        # A plan of memory is of what moves: under a budget nobody else is on the device.
        self._budgeted = engine.budgeted
        self._capacity, self._ageing = capacity, ageing
        self._settles = not self._budgeted and not shared
        self._seats = Seats(max(capacity, LEAST_SEATS))
        self._bounds: StepBounds | None = None
        if self._budgeted:
            self._bounds = StepBounds(lambda fields: engine.together(fields, capacity))
        self._held: list[Entry] = []  # whose turn it is
        self._paused_until = 0.0  # of `time.monotonic`

    @property
    def entries(self) -> list[Entry]:
        """Those on the device, for a look from outside."""
        held = [one for one in self._held if not one.left_the_device]
        return held + [one for one in self._seats.entries if one not in held]

    @property
    def healthy(self) -> bool:
        """Whether the latest requests here did not all fail."""
        return self.failures < BROKEN and not self._engine.closed

    def run(self) -> None:
        """Until the pool is closed and empty. Whatever happens, nobody is left waiting."""
        error: BaseException | None = None
        ended: set[Entry] = set()
        try:
            while self._turn():
                self._held = []
        except BaseException as caught:
            error, self.failures = self._explained(caught), BROKEN
            if not self._engine.closed:
                _log.error("a batcher's thread has ended: %s", error, exc_info=caught)
            ended = self._leave_to_others(error)
        self._held = []
        if self._bounds is not None:
            self._bounds.close()
        self._seats.forget()
        self._pool.stopped(error)
        for entry in ended:
            self._pool.end(entry, "failed", error)

    def _explained(self, error: BaseException) -> BaseException:
        if self._engine.closed or self._engine.responds():
            return error
        return DeviceLostError(f"{self._engine.traits.device} has stopped computing: {error}")

    def _leave_to_others(self, error: BaseException) -> set[Entry]:
        """What had not begun to move here may move elsewhere. Where the device is lost, what moved may begin
        again, but for those whose turn it was: one of them may be what broke it. Returns who may not.
        """
        seated = self._seats.entries
        elsewhere = [one for one in {*self._held, *seated} if not one.left_the_device and self._others()]
        if isinstance(error, DeviceLostError):
            elsewhere = [one for one in elsewhere if one not in self._held]
            with self._pool.changed:
                for entry in (*elsewhere, *self._pool.entries):
                    entry.forget(error)
        else:
            elsewhere = [one for one in elsewhere if one not in seated]
        self._pool.put(elsewhere)
        return {*self._held, *seated}.difference(elsewhere)

    def _turn(self) -> bool:
        """The next thing that is to be done. False at the end."""
        pool = self._pool
        with pool.changed:
            while not pool.entries and not self._seats.entries:
                if self._bounds is not None:
                    self._bounds.look_at(())  # nobody's pictures are kept while there is nothing to do
                if pool.closing:
                    return False
                pool.changed.wait()
            self._engine.refuse_closed()
            now = self._clock()
            everybody = [*pool.entries, *self._seats.entries]
            over = [one for one in everybody if self._is_over(one, now)]
            pause = self._paused_until - time.monotonic()
            if over:
                held = over
            elif pause > 0 and not pool.closing:
                pool.changed.wait(pause)
                return True
            else:
                if self._bounds is not None:
                    self._bounds.look_at(everybody)
                works = [one.work(now, self._bound(one)) for one in everybody]
                turn = decide(works, self.times, capacity=self._capacity, ageing=self._ageing)
                by_key = {one.key: one for one in everybody}
                held = [by_key[key] for key in turn.keys]
            self._held = held
            pool.entries = [one for one in pool.entries if one not in held]
        seated = self._seats.entries
        if over:
            self._end_over(over)
        elif turn.act == "step":
            self._step(held, now)
        else:
            self._pass(turn, held[0])
        here = self._seats.entries
        pool.put(one for one in {*seated, *held} if one not in here and not one.left_the_device)
        return True

    def _bound(self, entry: Entry) -> int | None:
        """See `Work.most`."""
        return None if self._bounds is None else self._bounds.of(entry)

    def _others(self) -> bool:
        with self._pool.changed:
            return self._pool.loops > 1

    def _is_over(self, entry: Entry, now: float) -> bool:
        late = entry.deadline is not None and now >= entry.deadline
        return entry.ticket.cancelled or late or self._pool.interrupted

    def _end_over(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._discard(entry)
            if self._pool.interrupted:
                self._end(entry, BackendError(INTERRUPTED))
            elif entry.ticket.cancelled:
                self._cancel(entry)
            else:
                words = f"not done within the time limit of {entry.limit:g} seconds, after {entry.taken} of "
                self._end(entry, TimeLimitError(f"{words}{entry.steps} steps"))

    def _pass(self, turn: Turn, entry: Entry) -> None:
        """Start or finish a request. Where that fails, it fails, and the loop goes on."""
        if turn.act == "start" and not self._begin(entry):
            return
        work = self._start if turn.act == "start" else self._finish
        try:
            with self._engine.on_device(entry.job.request.fields) as runtime:
                if self._budgeted:
                    self._vacate([])
                try:
                    work(runtime, entry)
                except BackendError:
                    if not self._seats.entries:
                        raise
                    self._vacate([])  # memory may have been what was missing
                    work(runtime, entry)
        except Exception as error:
            self._failed(entry, error)
        else:
            self.failures = 0

    def _begin(self, entry: Entry) -> bool:
        """Whether it is still wanted now that it is its turn; noted once, before anything is computed."""
        prediction, request = entry.job.prediction, entry.job.request
        if prediction.status != "starting":  # it begins again
            return True
        if entry.on_start is not None and not self._wanted(entry, entry.on_start):
            return False
        prediction.started_at = timestamp()
        prediction.status = "processing"
        waited = time.perf_counter() - entry.job.begun - request.seconds["inputs"]
        request.seconds["waited"] = waited
        entry.job = replace(entry.job, begun=entry.job.begun + waited)
        if entry.limit is not None:
            entry.deadline = self._clock() + entry.limit
        return True

    def _start(self, runtime: Runtime, entry: Entry) -> None:
        request = entry.job.request
        began = self._clock()
        lanes = stages.lanes(runtime, request)
        self.times.took("start", entry.job.size, self._clock() - began)
        entry.first, entry.lanes = lanes, list(lanes)
        request.log.start()

    def _finish(self, runtime: Runtime, entry: Entry) -> None:
        began, request = self._clock(), entry.job.request
        pixels = stages.decoded(runtime, request, [lane.latents for lane in entry.lanes])
        with request.timed("outputs"):
            pixels = stages.seamed(request, pixels)
            kept = stages.allowed(request, pixels)
        self.times.took("finish", entry.job.size, (self._clock() - began) / len(pixels))
        entry.left_the_device = True
        self._pool.outputs.put((entry, partial(self._publish, entry, pixels, kept)))

    def _publish(self, entry: Entry, pixels: Pixels, kept: list[int]) -> None:
        """In the thread that makes files."""
        try:
            if entry.ticket.cancelled:
                self._pool.cancel(entry)
                return
            with entry.job.request.timed("outputs"):
                status = stages.publish(entry.job, pixels, kept)
            self._pool.end(entry, status)
        except Exception as error:
            self._pool.end(entry, "failed", error)

    def _step(self, entries: list[Entry], now: float) -> None:
        """Move requests by one step. Where that fails, one that was alone fails; several start again, each
        by itself, since nobody knows which of them it was, or how far the others came.
        """
        try:
            with self._engine.on_device(*(one.job.request.fields for one in entries)) as runtime:
                if not self._settles:
                    self._vacate(entries)
                entries = [one for one in entries if self._seat(runtime, one, entries, now)]
                if not entries:
                    return
                self._move(entries)
        except Exception as error:
            for entry in entries:
                self._discard(entry)
                if len(entries) == 1 or entry.alone:
                    self._failed(entry, error)
                else:
                    entry.again(error)
            return
        self.failures = 0
        for entry in entries:
            self._tell(entry)

    def _seat(self, runtime: Runtime, entry: Entry, moving: list[Entry], now: float) -> bool:
        """Whether it sits. Others leave for it, those with the most work first."""
        if entry in self._seats.entries:
            return True
        others = {one.key: one for one in self._seats.entries if one not in moving}
        works = in_order([one.work(now) for one in others.values()], self.times, ageing=self._ageing)
        while works and not self._seats.room_for(entry):
            self._leave(others[works.pop().key])
        try:
            try:
                self._seats.seat(runtime, entry)
            except Exception:
                self._vacate(moving)  # memory may have been what was missing
                self._seats.seat(runtime, entry)
        except Exception as error:
            self._failed(entry, error)
            return False
        return True

    def _move(self, entries: list[Entry]) -> None:
        size, began = entries[0].job.size, self._clock()
        self._seats.step(entries)
        ended = self._clock()
        lanes = sum(len(one.lanes) for one in entries)
        rows = sum(len(one.lanes) * one.rows for one in entries)
        self.times.stepped(size, rows, frozenset(one.key for one in entries), began, ended)
        self.steps[lanes] += 1
        for entry in entries:
            seconds = entry.job.request.seconds
            seconds["denoise"] = seconds.get("denoise", 0.0) + ended - began
        done = [one for one in entries if one.taken == one.steps]
        for entry in entries:
            if entry.ticket.looked_at and entry not in done:
                self._show(entry)
        for entry in done:
            self._leave(entry)
        if done:
            self.times.waited(self._clock())

    def _show(self, entry: Entry) -> None:
        """Whoever looks at it, where it stands. It goes on where that fails."""
        try:
            states = self._seats.peek(entry)
        except Exception:
            _log.warning("no preview of prediction %s", entry.ticket.id, exc_info=True)
            return
        entry.ticket.show(
            Preview(
                taken=entry.taken, lanes=tuple(entry.lanes), states=states, inputs=entry.job.request.inputs
            )
        )

    def _tell(self, entry: Entry) -> None:
        """Whoever asked for it, about the step."""
        if entry.ticket.done():
            return
        log = entry.job.request.log
        log.progress(entry.taken, entry.steps)
        entry.job.prediction.logs = log.text()
        if entry.on_step is not None:
            self._wanted(entry, partial(entry.on_step, entry.taken, entry.steps))

    def _wanted(self, entry: Entry, told: Callable[[], bool | None]) -> bool:
        """Whether it goes on, of which its owner is told. What they raise is the end of it alone."""
        try:
            wanted = told() is not False
        except BaseException as error:
            self._discard(entry)
            self._end(entry, error)
            return False
        if not wanted:
            self._discard(entry)
            self._cancel(entry)
        return wanted

    def _vacate(self, kept: list[Entry]) -> None:
        for entry in self._seats.entries:
            if entry not in kept:
                self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        """Set aside."""
        try:
            self._seats.leave(entry)
        except Exception as error:
            self._drop(entry)
            self._end(entry, error)

    def _discard(self, entry: Entry) -> None:
        """Take a request off the device that goes no further, or begins again."""
        with self._engine.holding():
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        for other in self._seats.discard(entry):
            other.again(BackendError("others could not be taken out of its batch"))

    def _failed(self, entry: Entry, error: Exception) -> None:
        if self._engine.closed or not self._engine.responds():
            raise error  # nothing will run here any more
        self.failures += 1
        if self.failures >= BROKEN:
            pause = min(PAUSE_S * 2.0 ** (self.failures - BROKEN), LONGEST_PAUSE_S)
            self._paused_until = time.monotonic() + pause
        self._end(entry, error)

    def _end(self, entry: Entry, error: BaseException) -> None:
        entry.left_the_device = True
        self._pool.end(entry, "failed", error)

    def _cancel(self, entry: Entry) -> None:
        entry.left_the_device = True
        self._pool.cancel(entry)
