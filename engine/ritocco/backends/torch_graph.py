"""Steps as graphs: the lanes' buffers stay where they are, and what changes from step to step is data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ritocco.backends.recorded import KEPT_SHAPES, Capture, Recorded, weakly
from ritocco.backends.runtime import Floats, Lane, LatentSize
from ritocco.backends.torch_group import Rows, Seat
from ritocco.nets.unet import UNet
from ritocco_kernels.guided_step import NUMBERS

_STAGED = 4  # one more than the steps that the host may be ahead, and one in hand


class StepGraphs:
    """The captured steps of one UNet: of the `KEPT_SHAPES` latest latent sizes and patterns of lanes."""

    def __init__(
        self,
        unet: UNet,
        capture: Capture,
        dtype: torch.dtype,
        make_room: Callable[[Recorded], None] = lambda _: None,
    ) -> None:
        """make_room: see `Recorded`."""
        self._unet, self._capture, self._dtype, self._make_room = unet, capture, dtype, make_room
        self._held: OrderedDict[tuple[Any, ...], StepGraph] = OrderedDict()

    def group(self, size: LatentSize, slots: tuple[int, ...], seats: list[Seat]) -> GraphGroup:
        """The seats' group, on buffers that are theirs until another group of the same kind needs them."""
        counts = tuple(seat.rows for seat in seats)
        key = (size, counts, seats[0].context[0].shape[1])
        graph = self._held.pop(key, None) or self._graph(seats)
        self._held[key] = graph
        while len(self._held) > KEPT_SHAPES:
            self._held.popitem(last=False)
        return GraphGroup(graph, slots, seats)

    def forget(self, but: Recorded | None = None) -> None:
        """See `Forgetful`. Who is on the buffers of those that go takes the state back before."""
        for key, graph in list(self._held.items()):
            if graph.recorded is but:
                continue
            if graph.holder is not None:
                graph.holder.scatter()
            del self._held[key]

    def _graph(self, seats: list[Seat]) -> StepGraph:
        return StepGraph(self._unet, seats, self._capture, self._dtype, self._make_room)


