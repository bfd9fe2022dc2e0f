"""From a name to an engine: which model, which runtime, and the one engine behind `ritocco.predict`."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ritocco.artefacts import Artefacts, is_artefacts, open_artefacts
from ritocco.backends import (
    SESSION_BACKENDS,
    built,
    faster_command,
    faster_than_torch,
    refuse_absent,
    refuse_elsewhere,
)
from ritocco.backends.engine_store import check_options
from ritocco.backends.host_memory import LARGEST_KEPT_BYTES, keep_freed_memory
from ritocco.backends.runtime import LatentSize
from ritocco.byte_sizes import mib_down, parse_budget
from ritocco.device import check_names
from ritocco.disk import cache_root
from ritocco.engine import Engine
from ritocco.errors import BackendError, CheckpointError
from ritocco.fetch import Fetcher
from ritocco.plans import Planner, Strategy
from ritocco.prediction import Prediction
from ritocco.safety import SafetyChecker
from ritocco.schema import PredictionInput
from ritocco.shown import shown

if TYPE_CHECKING:
    import torch

    from ritocco.backends.torch_ import TorchRuntime
    from ritocco.checkpoint import Checkpoint
    from ritocco.device import Choice
    from ritocco.memory import Rehearsal
    from ritocco.parameters import Stored


_log = logging.getLogger(__name__)


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    fetcher: Fetcher | None = None,
    backend_options: Mapping[str, Any] | None = None,
    memory_budget: int | str | None = None,
) -> Engine:
    """Load a checkpoint.

    model: a diffusers folder, a single `.safetensors` file, or a folder of exported graphs; None takes
    RITOCCO_MODEL from the environment, else the embedded pocket model. device, dtype: see `device.choose`.
    backend: `torch`, `onnxruntime`, `openvino`, `tensorrt` or `tensorrt-rtx`; the last four export a
    checkpoint once, into the cache. `auto`: TensorRT where it built its engines for this checkpoint and GPU
    into the cache before; on a CPU one that is faster than torch, installed, and whose graphs of this
    checkpoint lie in the cache; else, and where these can't do what is asked, torch. variant: `fp16` and
    such, where a folder holds several. tokenizer: folder of vocab.json and merges.txt, for single files.
    backend_options: of TensorRT, see `EngineOptions`.
    fetcher: opens the URLs of requests; None makes one from the environment. memory_budget: bytes, or `8GiB`
    and such, that weights and what is computed may take of torch's memory, on torch alone; each request is
    computed in the first of `plans.strategies` that keeps to it, or refused. None: what the device has free
    less a reserve, where the largest request might not fit there otherwise; else nothing is planned, nor for
    exported graphs.
    Raises CheckpointError, BackendError, and RequestError for an option that no machine knows, or where
    RITOCCO_ALLOW_NETWORKS can't be read.
    """
    check_names(device, dtype, backend)
    check_options(backend_options)
    budget = None if memory_budget is None else parse_budget(memory_budget)
    device = "cpu" if device == "cpu:0" else device  # torch's other name of it
    path = model_path(model)
    if budget is not None and (is_artefacts(path) or backend in SESSION_BACKENDS):
        raise BackendError("memory_budget is for checkpoints on torch; exported graphs keep to none")
    if is_artefacts(path):
        if variant is not None or tokenizer is not None:
            raise CheckpointError(f"{path}: exported graphs; variant and tokenizer are for checkpoints")
        return _from_artefacts(open_artefacts(path), device, dtype, backend, fetcher, options=backend_options)
    from ritocco.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path, variant=variant, tokenizer=tokenizer)
    if backend in SESSION_BACKENDS:
        refuse_absent(backend)  # before minutes go into an export
        refuse_elsewhere(backend, device, dtype, backend_options)
        artefacts = _exported(checkpoint, **graph_options(backend, device, dtype))
        return _from_artefacts(
            artefacts, device, dtype, backend, fetcher, checkpoint, options=backend_options
        )
    if backend_options:
        raise BackendError(f"backend_options are for TensorRT; backend is {backend!r}")
    if budget is not None:
        return _engine(checkpoint, device, dtype, "torch", fetcher, budget)
    refused: list[str] = []
    for name, graphs in _before_torch(checkpoint, device, dtype) if backend == "auto" else ():
        try:
            return _from_artefacts(
                graphs, device, dtype, "auto", fetcher, checkpoint, candidates=[name], refused=refused
            )
        except (BackendError, CheckpointError) as error:
            refused.append(f"Not on {name}, though its graphs are in the cache: {error}")
            _log.warning("%s", refused[-1])
    return _engine(checkpoint, device, dtype, backend, fetcher, refused=refused)


def load_as_planned(
    model: Path,
    *,
    dtype: str,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    memory_budget: int | str | None = None,
) -> Engine:
    """As `load`, on torch and this CPU, but without a budget where none is named, however little is free.

    Raises CheckpointError, BackendError and RequestError.
    """
    from ritocco.checkpoint import open_checkpoint

    budget = None if memory_budget is None else parse_budget(memory_budget)
    checkpoint = open_checkpoint(model, variant=variant, tokenizer=tokenizer)
    return _engine(checkpoint, "cpu", dtype, "torch", None, budget, rationed=False)


def load_on_each(model: str | Path | None, devices: str, **options: Any) -> list[Engine]:
    """An engine for each device of a list with commas. options, raises: as of `load`."""
    engines: list[Engine] = []
    try:
        for name in devices.split(","):
            engines.append(load(model, device=name.strip(), **options))
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return engines


def model_path(model: str | Path | None) -> Path:
    """Where a model lies: the one named, else RITOCCO_MODEL, else the embedded one.

    Raises CheckpointError for an empty name.
    """
    if model is None:
        model = os.environ.get("RITOCCO_MODEL") or pocket_model()
    elif not isinstance(model, str | os.PathLike):
        raise CheckpointError(f"model is {shown(model)}; it must name a folder or a .safetensors file")
    elif not str(model):
        raise CheckpointError("model is ''; it must name a folder or a .safetensors file")
    return Path(model)


def from_diffusers(
    pipe: Any, *, device: str | None = None, dtype: str | None = None, fetcher: Fetcher | None = None
) -> Engine:
    """An engine from a diffusers `StableDiffusionInpaintPipeline` in memory, sharing its tensors.

    device, dtype: None takes those of the pipeline's UNet; tensors that have them are not copied, but on a
    CUDA device convolution weights that do not lie channels_last, and those of attention. fetcher: as for
    `load`.
    Raises CheckpointError where the pipeline is not one for inpainting, and BackendError.
    """
    from ritocco.checkpoint import from_diffusers as checkpoint_of

    checkpoint = checkpoint_of(pipe)
    weight = next(pipe.unet.parameters())
    return _engine(
        checkpoint,
        device or str(weight.device),
        dtype or str(weight.dtype).removeprefix("torch."),
        "torch",
        fetcher,
    )


def pocket_model() -> Path:
    """Folder of the embedded model."""
    return Path(str(files("ritocco"))) / "models" / "pocket"


def _engine(
    checkpoint: Checkpoint,
    device: str,
    dtype: str,
    backend: str,
    fetcher: Fetcher | None,
    budget: int | None = None,
    *,
    refused: Sequence[str] = (),
    rationed: bool = True,
) -> Engine:
    """An engine on torch. refused: what was tried before, and why it is not taken, for the log. rationed:
    whether what is free may give a budget where there is none.
    """
    from ritocco.backends.torch_ import TorchRuntime
    from ritocco.checkpoint import fingerprint, load_tokenizer
    from ritocco.device import choose
    from ritocco.free_memory import ample_bytes, default_budget, free_bytes
    from ritocco.parameters import without_tensors
    from ritocco.scheduler_config import check_scheduler, from_pipeline

    choice = choose(device, dtype, backend)
    if choice.device.type == "cpu" and _largest_weight_bytes(checkpoint) > LARGEST_KEPT_BYTES:
        keep_freed_memory()
    # An operator's mistake shows here, not in the first request that holds a URL.
    fetcher = fetcher or Fetcher.from_environment()
    scheduler = from_pipeline(checkpoint.scheduler)
    warnings = [f"Warning: {problem}" for problem in check_scheduler(scheduler)]
    faster = () if backend != "auto" or refused else faster_command(choice.device.type)
    safety = None
    running: list[TorchRuntime] = []
    # A pipeline's tensors are not to be kept alive by plans.
    outline = replace(checkpoint, weights=without_tensors(checkpoint.weights))
    planner = _planner(outline, choice, budget, running)
    if budget is not None:
        planner.refuse_too_little()
    elif rationed and checkpoint.path is not None:  # a pipeline's tensors are in memory already
        free = free_bytes(choice.device)
        movable = _planner(outline, choice, free, running)
        weights, captured = _weight_bytes(outline, choice.dtype), choice.device.type == "cuda"
        ample = ample_bytes(outline, weights, choice.dtype.itemsize, captured=captured)
        budget = default_budget(movable, ample, free, weights if captured else None)
        if budget is not None:
            movable.budget, planner = budget, movable
            kept = f"{mib_down(budget)} of {mib_down(free or 0)} that are free"
            warnings.append(
                f"Memory: requests keep to {kept} on {choice.device}; memory_budget= changes that"
            )
    # The tokenizer's tables are read while torch converts weights, which needs no Python.
    with ThreadPoolExecutor(1, thread_name_prefix="ritocco-tokenizer") as pool:
        tokenizer = pool.submit(load_tokenizer, checkpoint)
        runtime = TorchRuntime(
            checkpoint, device=choice.device, dtype=choice.dtype, movable=budget is not None
        )
        running.append(runtime)
        if checkpoint.safety_checker is not None:
            safety = SafetyChecker.load(checkpoint, device=choice.device, dtype=choice.dtype)
    return Engine(
        runtime,
        tokenizer.result(),
        scheduler,
        safety=safety,
        version=fingerprint(checkpoint),
        notes=(
            *checkpoint.notes,
            *warnings,
            *refused,
            f"Running {'; '.join((*choice.reasons, *runtime.notes))}",
            *faster,
        ),
        fetcher=fetcher,
        planner=planner,
    )


def _planner(outline: Checkpoint, choice: Choice, budget: int | None, running: list[TorchRuntime]) -> Planner:
    """Plans of a checkpoint on torch. running: holds the runtime, once it is there."""
    from ritocco.scheduler_config import from_pipeline

    def rehearse() -> Rehearsal:
        from ritocco.backends.fast_path import FastPath
        from ritocco.device import refuse_unplanned
        from ritocco.memory import Rehearsal

        refuse_unplanned(choice.device, choice.dtype)
        if choice.device.type == "cuda" and not FastPath.of(choice.device)[0].kernels:
            raise BackendError(
                "there are no plans of a GPU without fused kernels; the log says what they lack"
            )
        movable = budget is not None
        return Rehearsal(outline, dtype=choice.dtype, device=choice.device.type, movable=movable)

    def follow(height: int, width: int, strategy: Strategy) -> None:
        size = LatentSize(height=height // 8, width=width // 8)
        running[0].follow(size, at_once=strategy.at_once, leaving=strategy.leaving)

    def came_in() -> Mapping[str, float]:
        residence = running[0].residence if running else None
        return {} if residence is None else residence.seconds

    return Planner(
        rehearse,
        device=str(choice.device),
        dtype=str(choice.dtype).removeprefix("torch."),
        budget=budget,
        follow=follow,
        came_in=came_in,
        schedule=from_pipeline(outline.scheduler),
    )


def _weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Of all networks, as they are used."""
    each = (max(_numbers(tensors) for tensors in found.values()) for found in checkpoint.weights.values())
    return dtype.itemsize * sum(each)


