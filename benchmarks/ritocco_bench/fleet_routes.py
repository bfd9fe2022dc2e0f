"""Which painter a request goes to."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ritocco_bench.painter import Painter

BACKOFF_S, LONGEST_BACKOFF_S = 0.025, 0.5
"""Between two tries where nobody takes a request, each double the last. An assumption."""
MATCHING_S = (1.0, 2.0)
"""For so long, drawn evenly, Ray Serve looks among those that have a request's model."""


class Route(Protocol):
    """One painter for a request, or None where it has to wait and ask again. members: those that take
    requests. waited: seconds since it came.
    """

    def __call__(self, size: Any, members: Sequence[int], waited: float) -> int | None:
        """Its place among all painters."""


Make = Callable[[Sequence[Painter], int, Mapping[Any, float], random.Random], Route]
"""painters, the most requests that one of them takes, each size's share of the work, chance."""


def in_turn(painters: Sequence[Painter], most: int, shares: Mapping[Any, float], rng: random.Random) -> Route:
    """One after the other: what a load balancer in front of plain servers does."""
    count = -1

    def route(size: Any, members: Sequence[int], waited: float) -> int | None:
        nonlocal count
        count += 1
        return members[count % len(members)]

    return route


def by_chance(
    painters: Sequence[Painter], most: int, shares: Mapping[Any, float], rng: random.Random
) -> Route:
    """Any of them, as likely."""

    def route(size: Any, members: Sequence[int], waited: float) -> int | None:
        return members[int(rng.random() * len(members))]

    return route


def two_choices(
    painters: Sequence[Painter], most: int, shares: Mapping[Any, float], rng: random.Random
) -> Route:
    """Of two that are drawn, the one with fewer requests: Ray Serve's router. [Mitzenmacher 2001]"""

    def route(size: Any, members: Sequence[int], waited: float) -> int | None:
        return _lesser(painters, most, members, rng)

    return route


def pools(painters: Sequence[Painter], most: int, shares: Mapping[Any, float], rng: random.Random) -> Route:
    """Each size has a part of the painters, as large as its share of the work, at least one; two choices
    among them.
    """
    cut: dict[tuple[int, Any], tuple[int, int]] = {}

    def route(size: Any, members: Sequence[int], waited: float) -> int | None:
        count = len(members)
        if (count, size) not in cut:
            for one, bounds in _parts(count, shares).items():
                cut[count, one] = bounds
        low, high = cut[count, size]
        return _lesser(painters, most, members[low:high] if high - low < count else members, rng)

    return route


def models(kept: int, *, warm: bool = True) -> Make:
    """Ray Serve's model multiplexing with the size as the model: for one or two seconds two choices among
    those that have the size, then among those that have the fewest sizes, and whoever is chosen has it from
    then on, and lets go of the one that it used longest ago. [ray-project/ray, pow_2_scheduler.py]

    kept: sizes that a painter has at most. warm: each begins with one, in `pools`' parts; else with none.
    """

    def make(
        painters: Sequence[Painter], most: int, shares: Mapping[Any, float], rng: random.Random
    ) -> Route:
        held: list[list[Any]] = [[] for _ in painters]  # used last at the end
        having: dict[Any, list[int]] = {size: [] for size in shares}
        if warm:
            for size, (low, high) in _parts(len(painters), shares).items():
                having[size] = list(range(low, high))
                for one in having[size]:
                    held[one].append(size)

        def have(one: int, size: Any) -> None:
            sizes = held[one]
            if size in sizes:
                sizes.remove(size)
            else:
                having[size].append(one)
                if len(sizes) == kept:
                    having[sizes.pop(0)].remove(one)
            sizes.append(size)

        def route(size: Any, members: Sequence[int], waited: float) -> int | None:
            those: Sequence[int] = having[size]
            if not those or waited > rng.uniform(*MATCHING_S):
                least = min(len(held[one]) for one in members)
                those = [one for one in members if len(held[one]) == least]
            found = _lesser(painters, most, those, rng)
            if found is not None:
                have(found, size)
            return found

        return route

    return make


ROUTES: dict[str, Make] = {
    "in turn": in_turn,
    "random": by_chance,
    "two choices": two_choices,
    "pools by size": pools,
    "models, one size each": models(1),
    "models, up to three": models(3),
    "models, up to three, cold": models(3, warm=False),
}


def _lesser(painters: Sequence[Painter], most: int, those: Sequence[int], rng: random.Random) -> int | None:
    count = len(those)
    first = those[int(rng.random() * count)]
    if count > 1:
        second = those[int(rng.random() * (count - 1))]
        if second == first:
            second = those[-1]
        if painters[second].ongoing < painters[first].ongoing:
            first = second
    return first if painters[first].ongoing < most else None


def _parts(count: int, shares: Mapping[Any, float]) -> dict[Any, tuple[int, int]]:
    """Where each size's members begin and end; where they are fewer than sizes, everybody has all."""
    if count < len(shares):
        return dict.fromkeys(shares, (0, count))
    parts, whole = dict.fromkeys(shares, 1), sum(shares.values())
    for _ in range(count - len(shares)):
        neediest = max(shares, key=lambda size: shares[size] / whole / parts[size])
        parts[neediest] += 1
    found, low = {}, 0
    for size, part in parts.items():
        found[size] = (low, low + part)
        low += part
    return found
