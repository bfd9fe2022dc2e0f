"""One file per runtime behind the Runtime seam; those for exported graphs are chosen here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ritocco.errors import BackendError
from ritocco.shown import shown

if TYPE_CHECKING:
    from ritocco.artefacts import Artefacts
    from ritocco.backends.sessions import SessionRuntime

# Name -> the extra that installs it; the fastest on a CPU first.
SESSION_BACKENDS = {"openvino": "openvino", "onnxruntime": "onnx"}

# Kind of device -> backends that were measured faster than torch there (`python -m ritocco_bench backends`).
FASTER_THAN_TORCH = {"cpu": ("openvino",)}


def open_sessions(
    artefacts: Artefacts, *, backend: str, device: str, dtype: str
) -> tuple[SessionRuntime, tuple[str, ...]]:
    """A Runtime on exported graphs, and why this one, in words.

    backend: `openvino`, `onnxruntime`, or `auto`: the first of them that is installed and runs on `device`.
    Raises BackendError where none is.
    """
    if backend not in ("auto", *SESSION_BACKENDS):
        raise BackendError(
            f"backend is {shown(backend)}; exported graphs run on {' or '.join(SESSION_BACKENDS)}"
        )
    if backend != "auto":
        return _open(artefacts, backend, device, dtype, "as asked")
    on_cpu = device in ("auto", "cpu")
    candidates = [name for name in SESSION_BACKENDS if installed(name) and (on_cpu or name != "openvino")]
    if not candidates:
        extras = " or ".join(f'"ritocco[{extra}]"' for extra in SESSION_BACKENDS.values())
        raise BackendError(
            f"{artefacts.path}: exported graphs, and nothing to run them; pip install {extras}"
        )
    return _open(artefacts, candidates[0], device, dtype, "the fastest that is installed")


def faster_than_torch(device: str) -> str | None:
    """The installed backend that outruns torch on a kind of device (`cpu`, `cuda`), if any."""
    return next((name for name in FASTER_THAN_TORCH.get(device, ()) if installed(name)), None)


def faster_command(device: str) -> tuple[str, ...]:
    """What outruns torch on a kind of device, and how to have it: a line for the log, or none."""
    if name := faster_than_torch(device):
        return (f"Faster here: --backend {name}, which exports the graphs once, into the cache",)
    return tuple(
        f'Faster here: pip install "ritocco[onnx,{SESSION_BACKENDS[name]}]", then --backend {name}'
        for name in FASTER_THAN_TORCH.get(device, ())[:1]
    )


def installed(package: str) -> bool:
    """Whether an optional package can be imported; looks, and imports nothing."""
    from importlib.util import find_spec

    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _open(
    artefacts: Artefacts, backend: str, device: str, dtype: str, why: str
) -> tuple[SessionRuntime, tuple[str, ...]]:
    if not installed(backend):
        extra = SESSION_BACKENDS[backend]
        raise BackendError(f'backend is {backend!r}, which is not installed; pip install "ritocco[{extra}]"')
    if backend == "openvino":
        from ritocco.backends.openvino_ import open_openvino as opened
    else:
        from ritocco.backends.onnxruntime_ import open_onnxruntime as opened
    runtime = opened(artefacts, device=device, dtype=dtype)
    return runtime, (f"{backend} on {runtime.traits.device}: {why}", f"in {runtime.traits.dtype}")
