"""The lanes of several requests in the Batches of one runtime: who sits where, who moves, who leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ritocco.backends.runtime import Batch, LaneState, LatentSize, Runtime
from ritocco.denoise import refuse_broken
from ritocco.tickets import Entry


@dataclass(slots=True, eq=False)
class _Table:
    """A Batch and its free slots."""

    batch: Batch
    free: list[int]
    slots: dict[Entry, list[int]] = field(default_factory=dict)


class Seats:
    """For one thread. A Batch is opened for the first lanes of a size, and let go of with the last."""

    def __init__(self, count: int) -> None:
        """count: lanes of all sizes together that may be seated."""
        self._count = count
        self._tables: dict[LatentSize, _Table] = {}

    @property
    def entries(self) -> list[Entry]:
        """Whose lanes are seated. Other threads may ask."""
        return [entry for table in list(self._tables.values()) for entry in list(table.slots)]

    @property
    def lanes(self) -> int:
        """How many are seated."""
        return sum(len(slots) for table in self._tables.values() for slots in table.slots.values())

    def room_for(self, entry: Entry) -> bool:
        """Whether its lanes can be seated beside those that are."""
        return not self._tables or self.lanes + len(entry.lanes) <= self._count

    def seat(self, runtime: Runtime, entry: Entry) -> None:
        """Let its lanes join. Raises what `Batch.join` raises, and then none of them is seated."""
        size = entry.job.size
        if size not in self._tables:
            count = max(self._count, len(entry.lanes))
            self._tables[size] = _Table(runtime.open(size, count), list(range(count)))
        table = self._tables[size]
        taken = table.slots[entry] = []
        try:
            for lane in entry.lanes:
                table.batch.join(table.free[0], lane)
                taken.append(table.free.pop(0))
        except BaseException:
            self.discard(entry)
            raise

    def step(self, entries: Sequence[Entry]) -> None:
        """Move the lanes of seated requests of one size by a row of their tables."""
        table = self._tables[entries[0].job.size]
        # Guided lanes first: a runtime prepares for each pattern of lanes that it meets.
        ordered = sorted(entries, key=lambda one: (-one.rows, table.slots[one]))
        table.batch.step({slot: one.taken for one in ordered for slot in table.slots[one]})
        for one in entries:
            one.taken += 1

    def peek(self, entry: Entry) -> tuple[LaneState, ...]:
        """Where the lanes of a seated request stand."""
        table = self._tables[entry.job.size]
        return tuple(table.batch.peek(slot) for slot in table.slots[entry])

    def leave(self, entry: Entry) -> None:
        """Take its lanes out, to rejoin where they were. Raises NonFiniteError where one is broken."""
        table = self._tables[entry.job.size]
        slots = table.slots[entry]
        states = []
        while slots:
            states.append(table.batch.leave(slots[0]))
            table.free.append(slots.pop(0))
        self._gone(entry)
        lanes, entry.lanes = entry.lanes, []
        for lane, state in zip(lanes, states, strict=True):
            refuse_broken(lane, state)
            entry.lanes.append(replace(lane, latents=state.latents, history=state.history))

    def discard(self, entry: Entry) -> list[Entry]:
        """Take its lanes out, whatever became of them. A Batch that does not let go of them goes whole:
        returns the others that were in it.
        """
        table = self._tables.get(entry.job.size)
        if table is None or entry not in table.slots:
            return []
        for slot in table.slots[entry]:
            try:
                table.batch.leave(slot)
            except Exception:
                del self._tables[entry.job.size]
                return [other for other in table.slots if other is not entry]
            table.free.append(slot)
        self._gone(entry)
        return []

    def forget(self) -> None:
        """Let go of all Batches as they are."""
        self._tables.clear()

    def _gone(self, entry: Entry) -> None:
        table = self._tables[entry.job.size]
        del table.slots[entry]
        if not table.slots:
            del self._tables[entry.job.size]
