"""TensorRT and TensorRT for RTX through their own bindings: engines from the cache, or built into it."""

from __future__ import annotations

import logging
import math
import mmap
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ritocco.artefacts import Artefacts
from ritocco.backends.bfloat16 import from_bfloat16, to_bfloat16
from ritocco.backends.cuda import Buffer, Cuda, Graph
from ritocco.backends.engine_store import (
    EngineKey,
    EngineOptions,
    EngineStore,
    engine_key,
    target_of,
    weights_of,
)
from ritocco.backends.sessions import Arrays, SessionRuntime, refuse_other_dtype
from ritocco.backends.tensorrt_library import Library, Log, tensorrt
from ritocco.disk import write_whole
from ritocco.errors import BackendError
from ritocco.nets.io import GraphName, NetworkIO, Ranges

_log = logging.getLogger(__name__)

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}
# What the calls of a graph may be split along.
_ROWS: Mapping[GraphName, str] = {"text_encoder": "N", "unet": "M", "vae_encoder": "N", "vae_decoder": "N"}
_PLAYS_AFTER = 1  # calls with the same shapes before they are captured: TensorRT sets up lazily in the first


def open_tensorrt(
    artefacts: Artefacts, *, library: Library, device: str, dtype: str, options: EngineOptions
) -> SessionRuntime:
    """A Runtime on TensorRT. Engines that are not in the cache are built first, which takes minutes.

    device: `auto`, `cuda` or `cuda:N`. dtype: `auto`, or that of the graphs: networks are strongly typed.
    Raises BackendError, and CheckpointError for a graph that TensorRT's parser does not take.
    """
    trt = tensorrt(library)
    refuse_other_dtype(artefacts, dtype, "TensorRT")
    cuda, store = Cuda(device), EngineStore.of(options)
    opener = _Opener(trt, artefacts, library, options, cuda, store)
    sessions = {graph: opener.session(graph) for graph in artefacts.contract}
    held = refuse_other_dtype(artefacts, dtype, "TensorRT", sessions)
    notes = [f"{library} {trt.__version__} on {cuda.gpu.name}", *opener.notes]
    if not store.kept:
        notes.append("engines are not kept, as the cache can't be written: set RITOCCO_CACHE")
    runtime = SessionRuntime(
        artefacts, sessions, device=f"cuda:{cuda.index}", dtype=held, release=(opener, store), notes=notes
    )
    unet: GraphName = "unet_step" if artefacts.hoisted else "unet"
    areas = [(one["H"][::2], one["W"][::2]) for one in artefacts.profiles(unet)]
    runtime.traits = replace(runtime.traits, areas=tuple(areas))
    return runtime


def is_built(artefacts: Artefacts, *, library: Library, device: str, options: EngineOptions) -> bool:
    """Whether an engine of every graph lies in the cache, for the GPU at hand; builds and opens none."""
    store = EngineStore.of(options)
    if not store.holds("*.engine"):
        return False  # and the library is not loaded
    try:
        opener = _Opener(tensorrt(library), artefacts, library, options, Cuda(device), store)
    except BackendError:
        return False
    return all(store.find(opener.key(graph)) is not None for graph in artefacts.contract)