def _numbers(tensors: Mapping[str, Stored]) -> int:
    return sum(prod(one.shape) for one in tensors.values())


def _largest_weight_bytes(checkpoint: Checkpoint) -> int:
    """Of the UNet, at two bytes a number."""
    variants = checkpoint.weights["unet"].values()
    return max(2 * prod(tensor.shape) for tensors in variants for tensor in tensors.values())


def _from_artefacts(
    artefacts: Artefacts,
    device: str,
    dtype: str,
    backend: str,
    fetcher: Fetcher | None,
    checkpoint: Checkpoint | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    candidates: Sequence[str] | None = None,
    refused: Sequence[str] = (),
) -> Engine:
    """An engine on exported graphs; torch is imported for a checkpoint's safety checker alone.

    checkpoint: the one that they were exported from, where it is at hand. candidates: see `open_sessions`.
    refused: see `_engine`.
    """
    from ritocco.backends import open_sessions
    from ritocco.scheduler_config import check_scheduler, from_pipeline

    fetcher = fetcher or Fetcher.from_environment()
    scheduler = from_pipeline(artefacts.scheduler)
    warnings = [f"Warning: {problem}" for problem in check_scheduler(scheduler)]
    tokenizer = artefacts.tokenizer()
    runtime, reasons = open_sessions(
        artefacts, backend=backend, device=device, dtype=dtype, options=options, candidates=candidates
    )
    safety, about = None, f"{artefacts.path.name}: exported graphs carry no safety checker, so none is run"
    if checkpoint is not None and checkpoint.safety_checker is not None:
        from ritocco.device import choose

        choice = choose("cpu")
        safety = SafetyChecker.load(checkpoint, device=choice.device, dtype=choice.dtype)
        about = "The checkpoint's safety checker runs on torch, on the CPU"
    return Engine(
        runtime,
        tokenizer,
        scheduler,
        safety=safety,
        version=artefacts.version,
        notes=(*warnings, about, *refused, f"Running {'; '.join(reasons)}"),
        fetcher=fetcher,
    )


