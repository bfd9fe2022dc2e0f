"""TensorRT for RTX as a provider of ONNX Runtime: a package from the index, compiled graphs in the cache.

Options: tensorrt_rtx_provider_options.h in the package onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5;
`ep.context_*`: ONNX Runtime's design of context models (docs/execution-providers/EP-Context-Design).
"""

from __future__ import annotations

import importlib
import json
import logging
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ritocco.artefacts import Artefacts, file_digest
from ritocco.backends.engine_store import EngineKey, EngineOptions, EngineStore, engine_key
from ritocco.backends.onnxruntime_ import OnnxSession, profile_options
from ritocco.backends.onnxruntime_library import onnxruntime
from ritocco.backends.sessions import SessionRuntime, refuse_other_dtype
from ritocco.backends.tensorrt_library import PLUGIN
from ritocco.errors import BackendError, CheckpointError
from ritocco.nets.io import GraphName

_log = logging.getLogger(__name__)

_MODEL, _ABOUT, _KEPT = "model.onnx", "about.json", ".context"
_BINDINGS_ONLY = ("hardware", "version_compatible", "refit", "level", "cuda_graph", "engines")
_DEFAULT = EngineOptions()
_registered: set[str] = set()


def open_provider(artefacts: Artefacts, *, device: str, dtype: str, options: EngineOptions) -> SessionRuntime:
    """A Runtime on the provider. Each graph is compiled once and kept, for one card and version.

    device: `auto`, `cuda` or `cuda:N`, the N-th card that the provider takes. One optimisation profile covers
    all that the graphs were exported with.
    Raises BackendError where the provider is not installed, or finds no driver or no card that it runs on.
    """
    held = refuse_other_dtype(artefacts, dtype, "TensorRT for RTX")
    if held == "bfloat16":
        raise BackendError(
            "bfloat16 graphs don't run on ONNX Runtime's provider for TensorRT for RTX here, as its arrays "
            "are NumPy's: use its bindings, backend_options via 'bindings'"
        )
    if unused := [name for name in _BINDINGS_ONLY if getattr(options, name) != getattr(_DEFAULT, name)]:
        raise BackendError(
            f"backend_options has {', '.join(unused)}, which ONNX Runtime's provider for TensorRT for RTX "
            "does not have; its bindings (via 'bindings') do, or the backend tensorrt"
        )
    plugin, card, place = _card(device)
    store = EngineStore.of(options)
    maker = _Maker(artefacts, plugin, card, options, store)
    sessions = {graph: maker.session(graph) for graph in artefacts.contract}
    held = refuse_other_dtype(artefacts, dtype, "TensorRT for RTX", sessions)
    if not store.kept:
        maker.notes.append("compiled graphs are not kept, as the cache can't be written: set RITOCCO_CACHE")
    return SessionRuntime(
        artefacts, sessions, device=f"cuda:{place}", dtype=held, release=(store,), notes=maker.notes
    )


def is_compiled(artefacts: Artefacts, *, device: str, options: EngineOptions) -> bool:
    """Whether every graph lies in the cache as compiled for the card at hand; compiles and opens none."""
    store = EngineStore.of(options)
    if not store.holds(f"*{_KEPT}"):
        return False  # and the provider is not loaded
    try:
        plugin, card, _ = _card(device)
    except BackendError:
        return False
    maker = _Maker(artefacts, plugin, card, options, store)
    return all(_whole(*maker.place(graph)) for graph in artefacts.contract)


def _card(device: str) -> tuple[Any, Any, int]:
    """The provider's package, the card that a device names, and its place among those that it takes."""
    plugin, cards = _cards()
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cuda") or (index and not index.isdecimal()):
        raise BackendError(f"device is {device!r}; TensorRT for RTX runs on cuda and cuda:N")
    place = int(index or 0)
    if place >= len(cards):
        raise BackendError(
            f"device is {device!r}; TensorRT for RTX takes {len(cards)} cards here, from cuda:0 on"
        )
    return plugin, cards[place], place


