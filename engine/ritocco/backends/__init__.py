"""One file per runtime behind the Runtime seam; those for exported graphs are chosen here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ritocco.errors import BackendError, RitoccoError
from ritocco.shown import shown

if TYPE_CHECKING:
    from ritocco.artefacts import Artefacts
    from ritocco.backends.engine_store import EngineOptions
    from ritocco.backends.sessions import SessionRuntime
    from ritocco.backends.tensorrt_library import Library

# Name -> the extra that installs it; the fastest on a CPU first.
SESSION_BACKENDS = {
    "openvino": "openvino",
    "onnxruntime": "onnx",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
}
# Which of them `auto` looks at; those of NEEDS_DRIVER come first where their engines were built before:
# building takes minutes, which nobody asked for.
_AUTO = ("openvino", "onnxruntime")
NEEDS_DRIVER = ("tensorrt", "tensorrt-rtx")
# What exporting needs, which the extra of `export_extra` brings.
EXPORT_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Name -> packages, one of which must be there; a name that is missing is its own package's.
PACKAGES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx")}

# Name -> kinds of device, and dtypes, that it can be asked for at all.
_KINDS = {"openvino": ("auto", "cpu"), "onnxruntime": ("auto", "cpu", "cuda", "tensorrt")}
_GPU_KINDS = ("auto", "cuda")
_DTYPES = {
    "openvino": ("auto", "float32", "bfloat16"),
    "onnxruntime": ("auto", "float32", "float16"),  # NumPy has no bfloat16
}
_ALL_DTYPES = ("auto", "float32", "float16", "bfloat16")

# Kind of device -> backends that were measured faster than torch there (`python -m ritocco_bench backends`).
FASTER_THAN_TORCH = {"cpu": ("openvino",)}


def open_sessions(
    artefacts: Artefacts,
    *,
    backend: str,
    device: str,
    dtype: str,
    options: Mapping[str, Any] | None = None,
    candidates: Sequence[str] | None = None,
) -> tuple[SessionRuntime, tuple[str, ...]]:
    """A Runtime on exported graphs, and why this one, in words.

    backend: `openvino`, `onnxruntime`, `tensorrt`, `tensorrt-rtx`, or `auto`: one of the last two where its
    engines for the GPU at hand lie in the cache, else ONNX Runtime on CUDA where onnxruntime-gpu is installed
    and finds a GPU, else the first of the first two that is installed, runs on `device` and opens the graphs.
    options: of TensorRT, see `EngineOptions`. candidates: the backends that `auto` tries instead, in turn.
    Raises BackendError where none is, and what the first of them raised where none opens the graphs.
    """
    if backend not in ("auto", *SESSION_BACKENDS):
        raise BackendError(
            f"backend is {shown(backend)}; exported graphs run on {' or '.join(SESSION_BACKENDS)}, and "
            "checkpoints on torch"
        )
    if backend != "auto":
        return _open(artefacts, backend, device, dtype, "as asked", options)
    places = [(name, device) for name in candidates or ()] or _ready(artefacts, device, options)
    why, failures = "the fastest that is installed", []
    for name, place in places:
        try:
            runtime, reasons = _open(artefacts, name, place, dtype, why, options)
        except RitoccoError as error:
            failures.append(error)
            why = f"{name} failed ({error})"
        else:
            hint = () if name in NEEDS_DRIVER or device == "cpu" else build_command(runtime.traits.device)
            return runtime, (*reasons, *hint)
    raise failures[0]


def _ready(artefacts: Artefacts, device: str, options: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Backends that `auto` takes for graphs, the first first, and on which device each."""
    on_cpu = device in ("auto", "cpu")
    found_here = [name for name in _AUTO if installed(name) and (on_cpu or name != "openvino")]
    places = [(name, device) for name in found_here]
    if device == "auto" and distributed("onnxruntime-gpu"):
        places.insert(0, ("onnxruntime", "cuda:0"))
    built_here = [
        name for name in NEEDS_DRIVER if device != "cpu" and _is_built(artefacts, name, device, options)
    ]
    places = [(name, device) for name in built_here] + places
    if not places:
        extras = " or ".join(f'"ritocco[{SESSION_BACKENDS[name]}]"' for name in _AUTO)
        raise BackendError(
            f"{artefacts.path}: exported graphs, and nothing to run them; pip install {extras}"
        )
    return places


