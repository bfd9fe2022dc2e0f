"""ONNX Runtime's calls for devices and providers, stood in for; ONNX Runtime itself computes, on its CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime

from ritocco.backends.onnxruntime_ import PROVIDERS

RTX = "NvTensorRTRTXExecutionProvider"


class Options:
    """Of a session."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.devices: list[Any] = []
        self.given: dict[str, str] = {}
        self.log_severity_level = 2

    def add_session_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value

    def add_provider_for_devices(self, devices: list[Any], given: dict[str, str]) -> None:
        self.devices, self.given = devices, given


class Ort:
    """ONNX Runtime with providers for GPUs; `left` nodes of each graph go to the CPU. broken: what is said at
    every session by providers that do not start.
    """

    __version__ = "1.32.0"

    def __init__(self, cards: int = 1) -> None:
        self.cards = cards
        self.registered: list[tuple[str, str]] = []
        self.opened: list[tuple[Path, Options, Any]] = []
        self.refused = ""
        self.left = 0
        self.fallback = False
        self.damaged = False
        self.captures = True
        self.broken = ""

    SessionOptions = Options

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if self.refused:
            raise RuntimeError(self.refused)
        self.registered.append((name, path))

    def get_ep_devices(self) -> list[Any]:
        assert self.registered, "asked for devices before the provider was registered"
        about = SimpleNamespace(vendor="NVIDIA", device_id=9876)
        cpu = SimpleNamespace(ep_name="CPUExecutionProvider", device=about)
        return [cpu, *(SimpleNamespace(ep_name=RTX, device=about, place=i) for i in range(self.cards))]

    def get_available_providers(self) -> list[str]:
        return list(PROVIDERS.values())

    def InferenceSession(  # noqa: N802
        self, path: str, options: Options, providers: Any = None, *, enable_fallback: int = 1
    ) -> Any:
        assert not enable_fallback, "a failing run would go on elsewhere, and print so"
        self.opened.append((Path(path), options, providers))
        first = None if providers is None else providers[0]
        wanted = RTX if first is None else first if isinstance(first, str) else first[0]
        if self.broken and wanted != "CPUExecutionProvider":
            raise RuntimeError(self.broken)
        if self.damaged and "context" in path:
            raise RuntimeError("the context is of another driver")
        if not self.captures and providers and providers[0][1].get("enable_cuda_graph"):
            raise RuntimeError("This session cannot use the graph capture feature")
        real = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        if options.entries.get("ep.context_enable") == "1":
            for file in Path(path).parent.glob("model.*"):  # weights may lie beside the graph
                shutil.copyfile(file, Path(options.entries["ep.context_file_path"]).with_name(file.name))
        used = ["CPUExecutionProvider"] if self.fallback else [wanted, "CPUExecutionProvider"]
        taken = {used[0]: 10} | ({"CPUExecutionProvider": self.left} if self.left else {})
        parts = [SimpleNamespace(ep_name=name, get_nodes=lambda n=n: [None] * n) for name, n in taken.items()]
        return SimpleNamespace(
            get_providers=lambda: used,
            get_provider_graph_assignment_info=lambda: parts,
            get_inputs=real.get_inputs,
            get_outputs=real.get_outputs,
            run=real.run,
            io_binding=real.io_binding,
            run_with_iobinding=real.run_with_iobinding,
        )
