"""A Batch on a hoisted export: one graph runs as a lane joins, the other at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ritocco.backends.network import NetworkBatch, prompts
from ritocco.backends.runtime import Floats, Lane, LaneState, LatentSize
from ritocco.nets.io import HOISTED, NetworkIO, Range, Ranges
from ritocco.steps import Row

if TYPE_CHECKING:
    from ritocco.backends.sessions import Session

Array = npt.NDArray[Any]
_TIME, _CONDITION = HOISTED


@dataclass(slots=True, eq=False)
class Hoisted:
    """What all steps of a lane share, in the dtypes of the step graph.

    time: [R,T], for every row of the table. condition: [1,C0,h,w]. keys_values: [1 or 2,heads,77,head_dim]
    each, a row for each prompt.
    """

    time: Array
    condition: Array
    keys_values: tuple[Array, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Lanes of one call side by side, filled up to the least that the step graph takes.

    lanes: places in the call -> lane of the group. owners: the place of each row, int32 [M]. count: rows that
    are no filling. condition: [N,C0,h,w]. keys_values: M rows each.
    """

    lanes: tuple[int, ...]
    owners: Array
    count: int
    condition: Array
    keys_values: tuple[Array, ...]


class HoistedUNet:
    """`unet_once` and `unet_step` of one export, fed by the contract's names."""

    def __init__(
        self, once: Session, once_io: NetworkIO, step: Session, step_io: NetworkIO, ranges: Ranges
    ) -> None:
        """ranges: of a step at the size that it is for, a part of the contract's."""
        self._once, self._once_io, self._step, self._step_io = once, once_io, step, step_io
        self._ranges = ranges
        names = (port.name for port in step_io.inputs)
        self._keys_values = tuple(name for name in names if name.startswith(("keys_", "values_")))

    @property
    def lanes(self) -> Range:
        """Least, best and most lanes of a step."""
        return self._ranges["N"]

    @property
    def rows(self) -> Range:
        """Least, best and most UNet rows of a step."""
        return self._ranges["M"]

    def once(self, lane: Lane) -> Hoisted:
        """What all steps of `lane` share."""
        branches, timesteps = prompts(lane), lane.table.timesteps
        filled = (*branches, *branches[-1:] * (self._once_io.ranges["M"][0] - len(branches)))
        least, _, most = self._once_io.ranges["R"]
        times, kept = [], {}
        # A table that is longer than the graph takes goes in parts: only the time vectors depend on it.
        for first in range(0, len(timesteps), most):
            part = timesteps[first : first + most]
            told = np.concatenate([part, part[-1:].repeat(max(0, least - len(part)))])
            kept = self._call(
                self._once, timesteps=told, context=np.stack(filled), condition=lane.condition[None]
            )
            times.append(kept[_TIME][: len(part)])
        return Hoisted(
            time=self._held(_TIME, np.concatenate(times)),
            condition=self._held(_CONDITION, kept[_CONDITION]),
            keys_values=tuple(self._held(name, kept[name][: len(branches)]) for name in self._keys_values),
        )

    def step(self, latents: Floats, time: Array, group: _Group) -> Floats:
        """latents [N,4,h,w], scaled for the network; time [N,T] -> the output of each row, [M,4,h,w]."""
        layers = dict(zip(self._keys_values, group.keys_values, strict=True))
        same = {_TIME: time, _CONDITION: group.condition}
        found = self._call(self._step, latents=latents, rows=group.owners, **same, **layers)
        return found[self._step_io.outputs[0].name].astype(np.float32, copy=False)

    def _call(self, session: Session, **arrays: Array) -> dict[str, Array]:
        dtypes = session.dtypes
        feeds = {name: np.asarray(one, dtype=dtypes[name], order="C") for name, one in arrays.items()}
        return dict(session.run_all(feeds))

    def _held(self, name: str, array: Array) -> Array:
        """As the step graph takes it, so that no step has to convert it; read-only, so that a session may
        keep it on its device."""
        held = np.ascontiguousarray(array, dtype=self._step.dtypes[name])
        held.setflags(write=False)
        return held