def built(device: str, graphs_for: Callable[[str], Artefacts | None]) -> Iterator[tuple[str, Artefacts]]:
    """Backends of TensorRT that are installed, and whose engines of a checkpoint's graphs lie ready for the
    GPU at hand, with those graphs.

    device: as asked for. graphs_for: the graphs in the cache that a backend would be given; None for none.
    """
    from ritocco.backends.cuda import driver_here

    if device.partition(":")[0] not in _GPU_KINDS or not driver_here():
        return
    for name in filter(found, NEEDS_DRIVER):
        graphs = graphs_for(name)
        if graphs is not None and _is_built(graphs, name, device, None):
            yield name, graphs


def faster_than_torch(device: str) -> str | None:
    """The installed backend that outruns torch on a kind of device (`cpu`, `cuda`), if any."""
    return next((name for name in FASTER_THAN_TORCH.get(device, ()) if installed(name)), None)


def faster_command(device: str) -> tuple[str, ...]:
    """What outruns torch on a kind of device, and how to have it: a line for the log, or none."""
    name = faster_than_torch(device) or next(iter(FASTER_THAN_TORCH.get(device, ())), None)
    if name is None:
        return ()
    extras = [] if all(map(installed, EXPORT_PACKAGES)) else [export_extra()]
    extras += [] if installed(name) else [SESSION_BACKENDS[name]]
    first = f'pip install "ritocco[{",".join(extras)}]", then ' if extras else ""
    return (f"Faster here: {first}--backend {name}, which exports the graphs once, into the cache",)


def export_extra() -> str:
    """The extra with what exporting needs: `gpu` beside onnxruntime-gpu, which `onnx` excludes."""
    return "gpu" if distributed("onnxruntime-gpu") else "onnx"


def build_command(device: str) -> tuple[str, ...]:
    """How an installed TensorRT is put to use beside what runs on `device` (`cuda:0`, `cpu`): a line for the
    log, or none where there is no NVIDIA GPU.
    """
    from ritocco.backends.cuda import driver_here

    installed_here = [name for name in NEEDS_DRIVER if found(name)][:1]
    if not installed_here or not (device.startswith("cuda") or driver_here()):
        return ()
    name = installed_here[0]
    return (
        f"Installed: {name}. --backend {name} builds its engines once, into the cache; auto takes them then",
    )


