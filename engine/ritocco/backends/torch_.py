"""The torch runtime: the networks of `nets/`, with all that does not change between steps computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ritocco.backends.host_memory import LARGEST_KEPT_BYTES, keep_freed_memory
from ritocco.backends.runtime import Floats, Lane, LaneState, LatentSize, Tokens, Traits
from ritocco.checkpoint import Checkpoint, load_network
from ritocco.nets.blocks import KeysValues
from ritocco.nets.text_encoder import TextEncoder
from ritocco.nets.unet import UNet
from ritocco.nets.vae import VAE
from ritocco.noise import normal
from ritocco.parameters import place
from ritocco.steps import advance, stack

_STEPS_AHEAD = 2  # how many steps the host may queue before it waits for the device


class TorchRuntime:
    """The three networks of a checkpoint on one torch device, in one dtype. See `Runtime`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        load: Callable[..., nn.Module] = load_network,
    ) -> None:
        """Load the weights straight onto `device`. load: as `load_network`. Raises CheckpointError where they
        do not fit.
        """
        self.device, self.dtype = device, dtype
        # In float32 on a CPU, torch's channels_last group norm loses digits (see `groupnorm_reference`).
        plain = device.type == "cpu" and dtype == torch.float32
        self.layout = torch.contiguous_format if plain else torch.channels_last
        if device.type == "cpu" and _largest_weight_bytes(checkpoint) > LARGEST_KEPT_BYTES:
            keep_freed_memory()
        self.unet = cast(UNet, load(checkpoint, "unet", device=device, dtype=dtype))
        # The decoder is not needed before the last step. On a GPU it moves at once: what does not fit there
        # has to show now.
        later = ("decoder.", "post_quant_conv.") if device.type == "cpu" else ()
        self.vae = cast(VAE, load(checkpoint, "vae", device=device, dtype=dtype, later=later))
        self._decodes = not later
        self.text_encoder = cast(TextEncoder, load(checkpoint, "text_encoder", device=device, dtype=dtype))
        self.traits = Traits(
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            lane_timesteps=True,
            size_multiple=self.unet.spec.size_multiple,
        )

    def encode_text(self, tokens: Tokens) -> Floats:
        """See `Runtime`."""
        with inference(self.device):
            return _to_host(self.text_encoder(torch.from_numpy(tokens).to(self.device)))

    def encode_image(self, pixels: Floats) -> Floats:
        """See `Runtime`. One picture at a time: the activations of a picture set the peak."""
        with inference(self.device):
            return np.concatenate([_to_host(self.vae.encode_mean(self._image(one))) for one in pixels])

    def decode(self, latents: Floats) -> Floats:
        """See `Runtime`. One picture at a time: the activations of a picture set the peak."""
        with inference(self.device):
            if not self._decodes:
                place(self.vae, device=self.device, dtype=self.dtype)
                self._decodes = True
            return np.concatenate([_to_host(self.vae.decode(self._image(one))) for one in latents])

    def open(self, size: LatentSize, capacity: int) -> TorchBatch:
        """See `Runtime`."""
        return TorchBatch(self, size, capacity)

    def _image(self, array: Floats) -> Tensor:
        return to_device(array[None], self.device, self.dtype).to(memory_format=self.layout)


@dataclass(slots=True, eq=False)
class _Seat:
    """A lane in a slot: what was hoisted for it, and its state while no group holds it."""

    lane: Lane
    condition: Tensor  # [1,C0,h,w], conv_in of mask and masked image
    times: Tensor  # [rows,T], every resnet's time vector for every row of the table
    context: tuple[KeysValues, ...]  # per cross-attention, 1 or 2 rows
    latents: Tensor  # float32 [4,h,w]
    history: Tensor  # float32 [3,4,h,w]
    broken: Tensor  # int64 [], table row, or -1


