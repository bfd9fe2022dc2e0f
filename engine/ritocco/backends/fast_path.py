"""What the torch runtime does on a GPU beyond plain PyTorch, and whether this machine can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ritocco_kernels.ops import REFERENCE, Ops

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True, slots=True)
class FastPath:
    """One rung of the ladder each; all of them are exact.

    kernels: fused Triton kernels instead of plain operations. packed: one product for projections of the same
    input. graphs: work is captured once and replayed, instead of launched kernel by kernel; it takes both of
    the others.
    search: cuDNN times its convolution algorithms when it meets a new shape.
    """

    kernels: bool
    packed: bool
    graphs: bool
    search: bool

    def __post_init__(self) -> None:
        if self.graphs and not (self.kernels and self.packed):
            raise ValueError("graphs is True; it takes kernels and packed as well")

    @classmethod
    def of(cls, device: torch.device) -> FastPath:
        """All of it on a CUDA device (kernels and graphs where Triton is installed), nothing on a CPU."""
        cuda = device.type == "cuda"
        kernels = cuda and find_spec("triton") is not None
        return cls(
            kernels=kernels,
            packed=cuda,
            graphs=kernels,
            search=cuda,
        )

    def ops(self) -> Ops:
        """The table that the networks take."""
        if not self.kernels:
            return REFERENCE
        from ritocco_kernels.fused.table import FUSED

        return FUSED

    @contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """No gradients, `device` as CUDA's current one, and this path's settings of PyTorch, for the length
        of the block; then they are as before.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
                self._set(stack.callback)
            yield

    def _set(self, later: Callable[..., object]) -> None:
        cudnn = torch.backends.cudnn
        later(setattr, cudnn, "benchmark", cudnn.benchmark)
        cudnn.benchmark = self.search
