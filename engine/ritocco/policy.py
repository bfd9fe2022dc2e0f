"""Which request gets the device next, and whose lanes move with it. Pure functions: no clock, no device.

**Order.** Least remaining work first, less what waiting has earned: a request's key is

    remaining - ageing * age        remaining: seconds of the work that is left, were it alone on the device
                                    age: seconds since it was asked for

and the least goes first, so that a picture of 4 steps passes one of 500.

**Nobody starves.** Let a request be asked for at time 0 with r seconds of work. One that comes at t with q
seconds goes first only while q - ageing * (age - t) < r - ageing * age, that is q < r - ageing * t: from
t = r / ageing on nobody who comes can pass it. So it waits for at most r / ageing seconds of other people's
arrivals, and then only for the W seconds of work that are in the house at that moment, its own among them:
it is done by

    r / ageing + s * W

where s is how much longer a turn takes with companions, and with what is started and decoded for them,
than the leader's alone (1 where nobody is taken along), and W is bounded because the number of requests in
the house is. Nothing about arrivals is assumed.

**Company.** The first in order, the leader, moves at every step. Others of its size that are next in order
are taken along where that is worth it to all K requests in the house. A step keeps all of them waiting; one
that is p-th in order works for the K - p that are behind it or are it. A set S of requests, whose work would
take w_i seconds alone, and T seconds together, is worth

    sum over S of w_i * (K - p_i)  /  T        [least mean flow time: Smith's rule, 1956, for a set]

and the leader alone K. On a device where two take twice as long as one that never pays, and the least work
goes first, alone; on one where a batch is cheap it pays as soon as many wait.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

Size: TypeAlias = Hashable
GAIN = 0.95
"""A batch that takes more than this share of what its lanes take one by one gains nothing."""


class Times(Protocol):
    """Seconds, as far as they are known. rows: of the UNet, two for a guided lane."""

    def step(self, size: Size, rows: int) -> float:
        """A step of so many rows: measured, or estimated from others."""

    def start(self, size: Size) -> float:
        """What comes before the first step of a request: text and picture are encoded."""

    def finish(self, size: Size) -> float:
        """What comes after the last step, for each picture: decoding."""

    def tried(self, size: Size, rows: int) -> bool:
        """Whether `step` is measured."""

    def due(self, size: Size, rows: int) -> bool:
        """Whether it should be measured: never was, or long ago."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One request, as the policy sees it.

    key: who it is; of two that are equal otherwise the lesser goes first. size: lanes of one size may share a
    step. lanes: pictures, which move together. rows: of the UNet, for all of them. left: steps still to take.
    age: seconds since it was asked for. started: whether text and picture are encoded. alone: takes nobody
    along, and goes with nobody. most: lanes of a step that it shares, where memory bounds them.
    """

    key: int
    size: Size
    lanes: int
    rows: int
    left: int
    age: float
    started: bool
    alone: bool = False
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What the device does next: start or finish one request, or move some of one size by one step."""

    act: Literal["start", "step", "finish"]
    keys: tuple[int, ...]


def remaining(work: Work, times: Times) -> float:
    """Seconds of work that are left of a request, were it alone."""
    step, start, finish = _costs(work, times)
    return work.left * step + finish + (0.0 if work.started else start)


def _costs(work: Work, times: Times) -> tuple[float, float, float]:
    """Seconds of a step, of the start, of all that comes after the last step."""
    size = work.size
    return times.step(size, work.rows), times.start(size), work.lanes * times.finish(size)


def in_order(works: Sequence[Work], times: Times, *, ageing: float) -> list[Work]:
    """The first in order first. ageing: seconds of work that a second of waiting weighs, over 0."""
    costs: dict[Size, dict[tuple[int, int], tuple[float, float, float]]] = {}
    keyed = []
    for place, one in enumerate(works):
        of_size = costs.setdefault(one.size, {})
        cost = of_size.get((one.rows, one.lanes))
        if cost is None:
            cost = of_size[one.rows, one.lanes] = _costs(one, times)
        step, start, finish = cost
        left = one.left * step + finish + (0.0 if one.started else start)
        keyed.append((left - ageing * one.age, one.key, place))
    keyed.sort()
    return [works[place] for _, _, place in keyed]


def buckets(capacity: int) -> list[int]:
    """Lanes of a step, from the fewest on: powers of two up to `capacity`, and it. A runtime prepares for
    every number of lanes that it meets, which is why they are few.
    """
    counts = [1]
    while counts[-1] * 2 < capacity:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == capacity else [*counts, capacity]


def decide(works: Sequence[Work], times: Times, *, capacity: int, ageing: float) -> Turn:
    """The next turn of at least one request.

    capacity: lanes of a step at most; a leader with more moves nevertheless, alone.
    Pictures that have taken all steps are decoded first, one request at a time: each is once.
    """
    order = in_order(works, times, ageing=ageing)
    done = [one for one in order if not one.left]
    if done:
        return Turn("finish", (done[0].key,))
    if not order[0].started:
        return Turn("start", (order[0].key,))
    chosen = _company(order, times, capacity)
    for one in chosen:
        if not one.started:
            return Turn("start", (one.key,))
    return Turn("step", tuple(one.key for one in chosen))


def _company(order: Sequence[Work], times: Times, capacity: int) -> list[Work]:
    """The leader, and those who are worth taking along."""
    leader, places = order[0], {one.key: place for place, one in enumerate(order)}
    best, most = [leader], float(len(order))
    before = best
    for group in _groups(order, capacity):
        size, rows = leader.size, _rows(group)
        if times.due(size, rows) and _gains(before, times):
            return group
        if times.tried(size, rows):
            worth = _worth(group, places, times)
            if worth > most:
                best, most = group, worth
        before = group
    return best


def _groups(order: Sequence[Work], capacity: int) -> Iterator[list[Work]]:
    """The leader with more and more of those behind it, one group for each bucket that can be filled."""
    leader = order[0]
    others = [one for one in order[1:] if one.size == leader.size and not one.alone]
    if leader.alone or not others:
        return
    for count in buckets(capacity):
        if count <= leader.lanes:
            continue
        if not _bears(leader, count):
            return
        group, lanes = [leader], leader.lanes
        for one in others:
            if lanes + one.lanes <= count and _bears(one, count):
                group.append(one)
                lanes += one.lanes
        if lanes < count:
            return
        yield group


def _bears(work: Work, lanes: int) -> bool:
    """Whether memory allows it a step of so many."""
    return work.most is None or lanes <= work.most


def _worth(group: Sequence[Work], places: dict[int, int], times: Times) -> float:
    """See the module: how many requests a second of the group's work helps."""
    leader = group[0]
    helped, taken = 0.0, times.step(leader.size, _rows(group))
    for one in group:
        work = times.step(one.size, one.rows)
        if not one.started:  # which is spread over the steps that they take together
            start = times.start(one.size) / min(one.left, leader.left)
            work, taken = work + start, taken + start
        helped += work * (len(places) - places[one.key])
    return helped / taken if taken else 0.0


def _gains(group: Sequence[Work], times: Times) -> bool:
    """Whether what is known of a group makes a larger one worth a try."""
    leader = group[0]
    if not times.tried(leader.size, _rows(group)):
        return False
    alone = sum(times.step(one.size, one.rows) for one in group)
    return len(group) == 1 or times.step(leader.size, _rows(group)) < GAIN * alone


def _rows(group: Sequence[Work]) -> int:
    return sum(one.rows for one in group)
