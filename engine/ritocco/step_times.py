"""Seconds of a step at each size and number of rows, learned while requests are computed."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ritocco.backends.runtime import LatentSize

SETTLED = 4
"""Steps of the same lanes after which the host, which runs up to three ahead, keeps the device's pace."""
FRESH = 2
"""Steps that a runtime needs to get ready for a new number of lanes: they are captured, and searched for."""
KEPT = 7
"""Latest values, whose median counts."""
STALE = 2000
"""Steps after which a number of rows that was given up may have another try."""
GUESS = 1e-5
"""Seconds for each row and latent cell, before the first step; then what that one took does."""


@dataclass(slots=True)
class _Run:
    """Steps of the same lanes, one after the other."""

    who: Hashable
    size: LatentSize
    rows: int
    began: float
    last: float
    steps: int = 0
    settled: int = 0


@dataclass(slots=True)
class _Seen:
    """Of one size and number of rows."""

    steps: int = 0
    at: int = 0
    values: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))


class StepTimes:
    """See `policy.Times`; belongs to one thread, others may read.

    What is not measured is drawn from what is: between two numbers of rows in a straight line, beyond them
    and for other sizes in proportion.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[LatentSize, int], _Seen] = {}
        self._known: dict[LatentSize, list[tuple[int, float]]] = {}  # (rows, seconds), sorted; never changed
        self._others: dict[tuple[str, LatentSize], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._run: _Run | None = None
        self._steps = 0
        self._rough = GUESS
        self._drawn: dict[tuple[str, LatentSize, int], float] = {}  # until the next measurement

    def took(self, what: str, size: LatentSize, seconds: float) -> None:
        """what: `start`, or `finish` for each picture."""
        self._others[what, size].append(seconds)
        self._run, self._drawn = None, {}

    def stepped(self, size: LatentSize, rows: int, who: Hashable, began: float, ended: float) -> None:
        """A step of these lanes was asked for. who: equal for the same lanes."""
        run = self._run
        if run is None or (run.who, run.size, run.rows) != (who, size, rows):
            run = self._run = _Run(who, size, rows, began, began)
        seen = self._seen.setdefault((size, rows), _Seen())
        self._steps += 1
        run.steps, seen.steps = run.steps + 1, seen.steps + 1
        if run.steps > SETTLED:
            run.settled += 1
            self._note((size, rows), ended - run.last)
        elif not self._known:
            self._rough, self._drawn = max((ended - run.began) / (run.steps * _cells(size) * rows), GUESS), {}
        run.last = ended

    def waited(self, now: float) -> None:
        """The device has done all that it was asked for: latents came to the host."""
        run, self._run = self._run, None
        if run is None or run.settled or run.steps < 2:
            return
        key = run.size, run.rows
        if self._seen[key].steps - run.steps >= FRESH:
            self._note(key, (now - run.began) / run.steps)

    def step(self, size: Any, rows: int) -> float:
        """See `policy.Times`."""
        drawn, key = self._drawn, ("step", size, rows)
        value = drawn.get(key)
        if value is None:
            value = drawn[key] = self._step(size, rows)
        return value

    def _step(self, size: LatentSize, rows: int) -> float:
        here = self._known.get(size)
        if here:
            return _at(here, rows)
        for other, known in self._known.copy().items():
            return _at(known, rows) * _cells(size) / _cells(other)
        return self._rough * _cells(size) * rows

    def start(self, size: Any) -> float:
        """See `policy.Times`."""
        return self._other("start", size)

    def finish(self, size: Any) -> float:
        """See `policy.Times`."""
        return self._other("finish", size)

    def tried(self, size: Any, rows: int) -> bool:
        """See `policy.Times`."""
        seen = self._seen.get((size, rows))
        return seen is not None and bool(seen.values)

    def due(self, size: Any, rows: int) -> bool:
        """See `policy.Times`."""
        seen = self._seen.get((size, rows))
        return seen is None or not seen.values or self._steps - seen.at > STALE

    def measured(self) -> Mapping[tuple[LatentSize, int], float]:
        """Seconds of a step, by size and rows."""
        return {(size, rows): value for size, known in self._known.copy().items() for rows, value in known}

    def _note(self, key: tuple[LatentSize, int], seconds: float) -> None:
        seen, (size, rows) = self._seen[key], key
        seen.values.append(seconds)
        seen.at = self._steps
        known = dict(self._known.get(size, ()))
        self._drawn = {}
        self._known[size] = sorted((known | {rows: statistics.median(seen.values)}).items())

    def _other(self, what: str, size: LatentSize) -> float:
        drawn, key = self._drawn, (what, size, 0)
        value = drawn.get(key)
        if value is None:
            value = drawn[key] = self._one_of(what, size)
        return value

    def _one_of(self, what: str, size: LatentSize) -> float:
        values = self._others.get((what, size))
        if values:
            return statistics.median(values)
        for (name, one), found in self._others.copy().items():
            if name == what and found:
                return statistics.median(found) * _cells(size) / _cells(one)
        return 0.0


def _cells(size: LatentSize) -> int:
    return size.height * size.width


def _at(known: list[tuple[int, float]], rows: int) -> float:
    """A straight line between neighbours, and through zero beyond them. known: (rows, seconds), sorted."""
    low = max((one for one in known if one[0] <= rows), default=None)
    high = min((one for one in known if one[0] >= rows), default=None)
    if low is None or high is None:
        count, value = low or high or (1, 0.0)
        return value * rows / count
    if low[0] == high[0]:
        return low[1]
    return low[1] + (high[1] - low[1]) * (rows - low[0]) / (high[0] - low[0])