def _cards() -> tuple[Any, Sequence[Any]]:
    """The provider's package, and the devices that it takes; registers it once in a process."""
    try:
        plugin = importlib.import_module(PLUGIN)
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime's provider for TensorRT for RTX can't be loaded ({error}); "
            'pip install "ritocco[tensorrt-rtx]"'
        ) from error
    name = plugin.get_ep_name()
    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} takes no provider from outside; 1.31 and later do"
        )
    if name not in _registered:
        try:
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # its errors share no base of their own
            raise BackendError(_why_not(str(error))) from error
        _registered.add(name)
    cards = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not cards:
        raise BackendError(
            "TensorRT for RTX finds no card that it runs on: it takes compute capability 8.6, 8.9 and from "
            "12.0 on (GeForce RTX 30, 40 and 50 and their workstation kin). Use the backend tensorrt on "
            "other NVIDIA GPUs, openvino or onnxruntime on a CPU"
        )
    return plugin, cards


def _why_not(said: str) -> str:
    for library in ("libcuda.so", "nvcuda.dll", "libnvidia-ml.so"):
        if library in said:
            return (
                f"TensorRT for RTX needs NVIDIA's driver, and {library} is not on this machine: install the "
                "driver, or use the backend openvino or onnxruntime"
            )
    return f"ONNX Runtime does not take the provider for TensorRT for RTX ({said.strip()[:300]})"


class _Maker:
    """Makes the sessions of one runtime."""

    def __init__(
        self, artefacts: Artefacts, plugin: Any, card: Any, options: EngineOptions, store: EngineStore
    ) -> None:
        self.artefacts, self.plugin, self.card = artefacts, plugin, card
        self.options, self.store = options, store
        self.notes: list[str] = [f"ONNX Runtime's provider {plugin.__version__} for TensorRT for RTX"]

    def place(self, graph: GraphName) -> tuple[Path, EngineKey]:
        """Where a graph is kept as compiled, and its key."""
        about = self.card.device
        key = engine_key(
            self.artefacts,
            graph,
            self.options,
            library="tensorrt-rtx",
            version=f"{self.plugin.__version__} in onnxruntime {onnxruntime.__version__}",
            target=f"{about.vendor} {about.device_id}",
        )
        return self.store.folder / f"{key.digest()}{_KEPT}", key

    def session(self, graph: GraphName) -> OnnxSession:
        folder, key = self.place(graph)
        if _whole(folder, key):
            try:
                return self._open(graph, folder / _MODEL)
            except (BackendError, CheckpointError) as error:
                self.notes.append(f"{graph}'s compiled graph was not usable ({error}), and is made again")
        return self._compiled(graph, key, folder)

    def _compiled(self, graph: GraphName, key: EngineKey, folder: Path) -> OnnxSession:
        part = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")
        part.mkdir()
        _log.info("%s: compiling for TensorRT for RTX, once", graph)
        try:
            # Not embedded: a protobuf ends at 2 GB.
            context = {"enable": "1", "file_path": str(part / _MODEL), "embed_mode": "0"}
            entries = {f"ep.context_{name}": value for name, value in context.items()}
            session = self._open(graph, self.artefacts.graph(graph), entries)
            if (part / _MODEL).is_file():
                files = {file.name: file_digest(file) for file in sorted(part.iterdir())}
                text = json.dumps({"key": key.as_json(), "files": files}, indent=2, sort_keys=True)
                (part / _ABOUT).write_text(text, encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
            else:
                self.notes.append(f"{graph}: ONNX Runtime kept no compiled graph; every start compiles again")
            return session
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _open(self, graph: GraphName, file: Path, entries: dict[str, str] | None = None) -> OnnxSession:
        options = onnxruntime.SessionOptions()
        for name, value in (entries or {}).items():
            options.add_session_config_entry(name, value)
        given = profile_options(self.artefacts.contract[graph], "nv")
        given["nv_runtime_cache_path"] = str(self.store.folder / "kernels")
        if self.options.workspace_bytes is not None:
            given["nv_max_workspace_size"] = str(self.options.workspace_bytes)
        options.add_provider_for_devices([self.card], given)
        session = OnnxSession(file, options, wanted=self.plugin.get_ep_name(), graph=graph)
        self.notes += session.notes
        return session


def _whole(folder: Path, key: EngineKey) -> bool:
    with suppress(OSError, ValueError, TypeError, KeyError):
        held = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        found = {file.name: file_digest(file) for file in folder.iterdir() if file.name != _ABOUT}
        return bool(held["key"] == key.as_json() and held["files"] == found)
    return False
