"""Many painters behind a route on one virtual clock, event by event."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ritocco.batcher import AGEING
from ritocco.policy import Times
from ritocco_bench.autoscaling import Autoscaler
from ritocco_bench.fleet_routes import BACKOFF_S, LONGEST_BACKOFF_S, ROUTES
from ritocco_bench.painter import Painter
from ritocco_bench.processes import BenchError
from ritocco_bench.simulation import Asked

CAPACITY = 8
MOST_ONGOING = 64
"""Requests that a painter takes, as many as a Batcher lets wait. Ray Serve's `max_ongoing_requests`."""
_ADVANCE, _TRY, _SCALE, _READY = range(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """painters: at the begin. scaled: how many there are later; None for as many. cold_s: from the decision
    for one more to its first request.
    """

    painters: int
    route: str = "two choices"
    capacity: int = CAPACITY
    ageing: float = AGEING
    most_ongoing: int = MOST_ONGOING
    scaled: Callable[[], Autoscaler] | None = None
    cold_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """Until the last arrival, but for waits, slower, fill and shared.

    waits: seconds from request to picture, in the order of arrival. slower: the same in times of what each
    takes alone. fill, shared: pictures and requests of a step. busy: part of the painters' time. ongoing,
    started: requests of a painter, with those that nobody took yet, and those that are worked on, on average.
    painter_s: seconds that painters were there, cold ones too. counts: (second, painters), at each change.
    """

    waits: Sequence[float]
    slower: Sequence[float]
    fill: float
    shared: float
    busy: float
    ongoing: float
    started: float
    painter_s: float
    counts: Sequence[tuple[float, int]]


def run(asked: Sequence[Asked], times: Times, plan: Plan, *, seed: int) -> Ran:
    """Until the last is done. asked: in the order of arrival."""
    return _Fleet(asked, times, plan, seed).run()


class _Fleet:
    def __init__(self, asked: Sequence[Asked], times: Times, plan: Plan, seed: int) -> None:
        if plan.scaled and plan.route.startswith("models"):
            raise BenchError(f"route is {plan.route!r}; a fleet that is scaled takes another")
        self._asked, self._times, self._plan = asked, times, plan
        self._scaler = plan.scaled() if plan.scaled else None
        most = self._scaler.most if self._scaler else plan.painters
        self._painters = [Painter(times, capacity=plan.capacity, ageing=plan.ageing) for _ in range(most)]
        self._members = list(range(plan.painters))
        self._spare = list(range(most - 1, plan.painters - 1, -1))
        self._cold: list[int] = []
        rng = random.Random(seed)  # noqa: S311 - of a simulation
        self._route = ROUTES[plan.route](self._painters, plan.most_ongoing, _shares(asked, times), rng)
        self._events: list[tuple[float, int, int, int]] = []  # when, what, of whom, its backoff's place
        self._ends = [0.0] * len(asked)
        self._alone: dict[tuple[Any, int, int], float] = {}
        self._here = 0  # ongoing requests, those that nobody took yet too
        self._left = len(asked)
        self._begun = self._busy = 0
        self._area = self._begun_area = self._busy_area = self._lives = self._clock = 0.0
        self._counts = [(0.0, plan.painters)]

    def run(self) -> Ran:
        asked, events = self._asked, self._events
        if self._scaler:
            heapq.heappush(events, (self._scaler.interval_s, _SCALE, 0, 0))
        key, count, last = 0, len(asked), asked[-1].at
        while self._left:
            if key < count and (not events or asked[key].at <= events[0][0]):
                now = asked[key].at
                self._pass(now, last)
                self._here += 1
                self._try(key, now, 0)
                key += 1
                continue
            now, what, who, tries = heapq.heappop(events)
            self._pass(now, last)
            if what == _ADVANCE:
                self._advance(who, now)
            elif what == _TRY:
                self._try(who, now, tries)
            elif what == _READY:
                self._ready(who)
            else:
                self._scale(now)
        return self._ran(last)

    def _pass(self, now: float, last: float) -> None:
        """Sums over time, until the last arrival."""
        until = min(now, last)
        if until > self._clock:
            passed = until - self._clock
            self._area += passed * self._here
            self._begun_area += passed * self._begun
            self._busy_area += passed * self._busy
            self._lives += passed * (len(self._members) + len(self._cold))
            self._clock = until

    def _try(self, key: int, now: float, tries: int) -> None:
        asked = self._asked[key]
        who = self._route(asked.size, self._members, now - asked.at)
        if who is None:
            again = now + min(BACKOFF_S * 2.0**tries, LONGEST_BACKOFF_S)
            heapq.heappush(self._events, (again, _TRY, key, tries + 1))
            return
        painter = self._painters[who]
        if painter.submit(key, asked, now):
            heapq.heappush(self._events, (painter.until, _ADVANCE, who, 0))

    def _advance(self, who: int, now: float) -> None:
        painter = self._painters[who]
        if painter.until != now:
            return  # it was cut short
        self._begun -= painter.begun
        self._busy -= painter.busy
        ended = painter.advance()
        self._begun += painter.begun
        self._busy += painter.busy
        if ended is not None:
            self._ends[ended] = now
            self._here -= 1
            self._left -= 1
        if painter.ongoing:
            heapq.heappush(self._events, (painter.until, _ADVANCE, who, 0))

    def _scale(self, now: float) -> None:
        assert self._scaler is not None
        there = len(self._members) + len(self._cold)
        wanted = self._scaler.decide(self._here, there)
        while there < wanted:
            one = self._spare.pop()
            self._cold.append(one)
            heapq.heappush(self._events, (now + self._plan.cold_s, _READY, one, 0))
            there += 1
        while there > wanted:
            # What it has it finishes; nothing more comes.
            self._spare.append(self._cold.pop() if self._cold else self._members.pop())
            there -= 1
        if self._counts[-1][1] != there:
            self._counts.append((now, there))
        heapq.heappush(self._events, (now + self._scaler.interval_s, _SCALE, 0, 0))

    def _ready(self, who: int) -> None:
        if who in self._cold:
            self._cold.remove(who)
            self._members.append(who)

    def _ran(self, last: float) -> Ran:
        waits = [end - one.at for end, one in zip(self._ends, self._asked, strict=True)]
        slower = [wait / self._alone_s(one) for wait, one in zip(waits, self._asked, strict=True)]
        taken = sum(one.taken for one in self._painters) or 1
        lives = self._lives or 1.0
        return Ran(
            waits=waits,
            slower=slower,
            fill=sum(one.moved for one in self._painters) / taken,
            shared=sum(one.joined for one in self._painters) / taken,
            busy=self._busy_area / lives,
            ongoing=self._area / lives,
            started=self._begun_area / lives,
            painter_s=self._lives,
            counts=self._counts,
        )

    def _alone_s(self, one: Asked) -> float:
        kind = one.size, one.steps, one.lanes
        if kind not in self._alone:
            self._alone[kind] = one.alone(self._times)
        return self._alone[kind]


def _shares(asked: Sequence[Asked], times: Times) -> dict[Any, float]:
    """Each size's seconds of work."""
    found: dict[Any, float] = {}
    each: dict[tuple[Any, int, int], float] = {}
    for one in asked:
        kind = one.size, one.steps, one.lanes
        if kind not in each:
            each[kind] = one.alone(times)
        found[one.size] = found.get(one.size, 0.0) + each[kind]
    return dict(sorted(found.items()))