class _Opener:
    """Makes the sessions of one runtime. Raises BackendError where the library does not run on the GPU."""

    def __init__(
        self,
        trt: Any,
        artefacts: Artefacts,
        library: Library,
        options: EngineOptions,
        cuda: Cuda,
        store: EngineStore,
    ) -> None:
        self.trt, self.artefacts, self.library, self.options = trt, artefacts, library, options
        self.cuda, self.store = cuda, store
        self.target = target_of(library, options, cuda.gpu)
        self.log = Log(trt)
        try:
            self.runtime = trt.Runtime(self.log.logger)
        except TypeError as error:  # how its bindings say that there is none
            raise BackendError(f"{library} does not start ({self.log.said() or error})") from error
        if options.version_compatible:
            # Such an engine carries code of its own; it comes from this machine's cache or a named folder.
            self.runtime.engine_host_code_allowed = True
        self.notes: list[str] = []

    def key(self, graph: GraphName) -> EngineKey:
        structure = None
        if self.options.refit:
            from ritocco.plugins import exporter

            structure = exporter().structure(self.artefacts, graph)
        return engine_key(
            self.artefacts,
            graph,
            self.options,
            library=self.library,
            version=self.trt.__version__,
            target=self.target,
            structure=structure,
        )

    def session(self, graph: GraphName) -> TensorRtSession:
        self.log.forget()
        key = self.key(graph)
        weights = weights_of(self.artefacts, graph)
        found = self.store.find(key)
        if found is not None:
            engine = self._read(found[0])
            if engine is not None and (found[1] == weights or self._refitted(graph, engine)):
                return self._session(graph, engine, key.digest())
            self.notes.append(f"{graph}'s engine was not usable ({self.log.said()}), and is built again")
        from ritocco.plugins import exporter

        _log.info("%s: building for %s, which takes minutes, once", graph, self.cuda.gpu.name)
        timing = self.store.cache_file(f"timing {self.trt.__version__} {self.target}")
        with self.store.written(key, weights) as part:
            exporter().build_engine(
                self.artefacts,
                graph,
                part,
                library=self.library,
                options=self.options,
                target=self.target if self.library == "tensorrt-rtx" else "",
                timing=timing if self.library == "tensorrt" else None,
                say=_log.info,
            )
        # Another process may have built it at the same time, with `refit` of other weights.
        found = self.store.find(key, written=True)
        engine = None if found is None else self._read(found[0])
        if engine is None or not (found and (found[1] == weights or self._refitted(graph, engine))):
            raise BackendError(f"{graph}: {self.library} does not load what it built ({self.log.said()})")
        return self._session(graph, engine, key.digest())

    def _read(self, file: Path) -> Any:
        """The engine in a file; None where the library refuses it."""
        with (
            file.open("rb") as stream,
            closing(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)) as held,
        ):
            return self.runtime.deserialize_cuda_engine(held)

    def _refitted(self, graph: GraphName, engine: Any) -> bool:
        """Whether the engine has this checkpoint's weights now."""
        refitter = self.trt.Refitter(engine, self.log.logger)
        parser = self.trt.OnnxParserRefitter(refitter, self.log.logger)
        return bool(parser.refit_from_file(str(self.artefacts.graph(graph))) and refitter.refit_cuda_engine())

    def _session(self, graph: GraphName, engine: Any, digest: str) -> TensorRtSession:
        kernels = None
        if self.library == "tensorrt-rtx":
            config = engine.create_runtime_config()
            if self.options.cuda_graph:
                config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            kernels = _KernelCache(config, self.store.cache_file(f"kernels {digest} {self.cuda.gpu.name}"))
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise BackendError(f"{graph}: no memory to run its engine ({self.log.said()})")
        return TensorRtSession(
            self.trt,
            engine,
            context,
            self.cuda,
            graph=graph,
            io=self.artefacts.contract[graph],
            profiles=self.artefacts.profiles(graph),
            replays=self.options.cuda_graph and kernels is None,
            kernels=kernels,
        )


class _KernelCache:
    """What TensorRT for RTX compiled on this machine: read at start, written when there is more of it."""

    def __init__(self, config: Any, file: Path) -> None:
        self._cache, self._file = config.create_runtime_cache(), file
        self._nbytes = 0
        try:
            held = file.read_bytes()
        except OSError:
            held = b""
        if held and self._cache.deserialize(held):  # it refuses those of other drivers and GPUs
            self._nbytes = len(held)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        data = memoryview(self._cache.serialize())
        if data.nbytes == self._nbytes:
            return
        try:
            write_whole(self._file, data)
        except OSError:
            return  # the next start compiles again
        self._nbytes = data.nbytes


