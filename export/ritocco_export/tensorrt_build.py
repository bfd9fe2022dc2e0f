"""Engines from graphs, by TensorRT's builder or that of TensorRT for RTX.

The former times kernels on the GPU that it finds; the latter needs none, and builds for compute capabilities
by name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ritocco.artefacts import Artefacts
from ritocco.backends.cuda import Cuda
from ritocco.backends.engine_store import (
    EngineOptions,
    EngineStore,
    engine_key,
    target_of,
    weights_of,
)
from ritocco.backends.tensorrt_library import Library, Log, progress_monitor, tensorrt
from ritocco.disk import write_whole
from ritocco.errors import BackendError, CheckpointError, RequestError
from ritocco.nets.io import GraphName
from ritocco.shown import plain, shown

Say = Callable[[str], None]
TARGETS = ("sm75", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT for RTX 1.7 builds for."""


def build_engine(
    artefacts: Artefacts,
    graph: GraphName,
    out: Path,
    *,
    library: Library,
    options: EngineOptions,
    target: str,
    timing: Path | None = None,
    say: Say | None = None,
) -> None:
    """Build a graph's engine, one optimisation profile for each of the export's, and write it to `out`.

    target: a compute capability as `sm89` for TensorRT for RTX; empty for TensorRT, which builds for the GPU
    at hand. timing: a file of kernels timed before, read and written again. say: takes a line for every stage
    and warning.
    Raises CheckpointError for a graph that the parser does not take, BackendError for whatever else fails.
    """
    refuse_foreign(library, options)
    trt = tensorrt(library)
    log = Log(trt)
    try:
        builder = trt.Builder(log.logger)
    except (RuntimeError, TypeError) as error:  # pybind11's word for a null pointer is a TypeError
        said = log.said() or str(error)
        raise BackendError(
            f"{library}'s builder does not start: {said}. It needs an NVIDIA GPU and driver"
        ) from error
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log.logger)
    file = artefacts.graph(graph)
    if not parser.parse_from_file(str(file)):
        held = [parser.get_error(i) for i in range(parser.num_errors)]
        errors = [f"{one.node_operator()} {one.node_name()}: {one.desc()}" for one in held]
        raise CheckpointError(
            f"{file}: {library}'s parser does not take it ({plain('; '.join(errors), 300)})"
        )
    config = builder.create_builder_config()
    _configure(trt, config, library, options, target)
    for ranges in artefacts.profiles(graph):
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in artefacts.contract[graph].shapes(ranges).items():
            profile.set_shape(name, least, best, most)
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"{graph}: {library} does not take the profile {dict(ranges)}")
    if say is not None:
        monitor = progress_monitor(trt, lambda line: say(f"{graph}: {line}"))
        config.progress_monitor = monitor
    if timing is not None:
        _read_timings(config, timing)
    built = builder.build_serialized_network(network, config)
    tell = say or (lambda line: None)
    for warning in log.warnings:
        tell(f"{graph}: warning: {plain(warning, 300)}")
    if built is None:
        raise BackendError(f"{graph}: {library} can't build an engine ({plain(log.said(), 300)})")
    write_whole(out, memoryview(built))
    if timing is not None:
        _write_timings(config, timing)


