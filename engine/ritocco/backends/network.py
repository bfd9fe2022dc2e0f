"""A Batch made from anything that can run a UNet: packing, guidance and the step around one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from ritocco.backends.runtime import Floats, Lane, LaneState
from ritocco.noise import normal
from ritocco.steps import Row, advance, stack


class Predict(Protocol):
    """A UNet: float32 sample [M,9,h,w], timestep [M], context [M,77,D] -> [M,4,h,w]."""

    def __call__(self, sample: Floats, timestep: Floats, context: Floats, /) -> Floats: ...


class NetworkBatch:
    """Lanes on the host, one UNet call a step (or one per timestep where the network takes a single one).

    M counts UNet rows: a guided lane has two, the unconditional one first; a lane at guidance 1 has one.
    """

    def __init__(self, predict: Predict, *, capacity: int, lane_timesteps: bool = True) -> None:
        self._predict = predict
        self._capacity = capacity
        self._lane_timesteps = lane_timesteps
        self._lanes: dict[int, Lane] = {}
        self._latents: dict[int, Floats] = {}
        self._history: dict[int, Floats] = {}
        self._broken: dict[int, int] = {}

    def join(self, slot: int, lane: Lane) -> None:
        """See `Batch`. Raises ValueError for a slot that is taken or out of range."""
        if not 0 <= slot < self._capacity or slot in self._lanes:
            raise ValueError(f"slot is {slot}; it must be a free one below {self._capacity}")
        self._lanes[slot] = lane
        self._latents[slot] = lane.latents.astype(np.float32)
        history = np.zeros((3, *lane.latents.shape), np.float32) if lane.history is None else lane.history
        self._history[slot] = history.astype(np.float32)

    def step(self, rows: Mapping[int, int]) -> None:
        """See `Batch`."""
        if self._lane_timesteps:
            self._move(rows)
            return
        by_timestep: dict[float, dict[int, int]] = {}
        for slot, index in rows.items():
            by_timestep.setdefault(float(self._lanes[slot].table.timesteps[index]), {})[slot] = index
        for group in by_timestep.values():
            self._move(group)

    def peek(self, slot: int) -> LaneState:
        """See `Batch`."""
        return LaneState(
            latents=self._latents[slot].copy(),
            history=self._history[slot].copy(),
            broken_row=self._broken.get(slot),
        )

    def leave(self, slot: int) -> LaneState:
        """See `Batch`."""
        del self._lanes[slot]
        return LaneState(
            latents=self._latents.pop(slot),
            history=self._history.pop(slot),
            broken_row=self._broken.pop(slot, None),
        )

    def _move(self, rows: Mapping[int, int]) -> None:
        lanes = [self._lanes[slot] for slot in rows]
        table_rows = [lane.table.row(index) for lane, index in zip(lanes, rows.values(), strict=True)]
        row = stack(table_rows)
        x = np.stack([self._latents[slot] for slot in rows])
        history = np.stack([self._history[slot] for slot in rows], axis=1)
        output = _guided(lanes, self._outputs(rows, table_rows, row.in_scale * x))
        noise = np.stack(
            [
                normal(lane.seed, index + 1, lane.latents.shape)
                if float(one.c)
                else np.zeros_like(lane.latents)
                for lane, index, one in zip(lanes, rows.values(), table_rows, strict=True)
            ]
        )
        # A broken network is reported by `broken_row`, not by NumPy's warnings on the way.
        with np.errstate(invalid="ignore", over="ignore"):
            x, moved = advance(row, x, output, noise, tuple(history))
        for i, (slot, index) in enumerate(rows.items()):
            self._latents[slot] = x[i]
            self._history[slot] = np.stack([one[i] for one in moved])
            if slot not in self._broken and not np.isfinite(x[i]).all():
                self._broken[slot] = index

    def _outputs(self, rows: Mapping[int, int], table_rows: Sequence[Row], scaled: Floats) -> Floats:
        """The network's output for each prompt of each lane, in order: [M,4,h,w].

        rows: slot -> table row; table_rows: those rows. scaled: [N,4,h,w], latents as the network takes them.
        """
        samples: list[Floats] = []
        timesteps: list[float] = []
        contexts: list[Floats] = []
        for slot, row, latents in zip(rows, table_rows, scaled, strict=True):
            lane = self._lanes[slot]
            sample = np.concatenate([latents, lane.condition])
            for context in prompts(lane):
                samples.append(sample)
                timesteps.append(row.timestep)
                contexts.append(context)
        return self._predict(
            np.stack(samples).astype(np.float32), np.array(timesteps, np.float32), np.stack(contexts)
        )


def prompts(lane: Lane) -> tuple[Floats, ...]:
    """What the lane's UNet rows attend to, [77,D] each: under guidance the negative prompt comes first."""
    return (lane.context,) if lane.unconditional is None else (lane.unconditional, lane.context)


def _guided(lanes: Sequence[Lane], output: Floats) -> Floats:
    """Classifier-free guidance: [M,4,h,w] -> [N,4,h,w]. [Ho & Salimans 2022, arXiv:2207.12598, Eq. 6]"""
    guided, first = [], 0
    with np.errstate(invalid="ignore", over="ignore"):
        for lane in lanes:
            base = output[first]
            if lane.unconditional is None:
                guided.append(base)
            else:
                guided.append(base + np.float32(lane.guidance) * (output[first + 1] - base))
            first += len(prompts(lane))
    return np.stack(guided)
