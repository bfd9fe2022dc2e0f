"""One allocation for all tensors of a graph: where in it each of them lies, and what no allocation beats.

The smaller of two arenas, by the two greedy methods of "Efficient Memory Management for Deep Neural Net
Inference" [Pisarchyk & Lee 2020, arXiv:2001.03288]: Greedy by Size for Offset Calculation, and Greedy by
Breadth for Offset Calculation. Both put one tensor after the other into the smallest gap that it fits into
between those that live while it does, else behind them. By size, the largest comes first; by breadth, those
of the step in which most lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT_BYTES = 64
"""Every offset is a multiple of it: a cache line, and the widest vector of a CPU."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Of a tensor. size: bytes. first, last: the steps in which it is held, both included."""

    size: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Arena:
    """Bytes. offsets: of each tensor, from the arena's start.

    lower_bound: the most that lives in one step; no arena for these tensors, in this order of steps, can be
    smaller. busiest: the first step in which that much lives.
    """

    size: int
    offsets: Mapping[str, int]
    lower_bound: int
    busiest: int


def allocate(tensors: Mapping[str, Lifetime]) -> Arena:
    """Offsets such that no two tensors share a byte in a step that both live in. Equal tensors give equal
    offsets. Raises ValueError for a tensor of negative size, or that ends before it begins.
    """
    for name, one in tensors.items():
        if one.size < 0 or not 0 <= one.first <= one.last:
            raise ValueError(f"{name}: {one.size} bytes from step {one.first} to {one.last}")
    live = live_bytes(tensors)
    lower_bound = max(live, default=0)
    # Equal sizes go by time, then by name, so that the order in which they are named changes nothing.
    by_size = sorted(tensors, key=lambda name: (-tensors[name].size, tensors[name].first, name))
    found = [_placed(tensors, order) for order in (by_size, _by_breadth(tensors, by_size, live))]
    size, offsets = min(found, key=lambda one: one[0])
    busiest = live.index(lower_bound) if live else 0
    return Arena(size=size, offsets=offsets, lower_bound=lower_bound, busiest=busiest)


def live_bytes(tensors: Mapping[str, Lifetime]) -> list[int]:
    """Bytes that live in each step, up to the last that holds one."""
    change = [0] * (2 + max((one.last for one in tensors.values()), default=-2))
    for one in tensors.values():
        change[one.first] += one.size
        change[one.last + 1] -= one.size
    live, held = [], 0
    for step in change[:-1]:
        held += step
        live.append(held)
    return live


def _by_breadth(tensors: Mapping[str, Lifetime], by_size: Sequence[str], live: Sequence[int]) -> list[str]:
    """The steps in which most lives first, and the largest tensors of each."""
    held: list[list[str]] = [[] for _ in live]
    for name in by_size:
        for step in range(tensors[name].first, tensors[name].last + 1):
            held[step].append(name)
    steps = sorted(range(len(live)), key=lambda step: -live[step])
    return list(dict.fromkeys(name for step in steps for name in held[step]))


def _placed(tensors: Mapping[str, Lifetime], order: Iterable[str]) -> tuple[int, dict[str, int]]:
    """The arena's size and the offsets, where tensors are placed in this order."""
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[str, int] = {}
    for name in order:
        one = tensors[name]
        beside = sorted(
            (start, end)
            for start, end, other in placed
            if other.first <= one.last and one.first <= other.last
        )
        offsets[name] = _smallest_gap(beside, one.size)
        if one.size:
            placed.append((offsets[name], offsets[name] + one.size, one))
    return max((end for _, end, _ in placed), default=0), offsets


def _smallest_gap(taken: list[tuple[int, int]], size: int) -> int:
    """The aligned start of the smallest gap of `size` bytes; behind everything where there is none.

    taken: starts and ends, by their starts; they may overlap.
    """
    found, least, free = -1, 0, 0
    for start, end in taken:
        gap = start - free
        if gap >= size and (found < 0 or gap < least):
            found, least = free, gap
        free = max(free, -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return free if found < 0 else found
