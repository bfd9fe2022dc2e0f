"""A day of a fleet as a fluid: requests are a stream, and what a painter does with so many of them is looked
up in a table of stationary runs. Hundreds of millions of requests in seconds; `fleet check` holds it against
the simulation of each request.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ritocco.policy import Times
from ritocco_bench.autoscaling import Autoscaler
from ritocco_bench.fleet_mix import DAY_S, Kind, alone, poisson
from ritocco_bench.fleet_run import Plan, run

LOADS = (0.05, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2)
"""Of what one request at a time can take."""
SLOW = (2.0, 4.0)
"""Times of what a request takes alone."""
WARM = 0.1
"""Part of a run's requests that is not counted: the fleet was empty before them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """What a painter of a fleet does in the long run. rates: requests a second, increasing. ongoing: requests
    in its house. over: shares of requests that take over SLOW times as long as alone. busy: part of its time.
    """

    rates: Sequence[float]
    ongoing: Sequence[float]
    over: Sequence[Sequence[float]]
    busy: Sequence[float]

    def after(self, ongoing: float, come: float, seconds: float) -> float:
        """Requests in its house after some seconds in which so many came: an implicit Euler step, since a
        house empties faster than such a step is long. No more leave it than at the last rate, however many
        wait.
        """
        there = [0.0, *(n + rate * seconds for n, rate in zip(self.ongoing, self.rates, strict=True))]
        if ongoing + come > there[-1]:
            return ongoing + come - self.rates[-1] * seconds
        return _line(ongoing + come, there, [0.0, *self.ongoing])

    def rate(self, which: int, share: float) -> float:
        """Requests a second of a painter at which so many take over `SLOW[which]` times as long as alone."""
        return _line(share, [0.0, *(over[which] for over in self.over)], [0.0, *self.rates])

    def slow(self, ongoing: float) -> list[float]:
        """`over`, with so many in its house; with twice the last's all are."""
        at = [0.0, *self.ongoing, 2 * self.ongoing[-1]]
        return [_line(ongoing, at, [0.0, *over, 1.0]) for over in zip(*self.over, strict=True)]


def _line(at: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Between two places in a straight line; beyond the last its value."""
    right = bisect.bisect_right(places, at)
    if right == len(places):
        return values[-1]
    low, high = places[right - 1], places[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (at - low) / (high - low)


def table(
    mix: Sequence[Kind], times: Times, plan: Plan, *, requests: int, seed: int, loads: Sequence[float] = LOADS
) -> Table:
    """Of stationary runs. Loads that a fleet can't follow are left out: its second half is slower."""
    found: list[tuple[float, float, list[float], float]] = []
    for load in loads:
        rate = load * plan.painters / alone(mix, times)
        asked = poisson(mix, rate, requests / rate, seed=seed)
        ran = run(asked, times, plan, seed=seed)
        slower = np.asarray(ran.slower)[round(WARM * len(asked)) :]
        early, late = np.array_split(slower, 2)
        if load > 1 and np.mean(late) > 1.5 * np.mean(early):
            break
        over = [float(np.mean(slower > most)) for most in SLOW]
        found.append((rate / plan.painters, ran.ongoing, over, ran.busy))
    return Table(
        rates=[one[0] for one in found],
        ongoing=[one[1] for one in found],
        over=[one[2] for one in found],
        busy=[one[3] for one in found],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """requests: that came. over: shares of them that took over SLOW times as long as alone. painter_s:
    seconds that painters were there, cold ones too. counts: (second, painters that are there), every minute.
    most: the most of them. left: requests in the house at the end.
    """

    requests: float
    over: tuple[float, ...]
    painter_s: float
    counts: Sequence[tuple[float, int]]
    most: int
    left: float


def flow(
    table: Table,
    rate: Callable[[float], float],
    *,
    painters: int,
    scaler: Autoscaler | None = None,
    cold_s: float = 0.0,
    begin_s: float = 0.0,
    seconds: float = DAY_S,
    step_s: float = 1.0,
) -> Day:
    """rate: requests a second at a second of the day. painters: at the begin. scaler: None for a fixed fleet.
    cold_s: see `fleet_run.Plan`.
    """
    warm, ongoing = painters, 0.0
    cold: deque[float] = deque()  # when each takes requests
    requests = painter_s = 0.0
    slow = [0.0] * len(SLOW)
    counts, look = [(begin_s, painters)], begin_s + (scaler.interval_s if scaler else DAY_S)
    most = painters
    for place in range(round(seconds / step_s)):
        now = begin_s + place * step_s
        while cold and cold[0] <= now:
            cold.popleft()
            warm += 1
        come = rate(now) * step_s
        ongoing = warm * table.after(ongoing / warm, come / warm, step_s)
        requests += come
        for which, share in enumerate(table.slow(ongoing / warm)):
            slow[which] += share * come
        painter_s += (warm + len(cold)) * step_s
        if scaler and now >= look:
            look += scaler.interval_s
            there = warm + len(cold)
            wanted = scaler.decide(ongoing, there)
            cold.extend([now + cold_s] * max(0, wanted - there))
            for _ in range(there - wanted):
                if cold:
                    cold.pop()
                else:
                    warm -= 1
            most = max(most, wanted)
        if now % 60 < step_s:
            counts.append((now, warm + len(cold)))
    return Day(
        requests=requests,
        over=tuple(each / requests for each in slow),
        painter_s=painter_s,
        counts=counts,
        most=most,
        left=ongoing,
    )
