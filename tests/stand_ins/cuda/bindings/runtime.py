"""Stands in for `cuda.bindings.runtime`: device memory is host memory, and a stream runs at once.

Every call is written down in CALLS. What a driver would answer with an error, or a crash, is an error here:
addresses that nobody allocated, copies beyond an allocation or into a capture, work on an unknown stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

CALLS: list[tuple[Any, ...]] = []
DEVICE: dict[str, Any] = {"count": 1, "name": b"Stand-in", "major": 8, "minor": 9}
cudaStreamNonBlocking = 1  # noqa: N816 - CUDA's name

_memory: dict[int, Any] = {}
_streams: set[int] = set()
_capturing: dict[int, list[Callable[[], None]]] = {}


class cudaError_t(IntEnum):  # noqa: N801 - CUDA's name
    cudaSuccess = 0  # noqa: N815
    cudaErrorInvalidValue = 1  # noqa: N815
    cudaErrorInsufficientDriver = 35  # noqa: N815
    cudaErrorNoDevice = 100  # noqa: N815


class cudaMemcpyKind(IntEnum):  # noqa: N801
    cudaMemcpyHostToDevice = 1  # noqa: N815
    cudaMemcpyDeviceToHost = 2  # noqa: N815


class cudaStreamCaptureMode(IntEnum):  # noqa: N801
    cudaStreamCaptureModeThreadLocal = 1  # noqa: N815


OK, BAD = cudaError_t.cudaSuccess, cudaError_t.cudaErrorInvalidValue


def reset() -> None:
    """As a new process on a machine with one card."""
    CALLS.clear()
    DEVICE.update(count=1, name=b"Stand-in", major=8, minor=9)


def allocated() -> int:
    """How many allocations live."""
    return len(_memory)


def view(address: int, nbytes: int) -> Any:
    """Memory at an address. Raises AssertionError where it is not within one allocation."""
    for start, held in _memory.items():
        if start <= address and address + nbytes <= start + len(held):
            return memoryview(held).cast("B")[address - start : address - start + nbytes]
    raise AssertionError(f"{nbytes} bytes at {address:#x} were never allocated")


def enqueue(stream: int, work: Callable[[], None]) -> None:
    """For the stand-in of TensorRT: put work on a stream."""
    assert stream in _streams, f"stream {stream} does not exist"
    if stream in _capturing:
        _capturing[stream].append(work)
    else:
        work()


def cudaGetErrorString(error: cudaError_t) -> tuple[cudaError_t, bytes]:  # noqa: N802
    return OK, error.name.encode()


def cudaGetDeviceCount() -> tuple[cudaError_t, int | None]:  # noqa: N802
    if DEVICE["count"] == -2:
        raise RuntimeError("Failed to dlopen libcuda.so.1")
    if DEVICE["count"] < 0:
        return cudaError_t.cudaErrorInsufficientDriver, None
    return OK, DEVICE["count"]


def cudaGetDeviceProperties(index: int) -> tuple[cudaError_t, Any]:  # noqa: N802
    return OK, SimpleNamespace(name=DEVICE["name"], major=DEVICE["major"], minor=DEVICE["minor"])


def cudaSetDevice(index: int) -> tuple[cudaError_t]:  # noqa: N802
    return (OK if 0 <= index < DEVICE["count"] else BAD,)


def cudaMalloc(size: int) -> tuple[cudaError_t, int | None]:  # noqa: N802
    held = (ctypes.c_ubyte * size)(*b"\xff" * min(size, 64))  # begins as NaN
    address = ctypes.addressof(held)
    _memory[address] = held
    CALLS.append(("malloc", size))
    return OK, address


def cudaFree(address: int) -> tuple[cudaError_t]:  # noqa: N802
    CALLS.append(("free",))
    return (OK if _memory.pop(address, None) is not None else BAD,)


def cudaMemcpyAsync(  # noqa: N802
    target: int, source: int, count: int, kind: cudaMemcpyKind, stream: int
) -> tuple[cudaError_t]:
    if int(stream) in _capturing:
        return (BAD,)
    view(target if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source, count)
    ctypes.memmove(target, source, count)
    CALLS.append((kind.name.removeprefix("cudaMemcpy"), count))
    return (OK,)


def cudaStreamCreateWithFlags(flags: int) -> tuple[cudaError_t, int]:  # noqa: N802
    assert flags == cudaStreamNonBlocking
    stream = 1 + max(_streams, default=0)
    _streams.add(stream)
    return OK, stream


def cudaStreamDestroy(stream: int) -> tuple[cudaError_t]:  # noqa: N802
    _streams.discard(stream)
    return (OK,)


def cudaStreamSynchronize(stream: int) -> tuple[cudaError_t]:  # noqa: N802
    CALLS.append(("synchronize",))
    return (OK if stream in _streams and stream not in _capturing else BAD,)


def cudaStreamBeginCapture(stream: int, mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:  # noqa: N802
    CALLS.append(("begin capture",))
    _capturing[stream] = []
    return (OK,)


def cudaStreamEndCapture(stream: int) -> tuple[cudaError_t, Any]:  # noqa: N802
    return OK, _capturing.pop(stream)


def cudaGraphInstantiate(graph: Any, flags: int) -> tuple[cudaError_t, Any]:  # noqa: N802
    return (OK, list(graph)) if graph else (BAD, None)


def cudaGraphDestroy(graph: Any) -> tuple[cudaError_t]:  # noqa: N802
    return (OK,)


def cudaGraphExecDestroy(made: Any) -> tuple[cudaError_t]:  # noqa: N802
    CALLS.append(("destroy graph",))
    return (OK,)


def cudaGraphLaunch(made: Any, stream: int) -> tuple[cudaError_t]:  # noqa: N802
    CALLS.append(("replay",))
    for work in made:
        enqueue(stream, work)
    return (OK,)
