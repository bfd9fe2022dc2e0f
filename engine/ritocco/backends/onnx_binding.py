"""Inputs and outputs of an ONNX Runtime session, kept in a device's memory from call to call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ritocco.backends.onnxruntime_library import onnxruntime

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
"""How NumPy names the dtypes of ONNX Runtime's ports."""


class DeviceBinding:
    """Device memory is allocated when a shape is first seen. A read-only array that an input had in the call
    before is not copied again: hoisted keys and values stay where they are.

    With `replayable`, outputs lie at fixed addresses too, as ONNX Runtime's CUDA graphs need
    [onnxruntime.ai, CUDA Execution Provider, Using CUDA Graphs]; every output then has one shape.
    """

    def __init__(self, session: Any, device: str, index: int, *, replayable: bool) -> None:
        """device, index: `cuda` or `cpu`, and which of them."""
        self._session, self._device, self._index = session, device, index
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        self._sources: dict[str, npt.NDArray[Any]] = {}
        self._replayable = replayable
        for port in session.get_outputs() if replayable else ():
            self._binding.bind_ortvalue_output(port.name, self._allocated(port.shape, DTYPES[port.type]))

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """All outputs, in the session's order."""
        reshaped = [self._feed(name, array) for name, array in feeds.items()]
        if any(reshaped) and not self._replayable:
            # ONNX Runtime keeps an output's memory, and takes it to be of the shape that it had.
            self._binding.clear_binding_outputs()
            for port in self._session.get_outputs():
                self._binding.bind_output(port.name)  # brought to the host
        self._session.run_with_iobinding(self._binding)
        # Copies: on the device `cpu` they would be the very memory of the outputs.
        return [np.array(output) for output in self._binding.copy_outputs_to_cpu()]

    def _feed(self, name: str, array: npt.NDArray[Any]) -> bool:
        """Whether the input has another shape than in the call before."""
        if self._sources.get(name) is array and not array.flags.writeable:
            return False
        held = self._inputs.get(name)
        if reshaped := held is None or tuple(held.shape()) != array.shape:
            held = self._inputs[name] = self._allocated(array.shape, array.dtype)
            self._binding.bind_ortvalue_input(name, held)
        held.update_inplace(np.ascontiguousarray(array))
        self._sources[name] = array
        return reshaped

    def _allocated(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            list(shape), np.dtype(dtype).type, self._device, self._index
        )
