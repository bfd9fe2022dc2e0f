"""What a fleet is asked for, and when: kinds of requests in shares, Poisson arrivals, a day's curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ritocco.policy import Times
from ritocco_bench.simulation import Asked
from ritocco_bench.traces import LEAST_STEPS, MOST_STEPS

DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """share: of the requests. size: pixels per side. lanes: pictures of a request."""

    share: float
    size: int
    steps: int
    lanes: int = 1


MIX = (
    Kind(share=0.6, size=512, steps=25),
    Kind(share=0.2, size=512, steps=50),
    Kind(share=0.1, size=768, steps=25),
    Kind(share=0.1, size=512, steps=25, lanes=4),
)
"""An assumption: nobody's traffic was recorded."""
HALVES = (Kind(share=0.5, size=512, steps=25), Kind(share=0.5, size=768, steps=25))
"""As many requests of either size, for which routing by size does the most."""
TRACES = tuple(
    Kind(share=0.5 / (MOST_STEPS - LEAST_STEPS + 1), size=size, steps=steps)
    for size in (512, 1024)
    for steps in range(LEAST_STEPS, MOST_STEPS + 1)
)
"""What `traces.draw` draws from."""
MIXES = {"mix": MIX, "halves": HALVES, "traces": TRACES}


def alone(mix: Sequence[Kind], times: Times) -> float:
    """Seconds of a request with nobody else there, on average."""
    return sum(one.share * _asked(one, 0.0).alone(times) for one in mix)


def pictures(mix: Sequence[Kind]) -> float:
    """Of a request, on average."""
    return sum(one.share * one.lanes for one in mix)


def pixels(mix: Sequence[Kind]) -> float:
    """Of a request's pictures, on average, in times of 512 x 512."""
    return sum(one.share * one.lanes * (one.size / 512) ** 2 for one in mix)


def poisson(mix: Sequence[Kind], rate: float, seconds: float, *, seed: int) -> list[Asked]:
    """Requests of a Poisson process. rate: a second."""
    return varying(mix, lambda _: rate, rate, seconds, seed=seed)


def varying(
    mix: Sequence[Kind], rate: Callable[[float], float], most: float, seconds: float, *, seed: int
) -> list[Asked]:
    """Requests of a Poisson process whose rate changes. most: it is never over that. [Lewis and Shedler 1979,
    thinning]
    """
    rng = np.random.default_rng(seed)
    count = int(rng.poisson(most * seconds))
    moments = np.sort(rng.uniform(0.0, seconds, count))
    shares = np.array([one.share for one in mix])
    kinds = rng.choice(len(mix), count, p=shares / shares.sum())
    kept = rng.uniform(0.0, most, count)
    drawn = zip(moments, kinds, kept, strict=True)
    return [_asked(mix[kind], float(at)) for at, kind, level in drawn if level < rate(float(at))]


def of_day(at: float) -> float:
    """A day's curve: the part of its peak at so many seconds after midnight. An assumption: least at four
    in the morning, a broad peak in the afternoon, and at eight in the evening a rush of twenty minutes that
    comes within one.
    """
    hour = at / 3600 % 24
    broad = 0.15 + 0.55 * (1 - math.cos(2 * math.pi * (hour - 4) / 24)) / 2
    rush = min(max((hour - 20) * 60, 0.0), 1.0) * (hour < 20 + 1 / 3)
    return broad + (1.0 - broad) * rush


def _asked(kind: Kind, at: float) -> Asked:
    return Asked(at=at, size=kind.size, steps=kind.steps, lanes=kind.lanes)
