"""OpenVINO: compiled models on a CPU, in bfloat16 where the processor computes it natively."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ritocco.artefacts import Artefacts
from ritocco.backends.bfloat16 import from_bfloat16, to_bfloat16
from ritocco.backends.compiled_cache import seal, throw_away_unsealed
from ritocco.backends.openvino_library import openvino
from ritocco.backends.sessions import Arrays, SessionRuntime
from ritocco.disk import cache_root, sweep
from ritocco.errors import BackendError, CheckpointError
from ritocco.shown import said

_log = logging.getLogger(__name__)

# It sets the process's locale meanwhile, and back: two at once would leave another one behind.
_compiling = threading.Lock()

Shapes = Mapping[str, tuple[int, ...]]
"""Of inputs, by name."""

_KEPT_DAYS = 30
_KEPT_BYTES = 1 << 30
# Reading back what was compiled from more weights takes longer than compiling it again (2.1 and 2.2 s of
# a full-size UNet), holds its file in memory too, and writing it 7 s.
_LARGE_BYTES = 1 << 28
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
_DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32"}


class OpenVinoSession:
    """See `Session`.

    A graph of many weights is compiled when it first runs with a set of shapes, as OpenVINO fuses more where
    all are known; programs used last are kept, as many as their weights fit `_KEPT_BYTES` but two at least.
    A small one is compiled once, at load, for all shapes: at every start its programs would take longer to
    come back from the cache than they save in a few pictures.
    """

    def __init__(self, core: openvino.Core, file: Path, options: Mapping[str, str]) -> None:
        """options: of `compile_model`. Raises CheckpointError for a graph that can't be read or compiled."""
        try:
            beside = list(file.parent.iterdir())
            weights = sum(one.stat().st_size for one in beside)
        except OSError as error:
            raise CheckpointError(f"{file}: can't be read ({error})") from error
        if any(one.is_symlink() for one in beside if one.suffix not in (".onnx", ".json")):
            raise CheckpointError(
                f"{file}: OpenVINO does not follow links to weights, as a cache of downloads has them; copy "
                "the folder with `cp -rL` and name the copy"
            )
        self._core, self._options = core, dict(options)
        # Two at least: a request whose pictures go in parts may have a smaller last one.
        self._kept = max(2, _KEPT_BYTES // max(weights, 1))
        if large := weights > _LARGE_BYTES:
            self._options.pop("CACHE_DIR", None)
        self._about = f"{file.parent.name} on CPU"
        self._programs: dict[tuple[tuple[int, ...], ...], openvino.InferRequest] = {}
        try:
            with _compiling:
                # Held, so that another export that takes the folder's place does not get into its sizes.
                self._graph = core.read_model(str(file)) if large else None
                graph = self._graph or core.compile_model(str(file), "CPU", self._options)
        except RuntimeError as error:
            raise CheckpointError(f"{file}: OpenVINO can't compile it ({said(error)})") from error
        self._moving: tuple[str, ...] = ()
        if large:
            moving = (port.get_any_name() for port in graph.inputs if port.partial_shape.is_dynamic)
            self._moving = tuple(moving)
        else:
            self._programs[()] = graph.create_infer_request()
        types = {port.get_any_name(): port.element_type.get_type_name() for port in graph.inputs}
        # NumPy has no bfloat16: it is made of float32 here.
        self._narrow = {name for name, held in types.items() if held == "bf16"}
        self.dtypes: Mapping[str, str] = {name: _DTYPES.get(held, "float32") for name, held in types.items()}
        self.ranks: Mapping[str, int] = {
            port.get_any_name(): port.partial_shape.rank.get_length() for port in graph.inputs
        }
        self._outputs = [port.get_any_name() for port in graph.outputs]
        self.outputs: Sequence[Collection[str]] = [port.get_names() for port in graph.outputs]

    def run(self, feeds: Arrays) -> npt.NDArray[Any]:
        """See `Session`."""
        return _taken(self._infer(feeds).get_output_tensor(0))

    def run_all(self, feeds: Arrays) -> Arrays:
        """See `Session`."""
        request = self._infer(feeds)
        return {name: _taken(request.get_output_tensor(i)) for i, name in enumerate(self._outputs)}

    def _infer(self, feeds: Arrays) -> openvino.InferRequest:
        given = {name: _narrowed(one) if name in self._narrow else one for name, one in feeds.items()}
        try:
            request = self._program({name: feeds[name].shape for name in self._moving})
            request.infer(given, share_inputs=True)
        except RuntimeError as error:
            raise BackendError(f"{self._about}: OpenVINO failed ({said(error)})") from error
        return request

    def _program(self, shapes: Shapes) -> openvino.InferRequest:
        """The one for these shapes, the last of those that are kept."""
        key = tuple(shapes.values())
        request = self._programs.pop(key, None)
        if request is None:
            while len(self._programs) >= self._kept:  # before another takes memory
                del self._programs[next(iter(self._programs))]
            start = time.perf_counter()
            request = self._compiled(shapes).create_infer_request()
            _log.info("%s: compiled for a size, in %.2f s", self._about, time.perf_counter() - start)
        self._programs[key] = request
        return request

    def _compiled(self, shapes: Shapes) -> openvino.CompiledModel:
        assert self._graph is not None  # noqa: S101 - a small graph has its one program
        graph = self._graph.clone()
        graph.reshape({name: list(shape) for name, shape in shapes.items()})
        with _compiling:
            return self._core.compile_model(graph, "CPU", self._options)


def _narrowed(array: npt.NDArray[Any]) -> openvino.Tensor:
    bits = to_bfloat16(array)
    return openvino.Tensor(bits, openvino.Shape(bits.shape), openvino.Type.bf16)


def _taken(tensor: openvino.Tensor) -> npt.NDArray[Any]:
    """A copy: the request's own tensor is overwritten by the next call."""
    if tensor.element_type == openvino.Type.bf16:
        return from_bfloat16(tensor.data.view("uint16"))
    output: npt.NDArray[Any] = tensor.data.copy()
    return output


def open_openvino(artefacts: Artefacts, *, device: str, dtype: str) -> SessionRuntime:
    """A Runtime on OpenVINO's CPU plug-in; compiled models are kept in the cache.

    device: `auto` or `cpu`. dtype: `float32`, `bfloat16`, or `auto`, which takes bfloat16 where the processor
    has it. Raises BackendError and CheckpointError.
    """
    if device not in ("auto", "cpu"):
        raise BackendError(f"device is {device!r}; the backend openvino runs on cpu")
    try:
        core = openvino.Core()
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except RuntimeError as error:
        raise BackendError(f"OpenVINO does not start on this CPU ({said(error)})") from error
    if dtype == "auto":
        dtype = "bfloat16" if "BF16" in able else "float32"
    if dtype == "bfloat16" and "BF16" not in able:
        raise BackendError("dtype is 'bfloat16', which this processor does not compute in; float32 is")
    if dtype not in _PRECISIONS:
        raise BackendError(f"dtype is {dtype!r}; the backend openvino computes in float32 or bfloat16")
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype]}
    cache = _cache(artefacts, options["INFERENCE_PRECISION_HINT"])
    intact = None if cache is None else throw_away_unsealed(cache)
    if intact is not None:
        options["CACHE_DIR"] = str(cache)
    sessions = {graph: OpenVinoSession(core, artefacts.graph(graph), options) for graph in artefacts.contract}
    if cache is not None and intact is not None:
        seal(cache, intact)
    return SessionRuntime(artefacts, sessions, device="cpu", dtype=dtype, release=(core,))


def _cache(artefacts: Artefacts, precision: str) -> Path | None:
    """Where these graphs are kept as compiled; None where nothing can be written, and every start compiles.

    OpenVINO tells models apart by the graph's file and shapes, not by the weights beside it or the precision
    that they were compiled for (seen with 2026.4), and never clears its cache: each set of graphs has a
    folder of its own for each precision, which goes when it was not used for so long.
    """
    root = cache_root() / "openvino"
    folder = root / f"{artefacts.identity[:32]}-{precision}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError:
        return None
    sweep(root, "*", days=_KEPT_DAYS)
    return folder if os.access(folder, os.W_OK) else None
