"""Triton Inference Server, stood in for: it reads a model repository with Triton's own protobuf definitions,
holds every call against the configuration of the model that is called, and ONNX Runtime computes.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

NUMPY: dict[str, Any] = {
    "TYPE_FP32": np.float32,
    "TYPE_FP16": np.float16,
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
}
NUMPY |= {"TYPE_FP64": np.float64, "TYPE_BOOL": np.bool_, "TYPE_STRING": np.object_}


def configs(repository: Path) -> dict[str, ModelConfig]:
    """Every model's, by name; text that Triton would refuse raises ParseError."""
    found = {}
    for file in sorted(repository.glob("*/config.pbtxt")):
        found[file.parent.name] = text_format.Parse(file.read_text(encoding="utf-8"), ModelConfig())
    return found


class Tensor:
    """Of pb_utils."""

    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class Response:
    """Of pb_utils."""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: Any = None) -> None:
        self.tensors, self._error = output_tensors or [], error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Any:
        return self._error


class TritonError:
    """Of pb_utils."""

    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class Triton:
    """A server of one repository. rows: of each call, by model."""

    TRITONSERVER_MEMORY_CPU = 0

    def __init__(self, repository: Path) -> None:
        self.repository, self.configs = repository, configs(repository)
        self.rows: dict[str, list[int]] = {}
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self.Tensor, self.TritonError, self.InferenceResponse = Tensor, TritonError, Response
        self.PreferredMemory = lambda kind: kind
        self.InferenceRequest = lambda **given: SimpleNamespace(exec=lambda: self._run(**given))

    def get_output_tensor_by_name(self, response: Response, name: str) -> Tensor | None:
        return next((one for one in response.tensors if one.name() == name), None)

    def get_input_tensor_by_name(self, request: list[Tensor], name: str) -> Tensor | None:
        return next((one for one in request if one.name() == name), None)

    def request(self, model: str, **given: Any) -> list[Tensor]:
        """The inputs of a request, as Triton would hand them over, or not."""
        config, tensors = self.configs[model], []
        for held in config.input:
            if held.name in given:
                kind = NUMPY[DataType.Name(held.data_type)]
                value = given.pop(held.name)
                array = np.array([value.encode() if isinstance(value, str) else value], dtype=kind)
                tensors.append(Tensor(held.name, array))
            else:
                assert held.optional, held.name
        assert not given, f"no inputs of {model}"
        return tensors

    def _run(
        self,
        model_name: str,
        requested_output_names: list[str],
        inputs: list[Tensor],
        preferred_memory: int,
    ) -> Response:
        assert preferred_memory == self.TRITONSERVER_MEMORY_CPU
        try:
            feeds = self._feeds(self.configs[model_name], inputs)
            given = self._session(model_name).run(requested_output_names, feeds)
        except Exception as error:
            return Response(error=TritonError(f"{type(error).__name__}: {error}"))
        return Response([Tensor(n, a) for n, a in zip(requested_output_names, given, strict=True)])

    def _feeds(self, config: ModelConfig, inputs: list[Tensor]) -> dict[str, Any]:
        assert {one.name() for one in inputs} == {one.name for one in config.input}
        feeds, rows = {}, set()
        for tensor in inputs:
            held = next(one for one in config.input if one.name == tensor.name())
            array = tensor.as_numpy()
            assert array.dtype == NUMPY[DataType.Name(held.data_type)], held.name
            dims = list(array.shape)
            if config.max_batch_size:
                rows.add(dims.pop(0))
            assert len(dims) == len(held.dims), held.name
            assert all(b in (-1, a) for a, b in zip(dims, held.dims, strict=True)), held.name
            if held.HasField("reshape"):
                array = array.reshape(len(array), *held.reshape.shape)
            feeds[held.name] = array
        if config.max_batch_size:
            (count,) = rows
            assert 1 <= count <= config.max_batch_size
            self.rows.setdefault(config.name, []).append(count)
        return feeds

    def _session(self, model: str) -> onnxruntime.InferenceSession:
        if model not in self._sessions:
            file = self.repository / model / "1" / "model.onnx"
            self._sessions[model] = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return self._sessions[model]
