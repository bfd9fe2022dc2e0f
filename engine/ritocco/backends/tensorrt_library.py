"""TensorRT and TensorRT for RTX: two libraries with one Python API, whichever of them is installed.

Names checked against the bindings of TensorRT 10.3, 10.14 and 11.4 and of TensorRT for RTX 1.7.1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

from ritocco.errors import BackendError

Library = Literal["tensorrt", "tensorrt-rtx"]
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""The package with ONNX Runtime's provider for TensorRT for RTX, and with the libraries of the latter."""


def tensorrt(library: Library) -> Any:
    """The module of a library. Raises BackendError where it is not installed or can't be loaded."""
    try:
        return importlib.import_module("tensorrt") if library == "tensorrt" else _rtx()
    except ImportError as error:
        raise BackendError(
            f"backend is {library!r}, whose Python module can't be loaded ({error}); pip install "
            f'"ritocco[{library}]"'
        ) from error


def _rtx() -> Any:
    """NVIDIA's full package, else the bindings alone, on the libraries that the provider's package brings."""
    try:
        return importlib.import_module("tensorrt_rtx")
    except ModuleNotFoundError as error:
        if error.name != "tensorrt_rtx":
            raise
    importlib.import_module(PLUGIN)  # loads the libraries that the bindings are linked with
    return importlib.import_module("tensorrt_rtx_bindings")


class Log:
    """What TensorRT said: a logger for it, and the warnings and errors that came."""

    def __init__(self, trt: Any) -> None:
        self.warnings: list[str] = []
        self.errors: list[str] = []
        severities = trt.ILogger.Severity
        wanted = {
            severities.WARNING: self.warnings,
            severities.ERROR: self.errors,
            severities.INTERNAL_ERROR: self.errors,
        }

        class Logger(trt.ILogger):  # type: ignore[misc]  # a class of a module that is found at run time
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # not super(): pybind11 wants its own constructor called

            def log(self, severity: Any, msg: str) -> None:
                if severity in wanted:
                    wanted[severity].append(msg)

        self.logger = Logger()

    def forget(self) -> None:
        """Begin anew, before work whose errors are of interest."""
        self.warnings.clear()
        self.errors.clear()

    def said(self) -> str:
        """The first error, which the others follow from, for a message; empty where there is none."""
        return self.errors[0].strip()[:300] if self.errors else ""


def progress_monitor(trt: Any, say: Callable[[str], None]) -> Any:
    """A monitor that takes a line to `say` for every phase without a parent."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                say(f"{phase_name}: {num_steps} steps")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()
