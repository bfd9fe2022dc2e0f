"""Work that runs once, is captured the second time, and is replayed from then on."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ritocco.backends.allocator import capturing

KEPT_SHAPES = 8
"""Of one network: those that ran last. All go where memory runs out."""

_TRIES = 3  # of a capture that memory runs out in

Work: TypeAlias = Callable[[], None]
Capture: TypeAlias = Callable[[Work], Work]
"""Takes work that ran before, on tensors that stay where they are; returns what does the same again."""


def cuda_graphs(device: torch.device) -> Capture:
    """Capture into CUDA graphs, all of which keep what they compute in between in one pool of memory: none of
    it has to outlive a replay.

    The pool is as large as the largest of them needs, and stays so while one of them lives.
    """
    pool = torch.cuda.graph_pool_handle()
    living: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
    # Not torch's own stream for captures, of which a process has one, on the device of its first capture.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(work: Work) -> Work:
        nonlocal pool
        if not living:  # torch takes no graph into a pool that all others have left
            pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        living.add(graph)
        before = torch.cuda.current_stream(device)
        with capturing:
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


def weakly(method: Work) -> Work:
    """A method, without its object: who keeps a `Recorded` of it goes at once, with what was captured."""
    held = weakref.WeakMethod(method)

    def work() -> None:
        here = held()
        if here is not None:
            here()

    return work


class Recorded:
    """One piece of work on tensors that stay where they are. Called by one thread at a time."""

    def __init__(
        self, work: Work, capture: Capture, make_room: Callable[[Recorded], None] = lambda _: None
    ) -> None:
        """make_room: called with this one where memory runs out in a capture, to free what others keep."""
        self._work, self._capture, self._make_room = work, capture, make_room
        # cuDNN's choice of algorithms is kept for each thread, and can't be made during a capture.
        self._ran_in: int | None = None
        self._replay: Work | None = None
        self._tries = _TRIES

    def __call__(self) -> None:
        """Run, capture or replay it. Where memory runs out in a capture the work is run, and the capture is
        tried again at the next two calls; after another failure it is not. That is said once.
        """
        if self._replay is None and self._ran_in == threading.get_ident() and self._tries:
            self._try_to_capture()
        if self._replay is not None:
            self._replay()
            return
        self._work()
        self._ran_in = threading.get_ident()

    def _try_to_capture(self) -> None:
        try:
            self._replay = self._capture(self._work)
            return
        except RuntimeError as error:
            ran_out, message = _ran_out(error), str(error)
        # Behind the block: until then the error's frames hold what the work had computed.
        self._tries = self._tries - 1 if ran_out else 0
        if ran_out:
            self._make_room(self)
        if not self._tries:
            warnings.warn(f"not captured, so slower: {message}", RuntimeWarning, stacklevel=3)


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory did: after torch's error a capture may not end, which is an error of its own; the driver
    has words alone.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__context__
    return False


class Replayed:
    """A function of one tensor, `Recorded` for each of the `KEPT_SHAPES` latest shapes. What a call returns
    holds until anything that was captured with the same `Capture` runs again.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        capture: Capture,
        make_room: Callable[[Recorded], None] = lambda _: None,
    ) -> None:
        """make_room: see `Recorded`."""
        self._function, self._capture, self._make_room = function, capture, make_room
        self._held: OrderedDict[tuple[int, ...], _Shape] = OrderedDict()

    def __call__(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        held = self._held.pop(shape, None) or self._recorded(x)
        self._held[shape] = held
        if len(self._held) > KEPT_SHAPES:
            self._held.popitem(last=False)
        return held(x)

    def forget(self, but: Recorded | None = None) -> None:
        """See `Forgetful`."""
        for shape, held in list(self._held.items()):
            if held.recorded is not but:
                del self._held[shape]

    def _recorded(self, x: Tensor) -> _Shape:
        return _Shape(self._function, x, self._capture, self._make_room)


class _Shape:
    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        capture: Capture,
        make_room: Callable[[Recorded], None],
    ) -> None:
        self._function = function
        self._given = torch.empty_like(x)
        self._result: Tensor | None = None
        self.recorded = Recorded(weakly(self._work), capture, make_room)

    def __call__(self, x: Tensor) -> Tensor:
        self._given.copy_(x)
        self.recorded()
        assert self._result is not None  # noqa: S101 - the work sets it
        return self._result

    def _work(self) -> None:
        self._result = self._function(self._given)
