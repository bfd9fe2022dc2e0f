"""What the torch runtime does on a GPU beyond plain PyTorch, and whether this machine can."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from ritocco.shown import said
from ritocco_kernels.ops import REFERENCE, Ops


@dataclass(frozen=True, kw_only=True, slots=True)
class FastPath:
    """One rung of the ladder each. None approximates; results differ by rounding.

    kernels: fused Triton kernels instead of plain operations. packed: one product for projections of the same
    input. graphs: work is captured once and replayed, instead of launched kernel by kernel; it takes both of
    the others. search: cuDNN times its convolution algorithms when it meets a new shape. compiled: torch's
    compiler makes the code of a step, which takes minutes for each new shape; nobody takes it unasked.
    """

    kernels: bool
    packed: bool
    graphs: bool
    search: bool
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.graphs and not (self.kernels and self.packed):
            raise ValueError("graphs is True; it takes kernels and packed as well")

    @classmethod
    def of(cls, device: torch.device) -> tuple[FastPath, tuple[str, ...]]:
        """All of it on a CUDA device, nothing on a CPU; and what to say of it.

        Kernels and graphs are left out where Triton is not installed or can't compile (it needs a C compiler,
        and a card that it knows), or where the device is AMD's, whose convolutions lie otherwise.
        """
        if device.type != "cuda":
            return cls(kernels=False, packed=False, graphs=False, search=False), ()
        trouble = _trouble(device)
        path = cls(kernels=not trouble, packed=True, graphs=not trouble, search=True)
        return path, (f"without fused kernels and graphs, so slower: {trouble}",) if trouble else ()

    def ops(self) -> Ops:
        """The table that the networks take."""
        if not self.kernels:
            return REFERENCE
        from ritocco_kernels.fused.table import FUSED

        return FUSED

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """No gradients, `device` as CUDA's current one, and cuDNN's settings of this path, for the length of
        the block.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(_cudnn.set(search=self.search))
            yield


class _Cudnn:
    """cuDNN's settings, which a process has once: while any block is open they are those of the last that
    opened, and after it as before the first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._before = (False, False)

    @contextmanager
    def set(self, *, search: bool) -> Iterator[None]:
        """float32 convolutions in float32, not in TensorFloat-32 with its 10 bits."""
        settings = torch.backends.cudnn
        with self._lock:
            if not self._open:
                self._before = (settings.benchmark, settings.allow_tf32)
            self._open += 1
            settings.benchmark, settings.allow_tf32 = search, False
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if not self._open:
                    settings.benchmark, settings.allow_tf32 = self._before


_cudnn = _Cudnn()


def _trouble(device: torch.device) -> str:
    """Why kernels do not run on a CUDA device; empty where one does."""
    if torch.version.hip is not None:
        return "the device is AMD's, where they are untested"
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from ritocco_kernels.fused.geglu import geglu

        with torch.inference_mode(), torch.cuda.device(device):
            geglu(torch.zeros(1, 32, device=device)).cpu()
    except Exception as error:  # whatever a compiler, a driver or a card has to say
        return f"Triton fails here ({type(error).__name__}: {said(error)})"
    return ""
