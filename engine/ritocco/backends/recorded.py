"""Work that runs once, is captured the second time, and is replayed from then on."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

KEPT_SHAPES = 8
"""Of one network; the least used go."""

Work: TypeAlias = Callable[[], None]
Capture: TypeAlias = Callable[[Work], Work]
"""Takes work that ran before, on tensors that stay where they are; returns what does the same again."""

_capturing = threading.Lock()


def cuda_graphs(device: torch.device) -> Capture:
    """Capture into CUDA graphs, all of which keep what they compute in between in one pool of memory: none of
    it has to outlive a replay.

    The pool is as large as the largest of them needs, and stays so while one of them lives.
    """
    pool = torch.cuda.graph_pool_handle()
    # Not torch's own stream for captures, of which a process has one, on the device of its first capture.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(device)
        with _capturing:
            try:
                # Other threads may allocate and wait meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    work()
            finally:
                torch.cuda.set_stream(before)  # where a capture that fails leaves its own
        return graph.replay

    return capture


def again(work: Work) -> Work:
    """For devices without graphs: the work itself."""
    return work


class Recorded:
    """One piece of work on tensors that stay where they are. Called by one thread at a time."""

    def __init__(self, work: Work, capture: Capture) -> None:
        self._work, self._capture = work, capture
        # cuDNN's choice of algorithms is kept for each thread, and can't be made during a capture.
        self._ran_in: int | None = None
        self._replay: Work | None = None
        self._refused = False

    def __call__(self) -> None:
        """Run, capture or replay it. A capture that fails is said once, and the work is run from then on."""
        if self._replay is None and self._ran_in == threading.get_ident() and not self._refused:
            try:
                self._replay = self._capture(self._work)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                self._refused = True
                warnings.warn(f"not captured, so slower: {error}", RuntimeWarning, stacklevel=2)
        if self._replay is not None:
            self._replay()
            return
        self._work()
        self._ran_in = threading.get_ident()


class Replayed:
    """A function of one tensor, `Recorded` for each shape. What a call returns holds until anything that was
    captured with the same `Capture` runs again.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], capture: Capture) -> None:
        self._function, self._capture = function, capture
        self._held: OrderedDict[tuple[int, ...], _Shape] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        held = self._held.pop(shape, None) or _Shape(self._function, x, self._capture)
        self._held[shape] = held
        if len(self._held) > KEPT_SHAPES:
            self._held.popitem(last=False)
        return held(x)


class _Shape:
    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, capture: Capture) -> None:
        self._function = function
        self._given = torch.empty_like(x)
        self._result: Tensor | None = None
        self._recorded = Recorded(self._work, capture)

    def __call__(self, x: Tensor) -> Tensor:
        self._given.copy_(x)
        self._recorded()
        assert self._result is not None  # noqa: S101 - the work sets it
        return self._result

    def _work(self) -> None:
        self._result = self._function(self._given)