class TensorRtSession:
    """See `Session`. Rows beyond the most of a profile go in several calls, but those of a hoisted UNet: it
    is given no more than its profile takes.

    Device buffers grow to the largest call and stay; a read-only array that an input had in the call before
    is not copied again. With `replays`, calls whose shapes are those of the call before are replayed from a
    CUDA graph.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        context: Any,
        cuda: Cuda,
        *,
        graph: GraphName,
        io: NetworkIO,
        profiles: Sequence[Ranges],
        replays: bool,
        kernels: _KernelCache | None,
    ) -> None:
        self._engine, self._context, self._cuda = engine, context, cuda  # the engine must outlive its context
        self._graph, self._io, self._profiles = graph, io, profiles
        self._replays, self._kernels = replays, kernels
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._types = {name: _DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in inputs]
        # NumPy has no bfloat16: it is made of float32 here.
        self.dtypes: Mapping[str, str] = {
            name: "float32" if self._types[name] == "bfloat16" else self._types[name] for name in inputs
        }
        self.ranks: Mapping[str, int] = {name: len(tuple(engine.get_tensor_shape(name))) for name in inputs}
        self.outputs: Sequence[Collection[str]] = [{name} for name in self._outputs]
        self._buffers: dict[str, Buffer] = {}
        self._sources: dict[str, npt.NDArray[Any]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._profile = 0
        self._state: tuple[int, tuple[tuple[int, ...], ...]] | None = None
        self._calls = 0
        self._replayed: Graph | None = None

    def run(self, feeds: Arrays) -> npt.NDArray[Any]:
        """See `Session`. Raises BackendError for a size that is in none of the profiles."""
        return self.run_all(feeds)[self._outputs[0]]

    def run_all(self, feeds: Arrays) -> Arrays:
        """See `Session`. Raises as `run`."""
        self._cuda.use()
        rows = _ROWS.get(self._graph)
        index = self._choose(feeds, rows)
        if rows is None:
            return self._call(index, feeds)
        least, _, most = self._profiles[index][rows]
        batched = [port.name for port in self._io.inputs if rows in port.symbols]
        count = len(feeds[batched[0]])
        outputs = []
        for first in range(0, count, most):
            taken = min(most, count - first)
            chosen = [first + min(i, taken - 1) for i in range(max(taken, least))]
            part = {name: array[chosen] if name in batched else array for name, array in feeds.items()}
            found = self._call(index, part if len(chosen) < count else feeds)
            outputs.append({name: array[:taken] for name, array in found.items()})
        if len(outputs) == 1:
            return outputs[0]
        return {name: np.concatenate([one[name] for one in outputs]) for name in self._outputs}

    def _choose(self, feeds: Arrays, rows: str | None) -> int:
        """The profile to run in: the first that takes all rows at once, else the one that takes most."""
        sizes = self._io.sizes({name: array.shape for name, array in feeds.items()})
        fitting = [
            index
            for index, ranges in enumerate(self._profiles)
            if all(ranges[s][0] <= size <= ranges[s][2] for s, size in sizes.items() if s != rows)
        ]
        if not fitting:
            asked = " x ".join(str(sizes[symbol]) for symbol in ("H", "W") if symbol in sizes)
            raise BackendError(
                f"{self._graph}: {asked} cells is in none of the {len(self._profiles)} profiles that these "
                "graphs were exported with; export others with --profile"
            )
        if rows is None:
            return fitting[0]
        whole = [index for index in fitting if sizes[rows] <= self._profiles[index][rows][2]]
        return whole[0] if whole else max(fitting, key=lambda index: self._profiles[index][rows][2])

    def _call(self, index: int, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        state = (index, tuple(feeds[name].shape for name in self.dtypes))
        fresh = state != self._state
        if fresh:
            self._prepare(index, feeds)
            self._state, self._calls = state, 0
        uploaded = [self._upload(name, feeds[name]) for name in self.dtypes]
        if self._replayed is not None:
            self._replayed.replay()
        elif self._replays and self._calls >= _PLAYS_AFTER:
            try:
                self._replayed = self._cuda.captured(self._queue)
            except BackendError as error:
                self._replays = False
                warnings.warn(
                    f"{self._graph} runs without a CUDA graph, which its engine does not allow ({error})",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._queue()
            else:
                self._replayed.replay()
        else:
            self._queue()
        self._calls += 1
        outputs = {name: np.empty(self._shapes[name], self._held(name)) for name in self._outputs}
        for name, output in outputs.items():
            self._cuda.download(self._buffers[name], output)
        self._cuda.wait()
        del uploaded  # the copies have read it by now
        if fresh and self._kernels is not None:
            self._kernels.save()
        return {
            name: from_bfloat16(output) if self._types[name] == "bfloat16" else output
            for name, output in outputs.items()
        }

    def _upload(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """Queue the copy of an input; what is copied must live until it is done."""
        if self._sources.get(name) is array and not array.flags.writeable:
            return None
        declared = self._as_declared(name, array)
        self._cuda.upload(declared, self._buffers[name])
        self._sources[name] = array
        return declared

    def _prepare(self, index: int, feeds: Arrays) -> None:
        """Profile, shapes and addresses for calls like this one."""
        self._replayed = None  # of other shapes, and perhaps of other buffers
        self._state = None
        self._sources.clear()
        context, stream = self._context, self._cuda.stream
        if index != self._profile:
            self._checked(context.set_optimization_profile_async(index, stream), f"take profile {index}")
            self._profile = index
        self._shapes = {name: tuple(feeds[name].shape) for name in self.dtypes}
        for name, shape in self._shapes.items():
            self._checked(context.set_input_shape(name, shape), f"take {name} {shape}")
        if missing := context.infer_shapes():
            raise BackendError(f"{self._graph}: TensorRT lacks the shapes of {', '.join(missing)}")
        self._shapes |= {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
        for name, shape in self._shapes.items():
            size = math.prod(shape) * np.dtype(self._held(name)).itemsize
            if name not in self._buffers or self._buffers[name].nbytes < size:
                self._buffers.pop(name, None)  # given back before the larger one is asked for
                self._buffers[name] = self._cuda.buffer(size)
            self._checked(context.set_tensor_address(name, self._buffers[name].address), f"take {name}")

    def _held(self, name: str) -> str:
        """The dtype of a tensor's bytes, for NumPy, which has no bfloat16."""
        kind = self._types[name]
        return "uint16" if kind == "bfloat16" else kind

    def _queue(self) -> None:
        self._checked(self._context.execute_async_v3(self._cuda.stream), "run")

    def _as_declared(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self._types[name] == "bfloat16":
            return to_bfloat16(array)
        return np.ascontiguousarray(array) if array.ndim else array

    def _checked(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"{self._graph}: TensorRT could not {what}")
