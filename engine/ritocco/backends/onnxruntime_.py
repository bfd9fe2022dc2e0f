"""ONNX Runtime: sessions on its CPU, CUDA and TensorRT execution providers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ritocco.artefacts import Artefacts
from ritocco.backends.engine_store import EngineOptions, EngineStore, engine_key
from ritocco.backends.onnx_binding import DTYPES, DeviceBinding
from ritocco.backends.onnxruntime_library import onnxruntime
from ritocco.backends.sessions import Arrays, SessionRuntime, refuse_other_dtype
from ritocco.errors import BackendError, CheckpointError
from ritocco.nets.io import GraphName, NetworkIO
from ritocco.shown import said

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_RTX = "NvTensorRTRTXExecutionProvider"
_NEEDED = {
    PROVIDERS["cpu"]: "The package onnxruntime is damaged",
    PROVIDERS["cuda"]: "The package onnxruntime-gpu, its CUDA libraries and NVIDIA's driver are needed",
    PROVIDERS["tensorrt"]: "The package onnxruntime-gpu, TensorRT's libraries and NVIDIA's driver are needed",
    _RTX: "A card and driver that TensorRT for RTX runs on are needed",
}
# What it raises for a file or a graph, whatever the provider; anything else may be the provider's.
_OF_GRAPHS = {"InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile", "NotImplemented"}
_RECORD = "session.record_ep_graph_assignment_info"
_QUIET = 3  # errors only; fallbacks are checked here and not left to a warning


class OnnxSession:
    """See `Session`. notes: what the wanted provider left to others."""

    def __init__(
        self,
        file: Path,
        options: Any,
        *,
        wanted: str,
        graph: GraphName,
        providers: Sequence[Any] | None = None,
    ) -> None:
        """options: of the session. wanted: the provider that must take the graph; providers: None where
        `options` names devices. Raises CheckpointError for a graph that can't be opened, and BackendError
        where the provider fails or would not take it.
        """
        options.log_severity_level = _QUIET
        options.add_session_config_entry(_RECORD, "1")
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=providers, enable_fallback=0
            )
        except Exception as error:  # its errors share no base of their own
            if wanted == PROVIDERS["cpu"] or type(error).__name__ in _OF_GRAPHS:
                raise CheckpointError(f"{file}: ONNX Runtime can't open it ({said(error)})") from error
            raise BackendError(f"{wanted} failed at {graph} ({said(error)}). {_NEEDED[wanted]}") from error
        used = self._session.get_providers()
        taken = _nodes_by_provider(self._session)
        if used[0] != wanted or (taken and wanted not in taken):
            instead = next(iter(taken), used[0]) if used[0] == wanted else used[0]
            raise BackendError(
                f"{wanted} is wanted; ONNX Runtime fell back to {instead} for {graph}. {_NEEDED[wanted]}"
            )
        others = {name: count for name, count in taken.items() if name != wanted}
        self.notes: tuple[str, ...] = ()
        if others:
            left = ", ".join(f"{count} to {name}" for name, count in sorted(others.items()))
            self.notes = (f"{graph}: {wanted} left nodes to others: {left}",)
        self.dtypes: Mapping[str, str] = {
            port.name: DTYPES.get(port.type, port.type) for port in self._session.get_inputs()
        }
        self.ranks: Mapping[str, int] = {port.name: len(port.shape) for port in self._session.get_inputs()}
        self._outputs = [port.name for port in self._session.get_outputs()]
        self.outputs: Sequence[Collection[str]] = [{name} for name in self._outputs]
        self._binding: DeviceBinding | None = None
        self._about = f"{graph} on {wanted}"

    def bind(self, device: str, index: int, *, replayable: bool) -> None:
        """Keep inputs and outputs in a device's memory, see `DeviceBinding`."""
        self._binding = DeviceBinding(self._session, device, index, replayable=replayable)

    def run(self, feeds: Arrays) -> npt.NDArray[Any]:
        """See `Session`."""
        return self._run(feeds, self._outputs[:1])[0]

    def run_all(self, feeds: Arrays) -> Arrays:
        """See `Session`."""
        return dict(zip(self._outputs, self._run(feeds, self._outputs), strict=True))

    def _run(self, feeds: Arrays, outputs: Sequence[str]) -> Sequence[npt.NDArray[Any]]:
        try:
            if self._binding is not None:
                return self._binding.run(feeds)
            found: Sequence[npt.NDArray[Any]] = self._session.run(outputs, dict(feeds))
        except Exception as error:  # its errors share no base of their own
            raise BackendError(f"{self._about}: ONNX Runtime failed ({said(error)})") from error
        return found


