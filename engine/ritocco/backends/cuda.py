"""Device memory, a stream and graph replay, over NVIDIA's `cuda-bindings`.

Not over torch: exported graphs start without it, and the torch beside them is often a CPU build, while these
bindings are a few megabytes and bring no CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ritocco.errors import BackendError


def driver_here() -> bool:
    """Whether NVIDIA's driver can be loaded; asks it nothing."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """name: as the driver has it. capability: of its compute units, 89 for 8.9."""

    name: str
    capability: int


class Cuda:
    """One GPU and one stream on it. Raises BackendError wherever the driver refuses."""

    def __init__(self, device: str) -> None:
        """device: `auto`, `cuda` or `cuda:N`."""
        kind, _, index = device.partition(":")
        if kind not in ("auto", "cuda") or (index and not index.isdecimal()):
            raise BackendError(f"device is {device!r}; TensorRT runs on cuda and cuda:N")
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise BackendError(
                f"TensorRT needs the package cuda-bindings ({error}); pip install cuda-bindings"
            ) from error
        self._runtime = runtime
        try:
            looked = runtime.cudaGetDeviceCount()
        except RuntimeError as error:  # a version of the bindings where there is no driver's library
            raise BackendError(f"CUDA could not look for GPUs: {error}") from error
        count = self._checked("look for GPUs", *looked)
        self.index = int(index or 0)
        if self.index >= count:
            raise BackendError(f"device is {device!r}; the driver sees {count} CUDA devices, from cuda:0 on")
        about = self._checked("ask for the GPU", *runtime.cudaGetDeviceProperties(self.index))
        name = about.name.decode() if isinstance(about.name, bytes) else str(about.name)
        self.gpu = Gpu(name=name.strip("\0"), capability=10 * about.major + about.minor)
        self.use()
        # Not the default stream, on which nothing can be captured.
        flags = runtime.cudaStreamNonBlocking
        self._stream = self._checked("make a stream", *runtime.cudaStreamCreateWithFlags(flags))
        self.stream = int(self._stream)
        weakref.finalize(self, runtime.cudaStreamDestroy, self._stream)

    def use(self) -> None:
        """Make this GPU the calling thread's."""
        self._checked("take the GPU", *self._runtime.cudaSetDevice(self.index))

    def buffer(self, nbytes: int) -> Buffer:
        """Device memory, given back when the last reference to it goes."""
        size = max(nbytes, 1)
        address = self._checked(f"allocate {size} bytes", *self._runtime.cudaMalloc(size))
        return Buffer(int(address), size, self._runtime.cudaFree)

    def upload(self, array: npt.NDArray[Any], buffer: Buffer) -> None:
        """Queue a copy of a contiguous array to the device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(buffer.address, array.ctypes.data, array.nbytes, kind)

    def download(self, buffer: Buffer, array: npt.NDArray[Any]) -> None:
        """Queue a copy from the device into a contiguous array."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, buffer.address, array.nbytes, kind)

    def wait(self) -> None:
        """Until everything queued is done."""
        self._checked("run", *self._runtime.cudaStreamSynchronize(self._stream))

    def captured(self, queue: Callable[[], None]) -> Graph:
        """What `queue` puts on the stream, to be replayed; it is not run now."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._checked("capture a graph", *runtime.cudaStreamBeginCapture(self._stream, mode))
        try:
            queue()
        finally:
            ended = runtime.cudaStreamEndCapture(self._stream)
        drawn = self._checked("capture a graph", *ended)
        made = self._checked("instantiate a graph", *runtime.cudaGraphInstantiate(drawn, 0))
        runtime.cudaGraphDestroy(drawn)
        return Graph(made, self._replay, runtime.cudaGraphExecDestroy)

    def _replay(self, made: Any) -> None:
        self._checked("replay a graph", *self._runtime.cudaGraphLaunch(made, self._stream))

    def _copy(self, target: int, source: int, nbytes: int, kind: Any) -> None:
        result = self._runtime.cudaMemcpyAsync(target, source, nbytes, kind, self._stream)
        self._checked(f"copy {nbytes} bytes", *result)

    def _checked(self, what: str, status: Any, *values: Any) -> Any:
        """The value of a call. Raises BackendError where it failed."""
        if int(status) != 0:
            _, words = self._runtime.cudaGetErrorString(status)
            said = words.decode() if isinstance(words, bytes) else str(words)
            raise BackendError(f"CUDA could not {what}: {said} (error {int(status)})")
        return values[0] if values else None


class Buffer:
    """Device memory. address, nbytes: where and how much."""

    def __init__(self, address: int, nbytes: int, free: Callable[[int], object]) -> None:
        self.address, self.nbytes = address, nbytes
        weakref.finalize(self, free, address)


class Graph:
    """A captured sequence of work."""

    def __init__(self, made: Any, launch: Callable[[Any], None], destroy: Callable[[Any], object]) -> None:
        self._made, self._launch = made, launch
        weakref.finalize(self, destroy, made)

    def replay(self) -> None:
        """Queue it."""
        self._launch(self._made)
