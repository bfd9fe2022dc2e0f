"""ONNX Runtime: sessions on its CPU, CUDA and TensorRT execution providers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnxruntime

from ritocco.artefacts import Artefacts
from ritocco.backends.sessions import Arrays, SessionRuntime
from ritocco.errors import BackendError, CheckpointError
from ritocco.nets.io import GraphName

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
_QUIET = 3  # errors only; fallbacks are checked here and not left to a warning


class OnnxSession:
    """See `Session`."""

    def __init__(self, artefacts: Artefacts, graph: GraphName, device: str) -> None:
        """device: `cpu`, `cuda` or `cuda:N`. Raises CheckpointError for a graph that can't be opened, and
        BackendError where the provider would not take it.
        """
        kind, _, index = device.partition(":")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        provider: Any = PROVIDERS[kind]
        if kind == "cuda":
            provider = (provider, {"device_id": index or "0", "cudnn_conv_algo_search": "HEURISTIC"})
        file = artefacts.graph(graph)
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
        except Exception as error:  # its errors share no base of their own
            raise CheckpointError(f"{file}: ONNX Runtime can't open it ({_first_line(error)})") from error
        used = self._session.get_providers()
        if used[0] != PROVIDERS[kind]:
            raise BackendError(
                f"device is {device!r}; ONNX Runtime fell back to {used[0]} for {graph}. The package "
                "onnxruntime-gpu and its CUDA libraries are needed"
            )
        self.dtypes: Mapping[str, str] = {
            port.name: _DTYPES.get(port.type, port.type) for port in self._session.get_inputs()
        }
        self._outputs = [port.name for port in self._session.get_outputs()]

    def run(self, feeds: Arrays) -> npt.NDArray[Any]:
        """See `Session`."""
        output: npt.NDArray[Any] = self._session.run(self._outputs[:1], dict(feeds))[0]
        return output

    def run_all(self, feeds: Arrays) -> Arrays:
        """See `Session`."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))


def open_onnxruntime(artefacts: Artefacts, *, device: str, dtype: str) -> SessionRuntime:
    """A Runtime on ONNX Runtime. device: `auto` takes CUDA where the installed package has it, else the CPU.

    dtype: `auto`, or the dtype of the graphs, in which they are computed.
    Raises BackendError and CheckpointError.
    """
    available = onnxruntime.get_available_providers()
    if device == "auto":
        device = "cuda:0" if PROVIDERS["cuda"] in available else "cpu"
    kind = device.partition(":")[0]
    if kind not in PROVIDERS:
        raise BackendError(f"device is {device!r}; ONNX Runtime runs here on cpu, cuda and cuda:N")
    if PROVIDERS[kind] not in available:
        raise BackendError(
            f"device is {device!r}; the installed ONNX Runtime has no {PROVIDERS[kind]}. Install "
            '"ritocco[gpu]" in an environment without the package onnxruntime: the two exclude each other'
        )
    held = artefacts.contract["text_encoder"].outputs[0].dtype
    if dtype not in ("auto", held):
        raise BackendError(f"dtype is {dtype!r}; these graphs are {held}, and ONNX Runtime computes in that")
    if kind == "cpu" and held == "bfloat16":
        raise BackendError("bfloat16 graphs don't run on ONNX Runtime's CPU; export with --dtype float32")
    sessions = {graph: OnnxSession(artefacts, graph, device) for graph in artefacts.contract}
    return SessionRuntime(artefacts, sessions, device=device, dtype=held)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