def open_onnxruntime(
    artefacts: Artefacts, *, device: str, dtype: str, options: EngineOptions | None = None
) -> SessionRuntime:
    """A Runtime on ONNX Runtime. device: `auto` takes CUDA where the installed package has it and it runs,
    else the CPU; `tensorrt` and `tensorrt:N` take its TensorRT provider, whose engines are kept in the cache.

    dtype: `auto`, or the dtype of the graphs, in which they are computed. options: of TensorRT.
    Raises BackendError and CheckpointError.
    """
    available = onnxruntime.get_available_providers()
    if device == "auto":
        if PROVIDERS["cuda"] not in available:
            return open_onnxruntime(artefacts, device="cpu", dtype=dtype, options=options)
        try:
            return open_onnxruntime(artefacts, device="cuda:0", dtype=dtype, options=options)
        except (BackendError, CheckpointError) as error:
            runtime = open_onnxruntime(artefacts, device="cpu", dtype=dtype, options=options)
            runtime.notes += (f"not on cuda:0 ({error})",)
            return runtime
    refuse_device(device, with_options=options is not None)
    kind, _, index = device.partition(":")
    held = refuse_other_dtype(artefacts, dtype, "ONNX Runtime")
    if held == "bfloat16":
        raise BackendError(
            "bfloat16 graphs don't run on ONNX Runtime here, whose arrays are NumPy's; export with --dtype "
            "fp32 or fp16, or use the backend openvino or TensorRT's bindings"
        )
    store = EngineStore() if kind == "tensorrt" else None
    sessions = {}
    for graph in artefacts.contract:
        if kind == "cuda":
            sessions[graph] = _on_cuda(artefacts, graph, int(index or 0))
            continue
        providers: list[Any] = [PROVIDERS[kind]]
        if store is not None:
            given = tensorrt_options(artefacts, graph, options or EngineOptions(), store, index or "0")
            providers = [(PROVIDERS[kind], given), (PROVIDERS["cuda"], {"device_id": index or "0"})]
        sessions[graph] = _opened(artefacts, graph, PROVIDERS[kind], providers)
        if store is not None:
            sessions[graph].bind("cuda", int(index or 0), replayable=False)
    held = refuse_other_dtype(artefacts, dtype, "ONNX Runtime", sessions)
    notes = [note for session in sessions.values() for note in session.notes]
    if store is not None:
        device = f"cuda:{index or 0}"
        notes.insert(0, "ONNX Runtime's TensorRT provider")
    return SessionRuntime(artefacts, sessions, device=device, dtype=held, release=(store,), notes=notes)


def refuse_device(device: str, *, with_options: bool) -> None:
    """Raises BackendError for a device that the installed ONNX Runtime has no provider for, and for options
    anywhere but on TensorRT's.
    """
    kind = device.partition(":")[0]
    if kind not in ("auto", *PROVIDERS):
        raise BackendError(
            f"device is {device!r}; ONNX Runtime runs here on cpu, cuda and cuda:N, tensorrt and tensorrt:N"
        )
    if with_options and kind != "tensorrt":
        raise BackendError("backend_options are for TensorRT; name the device tensorrt")
    if kind != "auto" and PROVIDERS[kind] not in onnxruntime.get_available_providers():
        raise BackendError(
            f"device is {device!r}; the installed ONNX Runtime has no {PROVIDERS[kind]}. Install "
            '"ritocco[gpu]" in an environment without the package onnxruntime: the two exclude each other'
        )