def installed(package: str) -> bool:
    """Whether an optional package can be imported; looks, and imports nothing."""
    from importlib.util import find_spec

    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def distributed(package: str) -> bool:
    """Whether a distribution is installed, which the name of what it is imported as does not tell."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def found(backend: str) -> str | None:
    """The package that a backend of exported graphs runs on; None where none of them is installed."""
    return next((name for name in PACKAGES.get(backend, (backend,)) if installed(name)), None)


def refuse_absent(backend: str) -> None:
    """Raises BackendError where the package of a backend of exported graphs is not installed."""
    if found(backend) is None:
        extra = SESSION_BACKENDS[backend]
        raise BackendError(f'backend is {backend!r}, which is not installed; pip install "ritocco[{extra}]"')


def refuse_elsewhere(backend: str, device: str, dtype: str, options: Mapping[str, Any] | None = None) -> None:
    """Raises BackendError for what a backend of exported graphs does not take here, whatever the graphs.

    To be found before they are exported.
    """
    for name, value, word, allowed in (
        ("device", device, device.partition(":")[0], _KINDS.get(backend, _GPU_KINDS)),
        ("dtype", dtype, dtype, _dtypes(backend, device)),
    ):
        if word not in allowed:
            raise BackendError(f"{name} is {shown(value)}; the backend {backend} takes {', '.join(allowed)}")
    if options and backend == "openvino":
        raise BackendError(f"backend_options are for TensorRT; the backend {backend} has none")
    if backend == "onnxruntime":
        from ritocco.backends.onnxruntime_ import refuse_device

        refuse_device(device, with_options=bool(options))
    if backend in NEEDS_DRIVER:
        from ritocco.backends.cuda import driver_here

        if not driver_here():
            raise BackendError(f"the backend {backend} needs NVIDIA's driver, which is not on this machine")


def _dtypes(backend: str, device: str) -> tuple[str, ...]:
    """What a backend computes in on a device, of a checkpoint that it exports by itself."""
    if backend == "onnxruntime" and device in ("auto", "cpu"):  # where graphs are exported in float32
        return ("auto", "float32")
    return _DTYPES.get(backend, _ALL_DTYPES)


def _open(
    artefacts: Artefacts,
    backend: str,
    device: str,
    dtype: str,
    why: str,
    options: Mapping[str, Any] | None,
) -> tuple[SessionRuntime, tuple[str, ...]]:
    refuse_absent(backend)
    if options and backend == "openvino":
        raise BackendError(f"backend_options are for TensorRT; {backend}, which runs here, has none")
    parsed = None
    if options:
        from ritocco.backends.engine_store import EngineOptions

        parsed = EngineOptions.parse(options)
    try:
        match backend:
            case "openvino":
                from ritocco.backends.openvino_ import open_openvino

                runtime = open_openvino(artefacts, device=device, dtype=dtype)
            case "onnxruntime":
                from ritocco.backends.onnxruntime_ import open_onnxruntime

                runtime = open_onnxruntime(artefacts, device=device, dtype=dtype, options=parsed)
            case _:
                runtime = _open_tensorrt(artefacts, backend, device, dtype, parsed)
    except ImportError as error:
        raise BackendError(f"backend is {backend!r}, which is damaged: {error}") from error
    about = (f"{backend} on {runtime.traits.device}: {why}", f"in {runtime.traits.dtype}")
    return runtime, (*about, *runtime.notes)


def _open_tensorrt(
    artefacts: Artefacts, backend: str, device: str, dtype: str, given: EngineOptions | None
) -> SessionRuntime:
    from ritocco.backends.engine_store import EngineOptions

    options = given or EngineOptions()
    if _through_provider(artefacts, backend, device, options):
        from ritocco.backends.tensorrt_rtx_provider import open_provider

        return open_provider(artefacts, device=device, dtype=dtype, options=options)
    from ritocco.backends.tensorrt_ import open_tensorrt

    return open_tensorrt(artefacts, library=_library(backend), device=device, dtype=dtype, options=options)


def _is_built(artefacts: Artefacts, backend: str, device: str, given: Mapping[str, Any] | None) -> bool:
    """Whether a backend of TensorRT is there, and engines of these graphs lie ready for the GPU at hand."""
    if found(backend) is None:
        return False
    from ritocco.backends.engine_store import EngineOptions

    options = EngineOptions.parse(given)
    if _through_provider(artefacts, backend, device, options):
        from ritocco.backends.tensorrt_rtx_provider import is_compiled

        return is_compiled(artefacts, device=device, options=options)
    from ritocco.backends.tensorrt_ import is_built

    return is_built(artefacts, library=_library(backend), device=device, options=options)


def _through_provider(artefacts: Artefacts, backend: str, device: str, options: EngineOptions) -> bool:
    """Whether TensorRT for RTX is asked through ONNX Runtime's provider.

    `auto`: where it is installed, unless the bindings are too and can do more: run bfloat16 graphs, take
    engines from a folder, or from the cache where they were built ahead.
    """
    if backend != "tensorrt-rtx" or options.via != "auto":
        return backend == "tensorrt-rtx" and options.via == "onnxruntime"
    provider, *bindings = map(installed, (*PACKAGES[backend], "tensorrt_rtx_bindings"))
    if not (provider and any(bindings)):
        return provider
    if options.engines is not None or artefacts.contract["vae_decoder"].inputs[0].dtype == "bfloat16":
        return False
    from ritocco.backends.tensorrt_ import is_built

    return not is_built(artefacts, library="tensorrt-rtx", device=device, options=options)


def _library(backend: str) -> Library:
    return "tensorrt" if backend == "tensorrt" else "tensorrt-rtx"