class StepGraph:
    """One step of N lanes with M rows, and its buffers."""

    def __init__(
        self,
        unet: UNet,
        seats: list[Seat],
        capture: Capture,
        dtype: torch.dtype,
        make_room: Callable[[Recorded], None],
    ) -> None:
        first = seats[0]
        device = first.latents.device
        n, rows = len(seats), Rows.of([seat.rows for seat in seats])
        self.holder: GraphGroup | None = None
        self._unet = unet
        self.recorded = Recorded(weakly(self._work), capture, make_room)
        self.latents = torch.zeros(n, *first.latents.shape, device=device)
        self.history = torch.zeros(3, *self.latents.shape, device=device)
        self.broken = torch.full((n,), -1, dtype=torch.int64, device=device)
        # The network's inputs.
        self.scaled = torch.zeros_like(self.latents, dtype=dtype, memory_format=torch.channels_last)
        self.time = torch.zeros(n, first.times.shape[1], dtype=dtype, device=device)
        self.condition = torch.cat([first.condition] * n)
        self.context = torch.cat([first.context[0][:1]] * len(rows.owner))
        self._rows = _indices(rows.owner, device) if rows.shared else None
        self._unconditional = _indices(rows.unconditional, device)
        self._conditional = _indices(rows.conditional, device)
        # Each lane's numbers of this step: seed and row, then those of `NUMBERS`.
        each = 2 * 8 + len(NUMBERS) * 4
        self._given = torch.zeros(n * each, dtype=torch.uint8, device=device)
        self._integers = self._given[: n * 16].view(torch.int64).view(n, 2)
        self._numbers = self._given[n * 16 :].view(torch.float32).view(n, len(NUMBERS))
        cuda = device.type == "cuda"
        self._staged = [torch.zeros(n * each, dtype=torch.uint8, pin_memory=cuda) for _ in range(_STAGED)]
        self._written = [one.numpy() for one in self._staged]  # the same memory
        self._copied = [
            torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
            for _ in range(_STAGED)
        ]
        self._turn = 0

    def move(
        self,
        seats: list[Seat],
        numbers: list[Floats],
        times: list[Sequence[Tensor]],
        indices: tuple[int, ...],
    ) -> None:
        """Queue a step: one copy of a few numbers, one of the time vectors, the graph.

        numbers: of `step_numbers`, for each seat. times: the rows of its time vectors.
        """
        staged, copied = self._staged[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        fill(self._written[self._turn], seats, numbers, indices)
        self._given.copy_(staged, non_blocking=True)
        if copied is not None:
            copied.record()
        self._turn = (self._turn + 1) % _STAGED
        torch.stack([each[index] for each, index in zip(times, indices, strict=True)], out=self.time)
        self.recorded()

    def _work(self) -> None:
        from ritocco_kernels.fused.guided_step import guided_step

        context = self._unet.split_context(self.context)
        output = self._unet.step(self.scaled, self.time, self.condition, context, self._rows)
        guided_step(
            output,
            self.latents,
            self.history,
            self.scaled,
            self._numbers,
            self._integers,
            self._unconditional,
            self._conditional,
            self.broken,
        )


class GraphGroup:
    """Seats on the buffers of a StepGraph. See `Group`."""

    def __init__(self, graph: StepGraph, slots: tuple[int, ...], seats: list[Seat]) -> None:
        if graph.holder is not None:
            graph.holder.scatter()
        graph.holder = self
        self.slots, self.held = slots, True
        self._graph, self._seats = graph, seats
        self._numbers = [step_numbers(seat.lane) for seat in seats]
        self._times: list[Sequence[Tensor]] = [seat.times.unbind() for seat in seats]
        self._ready: tuple[int, ...] | None = None  # the rows for which `scaled` holds the input
        first = 0
        for i, seat in enumerate(seats):
            graph.latents[i].copy_(seat.latents)
            graph.history[:, i].copy_(seat.history)
            graph.broken[i].copy_(seat.broken)
            graph.condition[i].copy_(seat.condition[0])
            graph.context[first : first + seat.rows].copy_(seat.context[0])
            first += seat.rows

    def move(self, indices: tuple[int, ...]) -> None:
        """See `Group`."""
        graph = self._graph
        if self._ready != indices:
            scales = [seat.lane.table.in_scale[row] for seat, row in zip(self._seats, indices, strict=True)]
            scale = torch.tensor(scales, dtype=torch.float32, device=graph.latents.device)
            graph.scaled.copy_(scale.view(-1, 1, 1, 1) * graph.latents)
        graph.move(self._seats, self._numbers, self._times, indices)
        self._ready = tuple(index + 1 for index in indices)

    def state(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Group`."""
        graph = self._graph
        return graph.latents[place], graph.history[:, place], graph.broken[place]

    def scatter(self) -> None:
        """See `Group`. Where memory runs out on the way, nothing has changed."""
        if not self.held:
            return
        graph = self._graph
        states = [tuple(one.clone() for one in self.state(i)) for i in range(len(self._seats))]
        for seat, state in zip(self._seats, states, strict=True):
            seat.latents, seat.history, seat.broken = state
        graph.holder, self.held = None, False
        del self._graph  # which may be all that keeps its memory


def step_numbers(lane: Lane) -> Floats:
    """What `guided_step` takes for each row of a lane's table: float32 [rows,11], see `NUMBERS`."""
    table = lane.table
    following = np.append(table.in_scale[1:], 0.0)
    guidance = np.full(len(table), lane.guidance)
    columns = (table.p, table.q, table.a, *table.b.T, table.c, table.push, guidance, following)
    return np.stack(columns, axis=1).astype(np.float32)


def fill(
    given: npt.NDArray[np.uint8], seats: list[Seat], numbers: list[Floats], indices: tuple[int, ...]
) -> None:
    """Write every lane's integers and numbers of a step into a host buffer, as `guided_step` takes them."""
    n = len(seats)
    integers = given[: n * 16].view(np.uint64).reshape(n, 2)
    floats = given[n * 16 :].view(np.float32).reshape(n, len(NUMBERS))
    for i, (seat, each, index) in enumerate(zip(seats, numbers, indices, strict=True)):
        integers[i] = seat.lane.seed, index
        floats[i] = each[index]


def _indices(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