def _opened(artefacts: Artefacts, graph: GraphName, wanted: str, providers: Sequence[Any]) -> OnnxSession:
    options = onnxruntime.SessionOptions()
    return OnnxSession(artefacts.graph(graph), options, wanted=wanted, graph=graph, providers=providers)


def _on_cuda(artefacts: Artefacts, graph: GraphName, index: int) -> OnnxSession:
    """On CUDA's provider, with inputs kept on the device; a graph of one size is replayed as a CUDA graph.

    The provider refuses to capture a graph of which a node runs elsewhere: it then runs as any other.
    """
    io, wanted, note = artefacts.contract[graph], PROVIDERS["cuda"], ""
    given = {"device_id": str(index), "cudnn_conv_algo_search": "HEURISTIC"}
    if not io.shapes(io.ranges):
        try:
            session = _opened(artefacts, graph, wanted, [(wanted, {**given, "enable_cuda_graph": "1"})])
        except (BackendError, CheckpointError) as error:
            note = f"{graph}: runs without a CUDA graph ({error})"
        else:
            session.bind("cuda", index, replayable=True)
            return session
    session = _opened(artefacts, graph, wanted, [(wanted, given)])
    session.bind("cuda", index, replayable=False)
    session.notes += (note,) if note else ()
    return session


def tensorrt_options(
    artefacts: Artefacts, graph: GraphName, options: EngineOptions, store: EngineStore, index: str
) -> dict[str, str]:
    """What ONNX Runtime's TensorRT provider is told of a graph.

    [onnxruntime.ai, TensorRT Execution Provider, configurations]
    """
    if options.refit or options.version_compatible or options.hardware == "capability":
        raise BackendError(
            "ONNX Runtime's TensorRT provider has no refit, version_compatible or hardware 'capability'; the "
            "backend tensorrt has"
        )
    io = artefacts.contract[graph]
    key = engine_key(
        artefacts,
        graph,
        options,
        library="tensorrt",
        version=f"in onnxruntime {onnxruntime.__version__}",
        target=f"tensorrt:{index}",
    )
    folder = store.folder / f"{key.digest()}.onnxruntime"
    folder.mkdir(exist_ok=True)
    dtype = artefacts.contract["vae_decoder"].inputs[0].dtype
    given = {
        "device_id": index,
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(store.folder),
        # It builds weakly typed networks: without these, arithmetic is float32.
        "trt_fp16_enable": str(dtype == "float16"),
        "trt_engine_hw_compatible": str(options.hardware == "ampere+"),
        "trt_cuda_graph_enable": "False",  # it replays addresses, which change with every array from the host
        **profile_options(io, "trt"),
    }
    if options.level is not None:
        given["trt_builder_optimization_level"] = str(options.level)
    if options.workspace_bytes is not None:
        given["trt_max_workspace_size"] = str(options.workspace_bytes)
    return given


def profile_options(io: NetworkIO, prefix: str) -> dict[str, str]:
    """Smallest, best and largest shapes for a provider of ONNX Runtime, of all profiles as one.

    prefix: `trt` or `nv`. Nothing for a graph of one size.
    """
    shapes = io.shapes(io.ranges)
    if not shapes:
        return {}
    return {
        f"{prefix}_profile_{kind}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, held[i]))}" for name, held in shapes.items()
        )
        for i, kind in enumerate(("min", "opt", "max"))
    }


def _nodes_by_provider(session: Any) -> dict[str, int]:
    """How many nodes each provider took; empty where this ONNX Runtime does not tell (before 1.24)."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    taken: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        taken[part.ep_name] += len(part.get_nodes())
    return dict(taken)