class HoistedBatch(NetworkBatch):
    """See `Batch`. Lanes of any tables and prompts share a call; more than it takes go in parts."""

    def __init__(self, unet: HoistedUNet, size: LatentSize, *, channels: int, capacity: int) -> None:
        """size, channels: of every lane's latents."""
        super().__init__(_no_plain_network, capacity=capacity)
        self._unet = unet
        self._shape = (channels, size.height, size.width)
        self._hoisted: dict[int, Hoisted] = {}
        self._groups: dict[tuple[int, ...], _Group] = {}

    def join(self, slot: int, lane: Lane) -> None:
        """See `Batch`. Raises ValueError for a slot that is taken or out of range, or another size."""
        if lane.latents.shape != self._shape or lane.condition.shape[1:] != self._shape[1:]:
            found = f"the lane's latents are {lane.latents.shape}, its condition {lane.condition.shape}"
            raise ValueError(f"{found}; this batch takes latents of {self._shape}")
        super().join(slot, lane)
        try:
            self._hoisted[slot] = self._hoist(slot, lane)
        except BaseException:
            super().leave(slot)
            raise

    def leave(self, slot: int) -> LaneState:
        """See `Batch`."""
        state = super().leave(slot)
        del self._hoisted[slot]
        self._groups.clear()  # another lane may take the slot
        return state

    def _hoist(self, slot: int, lane: Lane) -> Hoisted:
        others = [(other, self._hoisted[at]) for at, other in self._lanes.items() if at != slot]
        time = next((held.time for other, held in others if other.table is lane.table), None)
        condition = next(
            (held.condition for other, held in others if other.condition is lane.condition), None
        )
        keys_values = next((held.keys_values for other, held in others if _same_prompts(other, lane)), None)
        if time is not None and condition is not None and keys_values is not None:
            return Hoisted(time, condition, keys_values)
        own = self._unet.once(lane)
        return Hoisted(
            own.time if time is None else time,
            own.condition if condition is None else condition,
            own.keys_values if keys_values is None else keys_values,
        )

    def _outputs(self, rows: Mapping[int, int], table_rows: Sequence[Row], scaled: Floats) -> Floats:
        parts = self._parts(tuple(rows))
        self._groups = {part: self._groups.get(part) or self._gather(part) for part in parts}
        latents = dict(zip(rows, scaled, strict=True))
        outputs = []
        for part, group in self._groups.items():
            slots = [part[lane] for lane in group.lanes]
            time = np.stack([self._hoisted[slot].time[rows[slot]] for slot in slots])
            found = self._unet.step(np.stack([latents[slot] for slot in slots]), time, group)
            outputs.append(found[: group.count])
        return np.concatenate(outputs)

    def _parts(self, slots: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Lanes in order, each part as many as one call takes."""
        parts: list[tuple[int, ...]] = []
        lanes = rows = 0
        for slot in slots:
            count = len(prompts(self._lanes[slot]))
            if parts and lanes + 1 <= self._unet.lanes[2] and rows + count <= self._unet.rows[2]:
                parts[-1] += (slot,)
                lanes, rows = lanes + 1, rows + count
            else:
                parts.append((slot,))
                lanes, rows = 1, count
        return parts

    def _gather(self, slots: tuple[int, ...]) -> _Group:
        held = [self._hoisted[slot] for slot in slots]
        counts = [len(prompts(self._lanes[slot])) for slot in slots]
        owners = [lane for lane, count in enumerate(counts) for _ in range(count)]
        lanes = _filled(list(range(len(slots))), self._unet.lanes[0])
        spare = max(0, self._unet.rows[0] - len(owners))
        condition, keys_values = held[0].condition, held[0].keys_values
        if len(lanes) > 1 or spare:
            condition = np.concatenate([held[lane].condition for lane in lanes])
            keys_values = tuple(
                np.concatenate([*layer, *[layer[-1][-1:]] * spare])
                for layer in zip(*(one.keys_values for one in held), strict=True)
            )
            for array in (condition, *keys_values):
                array.setflags(write=False)  # as `HoistedUNet` holds them
            # The lanes keep views, so that nothing is held twice.
            ends = np.cumsum(counts).tolist()
            for lane, (one, count, end) in enumerate(zip(held, counts, ends, strict=True)):
                one.condition = condition[lane : lane + 1]
                one.keys_values = tuple(layer[end - count : end] for layer in keys_values)
        return _Group(
            lanes=tuple(lanes),
            owners=np.array(_filled(owners, self._unet.rows[0]), np.int32),
            count=len(owners),
            condition=condition,
            keys_values=keys_values,
        )


def _filled(values: list[int], least: int) -> list[int]:
    return values + values[-1:] * (least - len(values))


def _same_prompts(one: Lane, other: Lane) -> bool:
    return one.context is other.context and one.unconditional is other.unconditional


def _no_plain_network(sample: Floats, timestep: Floats, context: Floats) -> Floats:
    raise AssertionError("a hoisted export has no plain UNet")
