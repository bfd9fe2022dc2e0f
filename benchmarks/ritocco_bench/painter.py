"""A batcher with one engine on a virtual clock, in few decisions: equal turns are taken together.

A step's turn is the policy's next one too, until one of those who move has taken all steps, somebody comes,
or one who moves passes another in order. All grow old alike, and of an order that stays the same a larger
company that was not worth a turn is not worth one later: it is one of requests that are all started, whose
worth does not change, or somebody in it is to be started first, and that is spread over fewer steps each
time. So nothing is lost by it; `tests/benchmarks/test_fleet.py` holds it against `simulation.batched`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ritocco.policy import Times, Turn, Work, decide, remaining
from ritocco_bench.simulation import Asked

NEVER = math.inf


class _Held:
    """A request that is in the house."""

    __slots__ = ("asked", "left", "started")

    def __init__(self, asked: Asked) -> None:
        self.asked, self.left, self.started = asked, asked.steps, False


class Painter:
    """until: when it has to be told to `advance`, in seconds; NEVER while it has nothing to do. begun:
    requests that it works on, which are lost with its device. taken: steps. moved, joined: lanes and requests
    in them.
    """

    __slots__ = (
        *("_ageing", "_capacity", "_count", "_each", "_held", "_since", "_times", "_turn"),
        *("begun", "joined", "moved", "taken", "until"),
    )

    def __init__(self, times: Times, *, capacity: int, ageing: float) -> None:
        """capacity, ageing: see `Batcher`."""
        self._times, self._capacity, self._ageing = times, capacity, ageing
        self._held: dict[int, _Held] = {}
        self._turn: Turn | None = None
        self._since, self._each, self._count = 0.0, 0.0, 0
        self.until = NEVER
        self.begun = self.taken = self.moved = self.joined = 0

    @property
    def ongoing(self) -> int:
        """Requests in the house."""
        return len(self._held)

    @property
    def busy(self) -> bool:
        """Whether a turn is under way."""
        return self._turn is not None

    def submit(self, key: int, asked: Asked, now: float) -> bool:
        """Who comes is seen when the turn under way ends. Returns whether `until` is another now.

        key: those who came before have lesser ones.
        """
        self._held[key] = _Held(asked)
        before = self.until
        if self._turn is None:
            self.until = now
        elif self._turn.act == "step":
            begun = max(1, math.ceil((now - self._since) / self._each))
            if begun < self._count:
                self._count = begun
                self.until = self._since + begun * self._each
        return self.until != before

    def advance(self) -> int | None:
        """At `until`: end what was under way, and begin the next. Returns who is done with it."""
        now, turn, ended = self.until, self._turn, None
        if turn is not None:
            ended = self._end(turn)
        self._turn, self.until = None, NEVER
        if self._held:
            self._begin(now)
        return ended

    def _end(self, turn: Turn) -> int | None:
        first = turn.keys[0]
        if turn.act == "finish":
            del self._held[first]
            self.begun -= 1
            return first
        if turn.act == "start":
            self._held[first].started = True
            return None
        self.taken += self._count
        self.joined += self._count * len(turn.keys)
        for key in turn.keys:
            held = self._held[key]
            held.left -= self._count
            self.moved += self._count * held.asked.lanes
        return None

    def _begin(self, now: float) -> None:
        works = [
            one.asked.work(key, now, left=one.left, started=one.started) for key, one in self._held.items()
        ]
        turn = decide(works, self._times, capacity=self._capacity, ageing=self._ageing)
        asked = self._held[turn.keys[0]].asked
        self._count = 1
        if turn.act == "start":
            self._each = self._times.start(asked.size)
            self.begun += 1
        elif turn.act == "finish":
            self._each = asked.lanes * self._times.finish(asked.size)
        else:
            lanes = sum(self._held[key].asked.lanes for key in turn.keys)
            self._each = self._times.step(asked.size, lanes)
            self._count = self._alike(works, turn)
        self._turn, self._since = turn, now
        self.until = now + self._count * self._each

    def _alike(self, works: Sequence[Work], turn: Turn) -> int:
        """How many turns are this one if nobody comes."""
        times, ageing = self._times, self._ageing
        most = float(min(self._held[key].left for key in turn.keys))
        moving = set(turn.keys)
        placed = [
            (
                remaining(one, times) - ageing * one.age,
                times.step(one.size, one.rows) if one.key in moving else 0.0,
            )
            for one in works
        ]
        for place, speed in placed:
            if speed:
                for other, pace in placed:
                    if other <= place and pace < speed:
                        most = min(most, (place - other) / (speed - pace))
        return max(1, math.ceil(most))
