"""What operations hold in memory while they run: on tensors without numbers, so that nothing is computed.

On a CPU torch's allocator hands out what is asked for, and what oneDNN and attention need on the
way is asked of it too. What is not modelled: memory outside torch's allocator (the C library's own, thread
stacks, code that oneDNN compiles).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Workspaces: TypeAlias = Mapping[Any, Callable[[tuple[Any, ...], Any], int]]

_LANES = 16  # channels of a block, in oneDNN's layout for AVX-512; with AVX2 there are 8
_SCRATCH_BYTES = 16 << 10  # beside the weights of a convolution: 12 KiB were seen on two threads


class Live(TorchDispatchMode):
    """Inside, the storages that operations make are counted while they live. Not reentrant.

    now, most: bytes, and their maximum since `begin`. moment: the operation that it was reached in. course:
    where it is a list, what every operation reached is added to it.
    workspaces: what operations need on the way, of their arguments and result; `ON_CPU` where None.
    """

    def __init__(self, workspaces: Workspaces | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._workspaces = ON_CPU if workspaces is None else workspaces
        self.now = self.most = 0
        self.moment = ""
        self.course: list[int] | None = None
        self._held: dict[int, weakref.ref[Any]] = {}

    def begin(self) -> None:
        """Count the maximum from what is held now on."""
        self.most, self.moment = self.now, "what was held before"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._hold(leaf, leaf.untyped_storage().nbytes())
        needed = self._workspaces.get(func)
        reached = self.now + (needed(args, out) if needed is not None else 0)
        if self.course is not None:
            self.course.append(reached)
        if reached > self.most:
            self.most, self.moment = reached, str(func).partition(".")[2].partition(".")[0]
        return out

    def leave_out(self, tensor: Tensor) -> None:
        """Its memory is somebody else's, as a mapped file's is."""
        self._hold(tensor, 0)

    def _hold(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return

        def drop(_: object) -> None:
            self.now -= size
            del self._held[key]

        self._held[key] = weakref.ref(storage, drop)
        self.now += size


def _convolution(args: tuple[Any, ...], out: Tensor) -> int:
    """oneDNN's copies of a convolution's operands in layouts of its own."""
    x: Tensor = args[0]
    weight: Tensor = args[1]
    kernel = _padded(weight.shape[0]) * _blocked(weight[:1]) + _SCRATCH_BYTES
    if x.dtype != torch.float32 or x.is_contiguous(memory_format=torch.channels_last):
        return kernel
    # From and to plain layouts: the input (a picture's few channels stay as they are), then the output.
    given = 0 if x.shape[1] <= 4 else _blocked(x)
    return max(given + kernel + _blocked(out) - out.nbytes, _blocked(out))


def _attention(args: tuple[Any, ...], out: Tensor) -> int:
    """Of each thread a block of scores, its sums and its part of the result, float32.

    [aten/src/ATen/native/cpu/FlashAttentionKernel.cpp: cpu_flash_attention, of torch 2.5 to 2.13]
    """
    queries: Tensor = args[0]
    keys: Tensor = args[1]
    length, width = queries.shape[-2], queries.shape[-1]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    columns = min(512, keys.shape[-2])
    each = 4 * (rows * columns + 2 * rows + rows * width)
    if queries.dtype != torch.float32:
        each += queries.itemsize * rows * columns
    return torch.get_num_threads() * each + 4 * prod(queries.shape[:-1])


def _upsampling(args: tuple[Any, ...], out: Tensor) -> int:
    """Pixels whose channels lie last are copied to where they lie first, and back."""
    x: Tensor = args[0]
    plain = x.dtype != torch.float32 or x.is_contiguous()
    return 0 if plain else x.nbytes + out.nbytes


def _blocked(x: Tensor) -> int:
    return x.shape[0] * _padded(x.shape[1]) * prod(x.shape[2:]) * x.itemsize


def _padded(channels: int) -> int:
    return -(-channels // _LANES) * _LANES


def _sums(args: tuple[Any, ...], out: Tensor) -> int:
    """The logarithms of attention's sums, float32, which the kernels for CUDA hand out."""
    queries: Tensor = args[0]
    return 4 * prod(queries.shape[:-1])


_ATEN = torch.ops.aten
ON_CPU: Workspaces = {
    _ATEN.conv2d.default: _convolution,
    _ATEN.conv2d.padding: _convolution,
    _ATEN.convolution.default: _convolution,
    _ATEN.scaled_dot_product_attention.default: _attention,
    _ATEN.upsample_nearest2d.default: _upsampling,
    _ATEN.upsample_nearest2d.vec: _upsampling,
}
ON_CUDA: Workspaces = {_ATEN.scaled_dot_product_attention.default: _sums}
"""cuDNN's workspaces are not among them: which algorithm it takes, and what that needs, it alone knows."""