@dataclass(slots=True, eq=False)
class _Group:
    """The seats that move together, side by side in memory."""

    slots: tuple[int, ...]
    latents: Tensor  # float32 [N,4,h,w]
    history: tuple[Tensor, Tensor, Tensor]  # float32 [N,4,h,w] each
    condition: Tensor  # [N,C0,h,w]
    context: tuple[KeysValues, ...]  # M rows
    rows: Tensor | None  # int64 [M], the lane of each UNet row; None where M == N
    unconditional: Tensor  # int64 [N], the UNet row of each lane's negative prompt
    conditional: Tensor  # int64 [N]; the same row as `unconditional` at guidance 1
    guidance: Tensor  # float32 [N,1,1,1]
    broken: Tensor  # int64 [N]


class TorchBatch:
    """Lanes on one torch device; latents, history and the update are float32. See `Batch`."""

    def __init__(self, runtime: TorchRuntime, size: LatentSize, capacity: int) -> None:
        self._unet = runtime.unet
        self._device, self._dtype, self._layout = runtime.device, runtime.dtype, runtime.layout
        self._shape = (runtime.unet.spec.out_channels, size.height, size.width)
        self._capacity = capacity
        self._seats: dict[int, _Seat] = {}
        self._group: _Group | None = None
        self._events: list[Any] = []

    def join(self, slot: int, lane: Lane) -> None:
        """See `Batch`. Raises ValueError for a slot that is taken or out of range, or another size."""
        if not 0 <= slot < self._capacity or slot in self._seats:
            raise ValueError(f"slot is {slot}; it must be a free one below {self._capacity}")
        if lane.latents.shape != self._shape:
            raise ValueError(f"the lane's latents are {lane.latents.shape}; this batch takes {self._shape}")
        self._scatter()
        with inference(self._device):
            history = (
                torch.zeros(3, *self._shape, device=self._device)
                if lane.history is None
                else to_device(lane.history, self._device, torch.float32)
            )
            self._seats[slot] = _Seat(
                lane=lane,
                condition=self._hoist_condition(lane),
                times=self._hoist_times(lane),
                context=self._hoist_context(lane),
                latents=to_device(lane.latents, self._device, torch.float32),
                history=history,
                broken=torch.full((), -1, dtype=torch.int64, device=self._device),
            )

    def step(self, rows: Mapping[int, int]) -> None:
        """See `Batch`."""
        slots = tuple(rows)
        with inference(self._device):
            if self._group is None or self._group.slots != slots:
                self._scatter()
                self._group = self._gather(slots)
            self._move(self._group, tuple(rows.values()))

    def leave(self, slot: int) -> LaneState:
        """See `Batch`."""
        self._scatter()
        seat = self._seats.pop(slot)
        broken = int(seat.broken)
        return LaneState(
            latents=_to_host(seat.latents),
            history=_to_host(seat.history),
            broken_row=None if broken < 0 else broken,
        )

    def _hoist_condition(self, lane: Lane) -> Tensor:
        for other in self._seats.values():
            if other.lane.condition is lane.condition:
                return other.condition
        condition = to_device(lane.condition[None], self._device, self._dtype)
        return self._unet.hoist_condition(condition.to(memory_format=self._layout))

    def _hoist_times(self, lane: Lane) -> Tensor:
        for other in self._seats.values():
            if other.lane.table is lane.table:
                return other.times
        timesteps = to_device(lane.table.timesteps.astype(np.float32), self._device, torch.float32)
        return self._unet.hoist_timesteps(timesteps)

    def _hoist_context(self, lane: Lane) -> tuple[KeysValues, ...]:
        for other in self._seats.values():
            if other.lane.context is lane.context and other.lane.unconditional is lane.unconditional:
                return other.context
        branches = [lane.context] if lane.unconditional is None else [lane.unconditional, lane.context]
        return self._unet.hoist_context(to_device(np.stack(branches), self._device, self._dtype))

    def _gather(self, slots: tuple[int, ...]) -> _Group:
        seats = [self._seats[slot] for slot in slots]
        counts = [1 if seat.lane.unconditional is None else 2 for seat in seats]
        firsts = np.cumsum([0, *counts[:-1]]).tolist()
        lasts = [first + count - 1 for first, count in zip(firsts, counts, strict=True)]
        owners = [lane for lane, count in enumerate(counts) for _ in range(count)]
        context = tuple(
            (torch.cat([keys for keys, _ in pairs]), torch.cat([values for _, values in pairs]))
            for pairs in zip(*(seat.context for seat in seats), strict=True)
        )
        history = torch.stack([seat.history for seat in seats], dim=1)
        return _Group(
            slots=slots,
            latents=torch.stack([seat.latents for seat in seats]),
            history=(history[0], history[1], history[2]),
            condition=torch.cat([seat.condition for seat in seats]),
            context=context,
            rows=None if max(counts) == 1 else self._indices(owners),
            unconditional=self._indices(firsts),
            conditional=self._indices(lasts),
            guidance=torch.tensor([seat.lane.guidance for seat in seats], device=self._device).view(
                -1, 1, 1, 1
            ),
            broken=torch.stack([seat.broken for seat in seats]),
        )

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _scatter(self) -> None:
        """Give the group's state back to its seats."""
        group, self._group = self._group, None
        if group is None:
            return
        history = torch.stack(group.history, dim=1)
        for i, slot in enumerate(group.slots):
            seat = self._seats[slot]
            seat.latents, seat.history, seat.broken = group.latents[i], history[i], group.broken[i]

    def _move(self, group: _Group, indices: tuple[int, ...]) -> None:
        """One step: scale, UNet, guidance, update. [Ho & Salimans 2022, arXiv:2207.12598, Eq. 6]"""
        self._wait()
        seats = [self._seats[slot] for slot in group.slots]
        table_rows = [seat.lane.table.row(index) for seat, index in zip(seats, indices, strict=True)]
        row = stack(table_rows).map(
            lambda values: torch.from_numpy(values).to(self._device, non_blocking=True)
        )
        scaled = (row.in_scale * group.latents).to(self._dtype).contiguous(memory_format=self._layout)
        times = torch.stack([seat.times[index] for seat, index in zip(seats, indices, strict=True)])
        output = self._unet.step(scaled, times, group.condition, group.context, group.rows).float()
        base = output.index_select(0, group.unconditional)
        guided = base + group.guidance * (output.index_select(0, group.conditional) - base)
        noise = self._noise(seats, indices, [bool(one.c) for one in table_rows])
        group.latents, group.history = advance(row, group.latents, guided, noise, group.history)
        finite = torch.isfinite(group.latents).flatten(1).all(dim=1)
        first_break = ~finite & (group.broken < 0)
        group.broken = torch.where(first_break, self._indices(indices), group.broken)

    def _noise(self, seats: list[_Seat], indices: tuple[int, ...], noisy: list[bool]) -> Tensor | float:
        if not any(noisy):
            return 0.0
        draws = [
            normal(seat.lane.seed, index + 1, self._shape) if wanted else np.zeros(self._shape, np.float32)
            for seat, index, wanted in zip(seats, indices, noisy, strict=True)
        ]
        return to_device(np.stack(draws), self._device, torch.float32)

    def _wait(self) -> None:
        """Let the host run at most a few steps ahead of a GPU, so that stopping takes effect at once."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        if len(self._events) > _STEPS_AHEAD:
            self._events.pop(0).synchronize()


def _largest_weight_bytes(checkpoint: Checkpoint) -> int:
    """Of the UNet, at two bytes a number."""
    variants = checkpoint.weights["unet"].values()
    return max(2 * prod(tensor.shape) for tensors in variants for tensor in tensors.values())


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """No gradients, and `device` as CUDA's current one, for the length of the block."""
    with torch.inference_mode():
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield


def to_device(array: np.ndarray[Any, Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of a host array on `device` in `dtype`."""
    return torch.tensor(array, device=device).to(dtype)


def _to_host(tensor: Tensor) -> Floats:
    out: Floats = tensor.float().cpu().numpy()
    return out
