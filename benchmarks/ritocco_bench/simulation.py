"""Requests on a virtual clock with given step times: the batcher's policy, and first come, first served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ritocco.policy import Times, Work, decide, remaining


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """See `policy.Times`; seconds. steps: by size, of a step with so many lanes; numbers in between lie on a
    straight line, and beyond the last in proportion. starts, finishes: by size. A lane is one row here.
    """

    steps: Mapping[Any, Mapping[int, float]]
    starts: Mapping[Any, float]
    finishes: Mapping[Any, float]

    def step(self, size: Any, rows: float) -> float:
        """See `policy.Times`; of a picture larger than those of `size` too, as so many of them."""
        known = self.steps[size]
        found = known.get(rows)  # type: ignore[call-overload]
        if found is not None:
            return float(found)
        low = max((count for count in known if count < rows), default=0)
        high = min((count for count in known if count > rows), default=0)
        if not high:
            return known[low] * rows / low
        below = known[low] if low else 0.0
        return below + (known[high] - below) * (rows - low) / (high - low)

    def start(self, size: Any) -> float:
        """See `policy.Times`."""
        return self.starts[size]

    def finish(self, size: Any) -> float:
        """See `policy.Times`."""
        return self.finishes[size]

    def tried(self, size: Any, rows: int) -> bool:
        """See `policy.Times`."""
        return True

    def due(self, size: Any, rows: int) -> bool:
        """See `policy.Times`."""
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """at: seconds. size: as `Times` knows it. lanes: pictures, which move together."""

    at: float
    size: Any
    steps: int
    lanes: int = 1

    def work(self, key: int, now: float, *, left: int, started: bool) -> Work:
        """As the policy sees it."""
        return Work(
            key=key,
            size=self.size,
            lanes=self.lanes,
            rows=self.lanes,
            left=left,
            age=now - self.at,
            started=started,
        )

    def alone(self, times: Times) -> float:
        """Seconds from request to picture with nobody else there."""
        return remaining(self.work(0, self.at, left=self.steps, started=False), times)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """waits: seconds from request to picture, of each. end: when the last was done. fill: lanes of a step."""

    waits: tuple[float, ...]
    end: float
    fill: float

    @property
    def mean(self) -> float:
        """Seconds from request to picture."""
        return sum(self.waits) / len(self.waits)

    @property
    def slowest(self) -> float:
        """The longest of them."""
        return max(self.waits)


def one_by_one(asked: Sequence[Asked], times: Times) -> Outcome:
    """First come, first served, alone."""
    now, waits = 0.0, []
    for one in asked:
        now = max(now, one.at) + one.alone(times)
        waits.append(now - one.at)
    return Outcome(waits=tuple(waits), end=now, fill=1.0)


def batched(asked: Sequence[Asked], times: Times, *, capacity: int, ageing: float) -> Outcome:
    """As a batcher with one engine takes them."""
    now, waits = 0.0, dict[int, float]()
    left = {key: one.steps for key, one in enumerate(asked)}
    started: set[int] = set()
    taken = moved = 0
    while len(waits) < len(asked):
        here = [key for key, one in enumerate(asked) if key not in waits and one.at <= now]
        if not here:
            now = min(one.at for key, one in enumerate(asked) if key not in waits)
            continue
        works = [asked[key].work(key, now, left=left[key], started=key in started) for key in here]
        turn = decide(works, times, capacity=capacity, ageing=ageing)
        first = turn.keys[0]
        size = asked[first].size
        if turn.act == "start":
            now += times.start(size)
            started.add(first)
        elif turn.act == "finish":
            now += asked[first].lanes * times.finish(size)
            waits[first] = now - asked[first].at
        else:
            lanes = sum(asked[key].lanes for key in turn.keys)
            now += times.step(size, lanes)
            taken, moved = taken + 1, moved + lanes
            for key in turn.keys:
                left[key] -= 1
    return Outcome(waits=tuple(waits[key] for key in range(len(asked))), end=now, fill=moved / taken)
