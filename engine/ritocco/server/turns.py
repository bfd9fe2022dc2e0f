"""Whose webhooks are delivered next: who answered promptly last time waits for nobody who does not."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from itertools import count
from typing import Literal, TypeAlias

Lane: TypeAlias = tuple[str, int]
"""A host, and which of its queues."""
_Kind: TypeAlias = Literal["prompt", "new", "slow"]
PROMPT_S = 2.5
"""In which a host has to answer, or to refuse."""
_MOST_HOSTS = 10_000


class Turns:
    """Lanes that have messages, the oldest first. Of the workers at most half are at hosts that are new or
    were slow last time, and at most a quarter at the latter. Not safe to use from several threads.
    """

    def __init__(self, workers: int) -> None:
        self._unsure, self._slow = max(1, workers // 2), max(1, workers // 4)
        kinds: tuple[_Kind, ...] = ("prompt", "new", "slow")
        self._waiting: dict[_Kind, deque[tuple[int, Lane]]] = {kind: deque() for kind in kinds}
        self._numbers = count()
        self._busy: dict[Lane, _Kind] = {}
        self._hosts: OrderedDict[str, _Kind] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, lane: Lane) -> None:
        """It has messages, and no worker."""
        self._waiting[self._hosts.get(lane[0], "new")].append((next(self._numbers), lane))

    def take(self) -> Lane | None:
        """The next for a worker, which says `done`; None where there is none for it."""
        busy = Counter(self._busy.values())
        full: set[_Kind] = set()
        if busy["new"] + busy["slow"] >= self._unsure:
            full |= {"new", "slow"}
        if busy["slow"] >= self._slow:
            full.add("slow")
        open_ = [kind for kind, lanes in self._waiting.items() if lanes and kind not in full]
        if not open_:
            return None
        kind = min(open_, key=lambda one: self._waiting[one][0])
        _, lane = self._waiting[kind].popleft()
        self._busy[lane] = kind
        return lane

    def done(self, lane: Lane, seconds: float) -> None:
        """seconds: that its host took; 0 where it was not asked."""
        del self._busy[lane]
        if not seconds:
            return
        self._hosts[lane[0]] = "prompt" if seconds < PROMPT_S else "slow"
        self._hosts.move_to_end(lane[0])
        if len(self._hosts) > _MOST_HOSTS:
            self._hosts.popitem(last=False)
