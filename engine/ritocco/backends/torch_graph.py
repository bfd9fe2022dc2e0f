"""Work that is captured once and replayed, with what changes from call to call as data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ritocco.backends.runtime import Floats, Lane, LatentSize
from ritocco.backends.torch_group import Rows, Seat
from ritocco.nets.unet import UNet
from ritocco_kernels.guided_step import NUMBERS

_KEPT_SHAPES = 8  # of one network
_STAGED = 4  # one more than the steps that the host may be ahead, and one in hand


Work: TypeAlias = Callable[[], None]
Capture: TypeAlias = Callable[[Work], Work]
"""Takes work that ran before, on tensors that stay where they are; returns what does the same again."""


def cuda_graphs(device: torch.device) -> Capture:
    """Capture into CUDA graphs, all of which keep what they compute in between in one pool of memory: none of
    it has to outlive a replay.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
            work()
        return graph.replay

    return capture


def again(work: Work) -> Work:
    """For devices without graphs: the work itself."""
    return work


class Replayed:
    """A function of one tensor: the first call of a shape runs it, the second captures it, then it is
    replayed. What a call returns is overwritten by the next of the same shape.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], capture: Capture) -> None:
        self._function, self._capture = function, capture
        self._held: OrderedDict[tuple[int, ...], _Captured | None] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        if shape not in self._held:
            self._held[shape] = None
            if len(self._held) > _KEPT_SHAPES:
                self._held.popitem(last=False)
            return self._function(x)
        self._held.move_to_end(shape)
        captured = self._held[shape]
        if captured is None:
            captured = self._held[shape] = _Captured.of(self._function, x, self._capture)
        captured.given.copy_(x)
        captured.replay()
        return captured.result[0]


@dataclass(slots=True, eq=False)
class _Captured:
    replay: Work
    given: Tensor
    result: list[Tensor]  # the one that a replay writes

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor], x: Tensor, capture: Capture) -> _Captured:
        given, result = x.clone(memory_format=torch.preserve_format), [x]

        def work() -> None:
            result[0] = function(given)

        return cls(capture(work), given, result)


class StepGraphs:
    """The captured steps of one UNet: one for each latent size and pattern of lanes, the least used go."""

    def __init__(self, unet: UNet, capture: Capture, dtype: torch.dtype) -> None:
        self._unet, self._capture, self._dtype = unet, capture, dtype
        self._held: OrderedDict[tuple[Any, ...], StepGraph] = OrderedDict()

    def group(self, size: LatentSize, slots: tuple[int, ...], seats: list[Seat]) -> GraphGroup:
        """The seats' group, on buffers that are theirs until another group of the same kind needs them."""
        counts = tuple(seat.rows for seat in seats)
        key = (size, counts, seats[0].context[0].shape[1])
        graph = self._held.pop(key, None) or StepGraph(self._unet, seats, self._capture, self._dtype)
        self._held[key] = graph
        while len(self._held) > _KEPT_SHAPES:
            self._held.popitem(last=False)
        return GraphGroup(graph, slots, seats)


class StepGraph:
    """One step of N lanes with M rows, its buffers, and the graph from the second step on."""

    def __init__(self, unet: UNet, seats: list[Seat], capture: Capture, dtype: torch.dtype) -> None:
        first = seats[0]
        device = first.latents.device
        n, rows = len(seats), Rows.of([seat.rows for seat in seats])
        self.holder: GraphGroup | None = None
        self._unet, self._capture = unet, capture
        self._ran = False
        self._replay: Work | None = None
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
        pinned = device.type == "cuda"
        self._staged = [torch.zeros(n * each, dtype=torch.uint8, pin_memory=pinned) for _ in range(_STAGED)]
        self._turn = 0

    def move(self, seats: list[Seat], numbers: list[Floats], indices: tuple[int, ...]) -> None:
        """Queue a step: one copy of a few numbers, one of the time vectors, the graph.

        numbers: of `step_numbers`, for each seat.
        """
        staged = self._staged[self._turn]
        self._turn = (self._turn + 1) % _STAGED
        fill(staged.numpy(), seats, numbers, indices)
        self._given.copy_(staged, non_blocking=True)
        torch.stack([seat.times[index] for seat, index in zip(seats, indices, strict=True)], out=self.time)
        if not self._ran:
            self._work()
            self._ran = True
            return
        if self._replay is None:
            self._replay = self._capture(self._work)
        self._replay()

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
        graph.move(self._seats, self._numbers, indices)
        self._ready = tuple(index + 1 for index in indices)

    def scatter(self) -> None:
        """See `Group`."""
        graph = self._graph
        if not self.held:
            return
        graph.holder, self.held = None, False
        for i, seat in enumerate(self._seats):
            seat.latents, seat.broken = graph.latents[i].clone(), graph.broken[i].clone()
            seat.history = graph.history[:, i].clone()


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
