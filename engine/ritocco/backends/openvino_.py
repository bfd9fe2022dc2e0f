"""OpenVINO: compiled models on a CPU, in bfloat16 where the processor computes it natively."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import openvino

from ritocco.artefacts import Artefacts
from ritocco.backends.bfloat16 import from_bfloat16, to_bfloat16
from ritocco.backends.sessions import Arrays, SessionRuntime
from ritocco.disk import cache_root, sweep
from ritocco.errors import BackendError, CheckpointError
from ritocco.shown import said

_KEPT_DAYS = 30
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
_DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32"}


class OpenVinoSession:
    """See `Session`."""

    def __init__(self, core: openvino.Core, file: Path, precision: str) -> None:
        """precision: `f32` or `bf16`. Raises CheckpointError for a graph that can't be compiled."""
        if any(one.is_symlink() for one in file.parent.iterdir() if one.suffix not in (".onnx", ".json")):
            raise CheckpointError(
                f"{file}: OpenVINO does not follow links to weights, as a cache of downloads has them; copy "
                "the folder with `cp -rL` and name the copy"
            )
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        try:
            compiled = core.compile_model(str(file), "CPU", options)
        except RuntimeError as error:
            raise CheckpointError(f"{file}: OpenVINO can't compile it ({said(error)})") from error
        self._request = compiled.create_infer_request()
        self._about = f"{file.parent.name} on CPU"
        types = {port.get_any_name(): port.element_type.get_type_name() for port in compiled.inputs}
        # NumPy has no bfloat16: it is made of float32 here.
        self._narrow = {name for name, held in types.items() if held == "bf16"}
        self.dtypes: Mapping[str, str] = {name: _DTYPES.get(held, "float32") for name, held in types.items()}
        self.ranks: Mapping[str, int] = {
            port.get_any_name(): port.partial_shape.rank.get_length() for port in compiled.inputs
        }
        self._outputs = [port.get_any_name() for port in compiled.outputs]
        self.outputs: Sequence[Collection[str]] = [port.get_names() for port in compiled.outputs]

    def run(self, feeds: Arrays) -> npt.NDArray[Any]:
        """See `Session`."""
        self._infer(feeds)
        return _taken(self._request.get_output_tensor(0))

    def run_all(self, feeds: Arrays) -> Arrays:
        """See `Session`."""
        self._infer(feeds)
        tensors = ((name, self._request.get_output_tensor(i)) for i, name in enumerate(self._outputs))
        return {name: _taken(tensor) for name, tensor in tensors}

    def _infer(self, feeds: Arrays) -> None:
        given = {name: _narrowed(one) if name in self._narrow else one for name, one in feeds.items()}
        try:
            self._request.infer(given, share_inputs=True)
        except RuntimeError as error:
            raise BackendError(f"{self._about}: OpenVINO failed ({said(error)})") from error


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
    core = openvino.Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == "auto":
        dtype = "bfloat16" if "BF16" in able else "float32"
    if dtype == "bfloat16" and "BF16" not in able:
        raise BackendError("dtype is 'bfloat16', which this processor does not compute in; float32 is")
    if dtype not in _PRECISIONS:
        raise BackendError(f"dtype is {dtype!r}; the backend openvino computes in float32 or bfloat16")
    if (cache := _cache(artefacts)) is not None:
        core.set_property({"CACHE_DIR": str(cache)})
    sessions = {
        graph: OpenVinoSession(core, artefacts.graph(graph), _PRECISIONS[dtype])
        for graph in artefacts.contract
    }
    return SessionRuntime(artefacts, sessions, device="cpu", dtype=dtype, release=(core,))


def _cache(artefacts: Artefacts) -> Path | None:
    """Where these graphs are kept as compiled; None where nothing can be written, and every start compiles.

    OpenVINO tells models apart by the graph's file, not the weights beside it, and never clears its cache:
    each set of graphs has a folder of its own here, which goes when it was not used for so long.
    """
    root = cache_root() / "openvino"
    folder = root / artefacts.identity[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError:
        return None
    sweep(root, "*", days=_KEPT_DAYS)
    return folder if os.access(folder, os.W_OK) else None