class GraphOptions(TypedDict):
    """What a checkpoint's graphs are exported with, into the cache."""

    dtype: str
    hoisted: bool


def graph_options(backend: str, device: str, dtype: str) -> GraphOptions:
    """What a checkpoint is exported with for a backend.

    On GPUs, which compute in the dtype of the graphs, float16 where nothing else is asked for, as torch does
    there; in one graph, as no gain of two was measured on one. On CPUs float32, from which OpenVINO goes to
    bfloat16 by itself, and hoisted, which is faster there: see docs/export.md.
    """
    on_gpu = backend.startswith("tensorrt") or device.partition(":")[0] in ("cuda", "tensorrt")
    if not on_gpu:
        return {"dtype": "float32", "hoisted": True}
    return {"dtype": dtype if dtype in ("float32", "bfloat16") else "float16", "hoisted": False}


def _exported(checkpoint: Checkpoint, *, dtype: str, hoisted: bool) -> Artefacts:
    """The checkpoint's graphs from the cache, exported into it where they are not there.

    Raises BackendError where the cache can't be written.
    """
    from ritocco.checkpoint import fingerprint
    from ritocco.plugins import exporter

    version = fingerprint(checkpoint)
    folder = _cached_graphs(version, dtype=dtype, hoisted=hoisted)
    with _export_lock:
        try:
            return open_artefacts(folder, version=version)
        except CheckpointError:
            pass
        try:
            _log.info("exporting %s to %s, which takes minutes, once", checkpoint.source, folder)
            exporter().export(checkpoint, folder, dtype=dtype, hoisted=hoisted, say=_log.info)
        except OSError as error:
            raise BackendError(
                f"{cache_root()}: the graphs can't be kept there ({error}). Set RITOCCO_CACHE to another "
                "folder, or export with `ritocco export --out` and name that folder as the model"
            ) from error
        return open_artefacts(folder, version=version)


