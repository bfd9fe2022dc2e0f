"""The torch runtime: the networks of `nets/`, with all that does not change between steps computed once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ritocco.backends.fast_path import FastPath
from ritocco.backends.residence import Residence
from ritocco.backends.room import Room
from ritocco.backends.runtime import Floats, Lane, LaneState, LatentSize, Tokens, Traits
from ritocco.backends.steps_ahead import StepsAhead
from ritocco.backends.torch_group import EagerGroup, Group, Seat, to_device
from ritocco.checkpoint import Checkpoint, load_network
from ritocco.nets.text_encoder import TextEncoder
from ritocco.nets.unet import UNet
from ritocco.nets.vae import VAE
from ritocco.parameters import place
from ritocco.pixels import Kept, Mask, Pixels, from_model, masked_to_model, not_finite, pasted

if TYPE_CHECKING:
    from ritocco.backends.torch_graph import StepGraphs

_log = logging.getLogger(__name__)

_MOST_GATED = 64 << 20  # bytes; products of fewer tokens would leave a large GPU idle


class TorchRuntime:
    """The three networks of a checkpoint on one torch device, in one dtype. See `Runtime`.

    Every method raises BackendError where the device's memory runs out, also without what was captured.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        load: Callable[..., nn.Module] = load_network,
        path: FastPath | None = None,
        movable: bool = False,
    ) -> None:
        """Load the weights straight onto `device`. load: as `load_network`. path: None takes `FastPath.of`.
        movable: they stay in their files instead, and networks come and go as `follow` says; without graphs,
        which know their weights by address, and without `search`.

        Raises CheckpointError where they do not fit.
        """
        self.device, self.dtype, self.room = device, dtype, Room(device)
        self.path, self.notes = FastPath.of(device) if path is None else (path, ())
        if movable:
            # Looking for algorithms takes more memory than the ones that are found.
            self.path = replace(self.path, graphs=False, search=False)
        ops = self.path.ops()
        # In float32 on a CPU, torch's channels_last group norm loses digits (see `groupnorm_reference`).
        plain = device.type == "cpu" and dtype == torch.float32 and not self.path.kernels
        self.layout = torch.contiguous_format if plain else torch.channels_last
        all_later = ("",) if movable else ()
        self.unet = cast(UNet, load(checkpoint, "unet", device=device, dtype=dtype, later=all_later, ops=ops))
        self.unet.bound_feed_forward(_MOST_GATED)
        # The decoder is not needed before the last step. On a GPU it moves at once: what does not fit there
        # has to show now.
        later = all_later or (("decoder.", "post_quant_conv.") if device.type == "cpu" else ())
        self.vae = cast(VAE, load(checkpoint, "vae", device=device, dtype=dtype, later=later, ops=ops))
        self._decodes = not later or movable
        # How many lanes of a size fit into the device's memory at once, where it ran out with more.
        self.fitting: dict[LatentSize, int] = {}
        self.planned: dict[LatentSize, int] = {}  # the same, by `follow`
        self.text_encoder = cast(
            TextEncoder, load(checkpoint, "text_encoder", device=device, dtype=dtype, later=all_later)
        )
        self.traits = Traits(
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            lane_timesteps=True,
            size_multiple=self.unet.spec.size_multiple,
        )
        with self.path.active(device):
            self.residence: Residence | None = None
            if movable:
                networks = {"text_encoder": self.text_encoder, "vae": self.vae, "unet": self.unet}
                self.residence = Residence(networks, device=device, dtype=dtype, packed=self.path.packed)
            elif self.path.packed:
                self.unet.pack()
            if self.path.compiled:
                compiled = torch.compile(self.unet.step, dynamic=False, fullgraph=True)
                self.unet.step = compiled  # type: ignore[method-assign]
            self.graphs: StepGraphs | None = None
            self._encode_text: Callable[[Tensor], Tensor] = self.text_encoder
            self._encode_mean: Callable[[Tensor], Tensor] = self.vae.encode_mean
            self._decode: Callable[[Tensor], Tensor] = self.vae.decode
            if self.path.graphs:
                self._capture()

    def follow(self, size: LatentSize, *, at_once: int, leaving: Collection[str]) -> None:
        """Of a movable runtime: how many lanes of a size move together, and the networks that leave the
        device when another is needed.
        """
        self.planned[size] = at_once
        with self.path.active(self.device):
            self.room.run("the networks", partial(cast(Residence, self.residence).settle, leaving))

    def need(self, network: str) -> None:
        """Where networks come and go, let one come. Raises BackendError where memory runs out."""
        if self.residence is not None:
            self.room.run("the networks", partial(self.residence.need, network))

    def encode_text(self, tokens: Tokens) -> Floats:
        """See `Runtime`."""

        def encoded() -> Floats:
            return _to_host(self._encode_text(torch.from_numpy(tokens).to(self.device)))

        with self.path.active(self.device):
            self.need("text_encoder")
            return self.room.run("encoding a prompt", encoded)

    def encode_image(self, pixels: Floats) -> Floats:
        """See `Runtime`. One picture at a time: the activations of a picture set the peak."""

        def encoded() -> Floats:
            return np.concatenate([_to_host(self._encode_mean(self._image(one))) for one in pixels])

        with self.path.active(self.device):
            self.need("vae")
            return self.room.run("encoding a picture", encoded)

    def encode_pixels(self, pixels: Pixels, mask: Mask | None) -> Floats:
        """See `Runtime`. Where kernels run, the picture crosses as bytes."""
        if not self.path.kernels:
            return self.encode_image(masked_to_model(pixels, mask))
        from ritocco_kernels.fused.model_pixels import to_model_pixels

        def encoded() -> Floats:
            hidden = None if mask is None else self._bytes(mask[None])
            model = to_model_pixels(self._bytes(pixels[None]), hidden, self.dtype)
            return _to_host(self._encode_mean(model))

        with self.path.active(self.device):
            self.need("vae")
            return self.room.run("encoding a picture", encoded)

    def decode(self, latents: Floats) -> Floats:
        """See `Runtime`. One picture at a time: the activations of a picture set the peak."""

        def decoded() -> Floats:
            return np.concatenate([_to_host(self._decoded(one)) for one in latents])

        with self.path.active(self.device):
            self.need("vae")
            return self.room.run("decoding a picture", decoded)

    def decode_pixels(self, latents: Floats, kept: Kept | None) -> Pixels:
        """See `Runtime`. Where kernels run, the pictures cross as bytes."""
        if not self.path.kernels:
            return pasted(from_model(self.decode(latents)), kept)
        from ritocco_kernels.fused.model_pixels import from_model_pixels

        def decoded() -> Pixels:
            held = (None, None) if kept is None else tuple(self._bytes(one) for one in kept)
            made = [from_model_pixels(self._decoded(one), *held) for one in latents]
            if any(int(broken) for _, broken in made):
                raise not_finite()
            return np.concatenate([picture.cpu().numpy() for picture, _ in made])

        with self.path.active(self.device):
            self.need("vae")
            return self.room.run("decoding a picture", decoded)

    def open(self, size: LatentSize, capacity: int) -> TorchBatch:
        """See `Runtime`."""
        return TorchBatch(self, size, capacity)

    def _capture(self) -> None:
        """Let every network be captured."""
        from ritocco.backends.recorded import Replayed, again, cuda_graphs
        from ritocco.backends.torch_graph import StepGraphs

        capture = cuda_graphs(self.device) if self.device.type == "cuda" else again
        make_room = self.room.make
        self.graphs = StepGraphs(self.unet, capture, self.dtype, make_room)
        self._encode_text = text = Replayed(self._encode_text, capture, make_room)
        self._encode_mean = mean = Replayed(self._encode_mean, capture, make_room)
        self._decode = decode = Replayed(self._decode, capture, make_room)
        self.room.captured.update((self.graphs, text, mean, decode))

    def _decoded(self, latents: Floats) -> Tensor:
        """Of one picture: [1,3,H,W]."""
        self._bring_decoder()
        return self._decode(self._image(latents))

    def _bring_decoder(self) -> None:
        if not self._decodes:
            place(self.vae, device=self.device, dtype=self.dtype)
            self._decodes = True

    def _bytes(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _image(self, array: Floats) -> Tensor:
        return to_device(array[None], self.device, self.dtype).to(memory_format=self.layout)


class TorchBatch:
    """Lanes on one torch device; latents, history and the update are float32. See `Batch`.

    Where the device's memory does not hold the work of all lanes at once, nor without what was captured, half
    as many move together from then on: a step that failed has changed nothing, and is taken again.
    """

    def __init__(self, runtime: TorchRuntime, size: LatentSize, capacity: int) -> None:
        self._unet, self._graphs, self._path = runtime.unet, runtime.graphs, runtime.path
        self._need, self._room = runtime.need, runtime.room
        self._fitting, self._planned = runtime.fitting, runtime.planned
        self._device, self._dtype, self._layout = runtime.device, runtime.dtype, runtime.layout
        self._size = size
        self._shape = (runtime.unet.spec.out_channels, size.height, size.width)
        self._capacity = capacity
        self._seats: dict[int, Seat] = {}
        self._groups: dict[tuple[int, ...], Group] = {}
        self._picture = f"one picture of {8 * size.width} x {8 * size.height} pixels"
        self._ahead = StepsAhead(runtime.device)

    def join(self, slot: int, lane: Lane) -> None:
        """See `Batch`. Raises ValueError for a slot that is taken or out of range, or another size, and
        BackendError where memory runs out.
        """
        if not 0 <= slot < self._capacity or slot in self._seats:
            raise ValueError(f"slot is {slot}; it must be a free one below {self._capacity}")
        if lane.latents.shape != self._shape:
            raise ValueError(f"the lane's latents are {lane.latents.shape}; this batch takes {self._shape}")
        with self._path.active(self._device):
            self._need("unet")
            self._seats[slot] = self._room.run(self._picture, partial(self._seat, lane))

    def step(self, rows: Mapping[int, int]) -> None:
        """See `Batch`. Raises BackendError where memory runs out with a single lane."""
        slots, first = tuple(rows), 0
        may_fit = self._graphs is not None  # without what is captured
        with self._path.active(self._device):
            self._need("unet")
            self._ahead.wait()
            while first < len(slots):
                bounds = (bound.get(self._size, self._capacity) for bound in (self._fitting, self._planned))
                part = slots[first : first + min(bounds)]
                error = self._try_to_move(part, tuple(rows[slot] for slot in part))
                if error is None:
                    first += len(part)
                    continue
                self._clear()
                if may_fit:
                    may_fit = False
                else:
                    self._take_fewer(len(part), error)
            self._ahead.queued()

    def peek(self, slot: int) -> LaneState:
        """See `Batch`. Raises BackendError where memory runs out."""
        return self._room.run(self._picture, partial(self._state, slot))

    def leave(self, slot: int) -> LaneState:
        """See `Batch`. Raises BackendError where memory runs out."""
        self._room.run(self._picture, self._scatter)
        seat = self._seats.pop(slot)
        return _on_host(seat.latents, seat.history, seat.broken)

    def _clear(self) -> None:
        """After memory ran out in a step: nothing is captured, and the state lies in the seats."""
        try:
            self._scatter()
            self._room.make()
        except torch.OutOfMemoryError as error:
            raise self._room.too_small(self._picture, error) from error

    def _state(self, slot: int) -> LaneState:
        for group in self._groups.values():
            if group.held and slot in group.slots:
                return _on_host(*group.state(group.slots.index(slot)))
        seat = self._seats[slot]
        return _on_host(seat.latents, seat.history, seat.broken)

    def _seat(self, lane: Lane) -> Seat:
        self._scatter()
        history = (
            torch.zeros(3, *self._shape, device=self._device)
            if lane.history is None
            else to_device(lane.history, self._device, torch.float32)
        )
        return Seat(
            lane=lane,
            condition=self._hoist_condition(lane),
            times=self._hoist_times(lane),
            context=self._hoist_context(lane),
            latents=to_device(lane.latents, self._device, torch.float32),
            history=history,
            broken=torch.full((), -1, dtype=torch.int64, device=self._device),
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

    def _hoist_context(self, lane: Lane) -> tuple[Tensor, ...]:
        for other in self._seats.values():
            if other.lane.context is lane.context and other.lane.unconditional is lane.unconditional:
                return other.context
        branches = [lane.context] if lane.unconditional is None else [lane.unconditional, lane.context]
        context = to_device(np.stack(branches), self._device, self._dtype)
        if self._path.packed:
            return (self._unet.project_context(context),)
        return tuple(one for pair in self._unet.hoist_context(context) for one in pair)

    def _gather(self, slots: tuple[int, ...]) -> Group:
        seats = [self._seats[slot] for slot in slots]
        if self._graphs is not None:
            return self._graphs.group(self._size, slots, seats)
        return EagerGroup(self._unet, slots, seats, dtype=self._dtype, layout=self._layout)

    def _move(self, slots: tuple[int, ...], indices: tuple[int, ...]) -> None:
        group = self._groups.get(slots)
        if group is None or not group.held:
            for others in [held for held in self._groups if set(held) & set(slots)]:
                self._groups[others].scatter()
                del self._groups[others]
            group = self._groups[slots] = self._gather(slots)
        group.move(indices)

    def _try_to_move(self, slots: tuple[int, ...], indices: tuple[int, ...]) -> torch.OutOfMemoryError | None:
        """What memory ran out with, if it did: without its frames, which hold what the step had computed."""
        try:
            self._move(slots, indices)
        except torch.OutOfMemoryError as error:
            return error.with_traceback(None)
        return None

    def _take_fewer(self, count: int, error: torch.OutOfMemoryError) -> None:
        """After memory ran out with so many lanes."""
        if count == 1:
            raise self._room.too_small(self._picture, error) from error
        self._fitting[self._size] = count // 2
        _log.warning(
            "%s has not the memory for %d pictures of %s at once; from now on %d are computed at a time",
            self._device,
            count,
            f"{8 * self._size.width} x {8 * self._size.height}",
            count // 2,
        )

    def _scatter(self) -> None:
        """Give the groups' state back to the seats."""
        for slots in list(self._groups):
            self._groups[slots].scatter()
            del self._groups[slots]


def _to_host(tensor: Tensor) -> Floats:
    out: Floats = tensor.float().cpu().numpy()
    return out


def _on_host(latents: Tensor, history: Tensor, broken: Tensor) -> LaneState:
    """A copy, on a CPU too."""
    row = int(broken)
    return LaneState(
        latents=_to_host(latents).copy(),
        history=_to_host(history).copy(),
        broken_row=None if row < 0 else row,
    )