def build_all(
    artefacts: Artefacts,
    *,
    library: Library,
    options: EngineOptions,
    targets: Sequence[str],
    folder: Path | None,
    say: Say,
) -> list[Path]:
    """Build the engines of all graphs for all targets into a folder (None: the cache), but those it has.

    targets: compute capabilities for TensorRT for RTX; none stands for the GPU at hand. Raises as
    `build_engine`, and RequestError for a target or an option that the library does not build for.
    """
    for target in targets:
        if library != "tensorrt-rtx" or target not in TARGETS:
            rule = f"it must be {', '.join(TARGETS)}, with tensorrt-rtx"
            message = f"--target is {shown(target)}; {rule}. TensorRT builds for the GPU at hand"
            raise RequestError(message, field="--target")
    refuse_foreign(library, options)
    version = tensorrt(library).__version__
    store = EngineStore(folder)
    if not store.kept:
        raise BackendError("the cache can't be written: name --out, or set RITOCCO_CACHE to another folder")
    files = []
    for target in targets or [_present(library, options)]:
        for graph in artefacts.contract:
            key = engine_key(
                artefacts,
                graph,
                options,
                library=library,
                version=version,
                target=target,
                structure=structure(artefacts.graph(graph)) if options.refit else None,
            )
            if store.find(key) is None:
                say(f"{graph}: building for {target}")
                with store.written(key, weights_of(artefacts, graph)) as part:
                    build_engine(
                        artefacts,
                        graph,
                        part,
                        library=library,
                        options=options,
                        target=target if library == "tensorrt-rtx" else "",
                        timing=store.cache_file(f"timing {version} {target}")
                        if library == "tensorrt"
                        else None,
                        say=say,
                    )
            found = store.find(key)
            if found is None:
                raise BackendError(f"{graph}: the engine in {store.folder} was changed while it was written")
            files.append(found[0])
    return files


def refuse_foreign(library: Library, options: EngineOptions) -> None:
    """Raises RequestError for options that a library does not have."""
    if library == "tensorrt-rtx" and (options.hardware != "gpu" or options.version_compatible):
        raise RequestError(
            "backend_options: hardware and version_compatible are of TensorRT, not of tensorrt-rtx",
            field="backend_options",
        )


def structure(file: Path) -> str:
    """A digest of a graph without its weights: the same for every checkpoint of one shape.

    Whole numbers and single numbers count (shapes, scales); arrays of fractions are weights, of which only
    name, type and shape do.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        floating = tensor.data_type in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.BFLOAT16,
        )
        kept = f"{tensor.name} {tensor.data_type} {list(tensor.dims)}"
        if not floating or math.prod(tensor.dims) == 1:
            values = onnx.numpy_helper.to_array(tensor, base_dir=str(file.parent))
            kept += f" {values.tolist()}"
        digest.update(kept.encode())
    del model.graph.initializer[:]
    model.ClearField("metadata_props")
    digest.update(model.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _present(library: Library, options: EngineOptions) -> str:
    """The target of the GPU at hand."""
    try:
        return target_of(library, options, Cuda("auto").gpu)
    except BackendError as error:
        if library != "tensorrt-rtx":
            raise
        raise BackendError(f"{error}; without a GPU, name one to build for, as in --target sm89") from error


def _configure(trt: Any, config: Any, library: Library, options: EngineOptions, target: str) -> None:
    # float32 is float32: TensorFloat-32 has 10 bits where the parity gate is at 1e-4.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if library == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, target.upper() or "CURRENT")
        if not config.set_compute_capability(capability, 0):
            raise BackendError(f"tensorrt-rtx does not build for {target}")
        return
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    levels = trt.HardwareCompatibilityLevel
    if options.hardware == "ampere+":
        config.hardware_compatibility_level = levels.AMPERE_PLUS
    elif options.hardware == "capability":
        if not hasattr(levels, "SAME_COMPUTE_CAPABILITY"):
            raise BackendError(
                f"hardware is 'capability', which TensorRT {trt.__version__} does not have yet; 10.14 does"
            )
        config.hardware_compatibility_level = levels.SAME_COMPUTE_CAPABILITY


def _read_timings(config: Any, timing: Path) -> None:
    try:
        held = timing.read_bytes()
    except OSError:
        held = b""
    # One of another device is refused: a new one takes its place.
    if not config.set_timing_cache(config.create_timing_cache(held), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _write_timings(config: Any, timing: Path) -> None:
    try:
        write_whole(timing, memoryview(config.get_timing_cache().serialize()))
    except OSError:
        return  # the next build times again