def _before_torch(checkpoint: Checkpoint, device: str, dtype: str) -> Iterator[tuple[str, Artefacts]]:
    """Backends that come before torch here, the first first, each with its graphs from the cache."""
    from ritocco.checkpoint import fingerprint
    from ritocco.device import choose

    def cached(backend: str) -> Artefacts | None:
        version = fingerprint(checkpoint)
        try:
            folder = _cached_graphs(version, **graph_options(backend, device, dtype))
            return open_artefacts(folder, version=version)
        except (BackendError, CheckpointError):  # the cache can't be used, or holds none that are whole
            return None

    yield from built(device, cached)
    faster = faster_than_torch("cpu") if choose(device, dtype).device.type == "cpu" else None
    if faster is not None and (graphs := cached(faster)) is not None:
        yield faster, graphs


def _cached_graphs(version: str, *, dtype: str, hoisted: bool) -> Path:
    """Named by the checkpoint, and by what is not the plain export in float32."""
    name = version[:32] if dtype == "float32" else f"{version[:32]}-{dtype}"
    return cache_root() / "graphs" / (f"{name}-hoisted" if hoisted else name)


_export_lock = threading.Lock()
_default: Engine | None = None
_default_lock = threading.Lock()


def predict(input: Mapping[str, Any] | PredictionInput, **options: Any) -> Prediction:
    """`Engine.predict` on one lazily made engine: the checkpoint in RITOCCO_MODEL, else the pocket model."""
    global _default
    with _default_lock:
        if _default is None:
            _default = load()
    return _default.predict(input, **options)
