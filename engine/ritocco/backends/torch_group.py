"""Lanes of a TorchBatch: one by one in their seats, and together in a group that moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ritocco.backends.runtime import Lane
from ritocco.nets.blocks import KeysValues
from ritocco.nets.unet import UNet
from ritocco.noise import normal
from ritocco.steps import advance, stack


@dataclass(slots=True, eq=False)
class Seat:
    """A lane in a slot: what was hoisted for it, and its state while no group holds it."""

    lane: Lane
    condition: Tensor  # [1,C0,h,w], conv_in of mask and masked image
    times: Tensor  # [rows,T], every resnet's time vector for every row of the table
    context: tuple[Tensor, ...]  # 1 or 2 rows: keys and values of each cross-attention in turn, or all in one
    latents: Tensor  # float32 [4,h,w]
    history: Tensor  # float32 [3,4,h,w]
    broken: Tensor  # int64 [], table row, or -1

    @property
    def rows(self) -> int:
        """How many rows of the UNet the lane takes."""
        return 1 if self.lane.unconditional is None else 2


class Group(Protocol):
    """Seats that move together, side by side in memory."""

    slots: tuple[int, ...]
    held: bool  # False once another batch needed the memory, and the state went back to the seats

    def move(self, indices: tuple[int, ...]) -> None:
        """Every lane by the named row of its table."""

    def state(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, history and broken row of the lane at a place, where they lie."""

    def scatter(self) -> None:
        """Give the state back to the seats; the group is of no use afterwards."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Which row of the UNet belongs to which lane. owner [M], unconditional [N], conditional [N]."""

    owner: tuple[int, ...]
    unconditional: tuple[int, ...]
    conditional: tuple[int, ...]

    @classmethod
    def of(cls, counts: Sequence[int]) -> Rows:
        """counts: 1 or 2 rows for each lane; a lane's first is the negative prompt's."""
        firsts = np.cumsum([0, *counts[:-1]]).tolist()
        return cls(
            owner=tuple(lane for lane, count in enumerate(counts) for _ in range(count)),
            unconditional=tuple(firsts),
            conditional=tuple(first + count - 1 for first, count in zip(firsts, counts, strict=True)),
        )

    @property
    def shared(self) -> bool:
        """Whether some lane has two rows, which are alike until the first cross-attention."""
        return len(self.owner) > len(self.unconditional)


class EagerGroup:
    """A group that runs operation by operation. See `Group`."""

    def __init__(
        self,
        unet: UNet,
        slots: tuple[int, ...],
        seats: list[Seat],
        *,
        dtype: torch.dtype,
        layout: torch.memory_format,
    ) -> None:
        """dtype, layout: of what the network takes."""
        self.slots, self.held = slots, True
        self._unet, self._seats, self._dtype, self._layout = unet, seats, dtype, layout
        self._shape = tuple(seats[0].latents.shape)
        self._device = seats[0].latents.device
        rows = Rows.of([seat.rows for seat in seats])
        history = torch.stack([seat.history for seat in seats], dim=1)
        self._latents = torch.stack([seat.latents for seat in seats])  # float32 [N,4,h,w]
        self._history = (history[0], history[1], history[2])
        self._condition = torch.cat([seat.condition for seat in seats])  # [N,C0,h,w]
        joined = tuple(torch.cat(parts) for parts in zip(*(seat.context for seat in seats), strict=True))
        self._context = keys_values(unet, joined)
        self._rows = self._indices(rows.owner) if rows.shared else None
        self._unconditional = self._indices(rows.unconditional)
        self._conditional = self._indices(rows.conditional)
        guidance = torch.tensor([seat.lane.guidance for seat in seats], device=self._device)
        self._guidance = guidance.view(-1, 1, 1, 1)
        self._broken = torch.stack([seat.broken for seat in seats])

    def move(self, indices: tuple[int, ...]) -> None:
        """One step: scale, UNet, guidance, update. [Ho & Salimans 2022, arXiv:2207.12598, Eq. 6]"""
        table_rows = [seat.lane.table.row(index) for seat, index in zip(self._seats, indices, strict=True)]
        row = stack(table_rows).map(
            lambda values: torch.from_numpy(values).to(self._device, non_blocking=True)
        )
        scaled = (row.in_scale * self._latents).to(self._dtype).contiguous(memory_format=self._layout)
        times = torch.stack([seat.times[index] for seat, index in zip(self._seats, indices, strict=True)])
        output = self._unet.step(scaled, times, self._condition, self._context, self._rows).float()
        base = output.index_select(0, self._unconditional)
        guided = base + self._guidance * (output.index_select(0, self._conditional) - base)
        noise = self._noise(indices, [bool(one.c) for one in table_rows])
        latents, history = advance(row, self._latents, guided, noise, self._history)
        first_break = ~torch.isfinite(latents).flatten(1).all(dim=1) & (self._broken < 0)
        broken = torch.where(first_break, self._indices(indices), self._broken)
        # All at once: a step for which memory ran out on the way was not taken.
        self._latents, self._history, self._broken = latents, history, broken

    def state(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Group`."""
        history = torch.stack([one[place] for one in self._history])
        return self._latents[place], history, self._broken[place]

    def scatter(self) -> None:
        """See `Group`."""
        history = torch.stack(self._history, dim=1)
        for i, seat in enumerate(self._seats):
            seat.latents, seat.history, seat.broken = self._latents[i], history[i], self._broken[i]

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _noise(self, indices: tuple[int, ...], noisy: list[bool]) -> Tensor | float:
        if not any(noisy):
            return 0.0
        draws = [
            normal(seat.lane.seed, index + 1, self._shape) if wanted else np.zeros(self._shape, np.float32)
            for seat, index, wanted in zip(self._seats, indices, noisy, strict=True)
        ]
        return to_device(np.stack(draws), self._device, torch.float32)


def keys_values(unet: UNet, context: tuple[Tensor, ...]) -> tuple[KeysValues, ...]:
    """A seat's context as `UNet.step` takes it."""
    if len(context) == 1:
        return unet.split_context(context[0])
    return tuple(zip(context[::2], context[1::2], strict=True))


def to_device(array: np.ndarray[Any, Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of a host array on `device` in `dtype`."""
    return torch.tensor(array, device=device).to(dtype)
