"""`predict` inside Triton Inference Server: a model of its Python backend that calls the networks beside it.

Each network is a model of its own, which `ritocco export --triton` wrote; calls go through Triton's
queues, and may share a batch with those of other requests there. Untested on a Triton server.
[triton-inference-server/python_backend, "Business Logic Scripting"]
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ritocco.artefacts import Artefacts, open_artefacts
from ritocco.backends.sessions import SessionRuntime
from ritocco.engine import Engine
from ritocco.errors import BackendError, RequestError, RitoccoError
from ritocco.fetch import Fetcher
from ritocco.nets.io import GraphName, NetworkIO, Ranges
from ritocco.scheduler_config import from_pipeline
from ritocco.schema import PredictionInput
from ritocco.shown import shown

GRAPHS = "graphs"
"""The folder beside this model that says what the graphs are."""
PREFIX = "ritocco_"
"""Of the networks' names."""
OPTIONS = "options"
"""The input that takes ours as JSON, as `ritocco` does in a request by HTTP."""
OUTPUTS = ("output", "prediction")


class TritonSession:
    """See `Session`. Calls a model beside this one; arrays go through the host's memory."""

    def __init__(self, utils: Any, name: str, io: NetworkIO, *, batched: bool) -> None:
        """batched: whether Triton puts rows of several calls together; see `batch_symbol`."""
        self._utils, self._name, self._batched = utils, PREFIX + name, batched
        self.dtypes: Mapping[str, str] = {port.name: port.dtype for port in io.inputs}
        self.ranks: Mapping[str, int] = {port.name: len(port.shape) for port in io.inputs}
        self.outputs: Sequence[Collection[str]] = [{port.name} for port in io.outputs]
        self._names = [port.name for port in io.outputs]

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """See `Session`."""
        return self.run_all(feeds)[self._names[0]]

    def run_all(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """See `Session`. Raises BackendError with the other model's words."""
        utils = self._utils
        asked = utils.InferenceRequest(
            model_name=self._name,
            requested_output_names=self._names,
            inputs=[utils.Tensor(name, self._laid(array)) for name, array in feeds.items()],
            preferred_memory=utils.PreferredMemory(utils.TRITONSERVER_MEMORY_CPU),
        )
        answer = asked.exec()
        if answer.has_error():
            raise BackendError(f"{self._name}: {answer.error().message()}")
        return {name: utils.get_output_tensor_by_name(answer, name).as_numpy() for name in self._names}

    def _laid(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Numbers, one a row, have an axis of one in Triton's batches, which takes it away (`reshape`)."""
        return np.ascontiguousarray(array[:, None] if self._batched and array.ndim == 1 else array)


def batch_symbol(io: NetworkIO, ranges: Ranges) -> str | None:
    """The first axis of every input and output where it is one that moves: what Triton takes for a batch."""
    firsts = {port.shape[0] if port.shape else None for port in (*io.inputs, *io.outputs)}
    first = next(iter(firsts))
    if len(firsts) != 1 or not isinstance(first, str) or first not in ranges:
        return None
    least, _, most = ranges[first]
    return first if least < most else None


def whole_ranges(artefacts: Artefacts, graph: GraphName) -> dict[str, tuple[int, int, int]]:
    """Smallest and largest size of each symbol of all profiles, and the best of the first."""
    profiles = artefacts.profiles(graph)
    return {
        symbol: (
            min(one[symbol][0] for one in profiles),
            profiles[0][symbol][1],
            max(one[symbol][2] for one in profiles),
        )
        for symbol in artefacts.contract[graph].ranges
    }


class TritonPythonModel:
    """Triton's name for what `model.py` holds."""

    def initialize(self, args: Mapping[str, str], utils: Any = None) -> None:
        """args: of Triton: where the model lies. utils: `triton_python_backend_utils`, given by tests.

        Raises CheckpointError where what describes the graphs is damaged.
        """
        if utils is None:
            import triton_python_backend_utils as utils  # type: ignore[import-not-found,no-redef]
        self._utils = utils
        folder = Path(args["model_repository"]) / args["model_version"] / GRAPHS
        artefacts = open_artefacts(folder, graphs=False)
        sessions = {
            name: TritonSession(
                utils, name, io, batched=batch_symbol(io, whole_ranges(artefacts, name)) is not None
            )
            for name, io in artefacts.contract.items()
        }
        dtype = artefacts.contract["vae_decoder"].inputs[0].dtype
        self._engine = Engine(
            SessionRuntime(artefacts, sessions, device="triton", dtype=dtype),
            artefacts.tokenizer(),
            from_pipeline(artefacts.scheduler),
            version=artefacts.version,
            notes=("Running on Triton; exported graphs carry no safety checker, so none is run",),
            fetcher=Fetcher.from_environment(),
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """For each request its pictures as data URIs and the whole prediction as JSON, or an error."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Triton lets go of the model."""
        self._engine.close()

    def _answer(self, request: Any) -> Any:
        utils = self._utils
        try:
            prediction = self._engine.predict(self._input(request), allow_local=False)
        except RitoccoError as error:
            return utils.InferenceResponse(error=utils.TritonError(str(error)))
        if prediction.error is not None:
            return utils.InferenceResponse(error=utils.TritonError(prediction.error))
        made = (prediction.output or [], [prediction.to_json()])
        tensors = [
            utils.Tensor(name, np.array([text.encode() for text in texts], dtype=object))
            for name, texts in zip(OUTPUTS, made, strict=True)
        ]
        return utils.InferenceResponse(output_tensors=tensors)

    def _input(self, request: Any) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for name in (*PredictionInput.model_fields, OPTIONS):
            tensor = self._utils.get_input_tensor_by_name(request, name)
            if tensor is None:
                continue
            array = tensor.as_numpy()
            if array.size != 1:
                field = name if name == OPTIONS else f"input.{name}"
                rule = "it must have one element"
                raise RequestError(f"{field} is a tensor of shape {list(array.shape)}; {rule}", field=field)
            value = array.reshape(-1)[0]
            given[name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value.item()
        if (options := given.pop(OPTIONS, None)) is not None:
            given["ritocco"] = _parsed(options)
        return given


def _parsed(options: str) -> Any:
    try:
        return json.loads(options)
    except ValueError as error:  # a number of thousands of digits too
        raise RequestError(f"{OPTIONS} is {shown(options)}; it must be JSON", field=OPTIONS) from error
    except RecursionError as error:
        rule = "it must be JSON that is nested less deeply"
        raise RequestError(f"{OPTIONS} is {shown(options)}; {rule}", field=OPTIONS) from error
