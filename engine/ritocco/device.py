"""Which device, dtype and backend a machine offers, and which of them are taken when nothing is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ritocco.backends import SESSION_BACKENDS
from ritocco.errors import BackendError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
BACKENDS = ("torch",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What an engine runs on. reasons: why, a line each, for the log."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    reasons: tuple[str, ...]


def choose(device: str = "auto", dtype: str = "auto", backend: str = "auto") -> Choice:
    """Resolve what was asked for on this machine.

    device: `auto` (the first CUDA device, else the CPU), `cpu`, `cuda`, `cuda:1`.
    dtype: `auto` (float16 on CUDA; on a CPU bfloat16 where the processor computes it natively, else float32),
    `float32`, `float16`, `bfloat16`. backend: `auto` or `torch`.
    Raises BackendError with the reason where this machine can't.
    """

    if backend not in ("auto", *BACKENDS):
        known = ", ".join((*BACKENDS, *SESSION_BACKENDS))
        raise BackendError(f"backend is {backend!r}; this version has {known}")
    chosen = _device(device)
    number, reason = _dtype(chosen, dtype)
    return Choice(device=chosen, dtype=number, backend="torch", reasons=(f"torch on {chosen}", reason))


def native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself (AVX512-BF16, AMX, Arm BF16), not through float32."""
    import torch

    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        return True
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe is not None and probe())


def _device(name: str) -> torch.device:
    import torch

    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda:0" if cuda else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise BackendError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"device is {name!r}; ritocco runs on cpu and cuda devices")
    if device.type == "cpu":
        return torch.device("cpu")
    if not cuda:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise BackendError(
            f"device is {name!r}; torch {torch.__version__} ({built}) sees no CUDA device here"
        )
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise BackendError(
            f"device is {name!r}; this machine has {count} CUDA devices, cuda:0 to cuda:{count - 1}"
        )
    return torch.device("cuda", index)


def _dtype(device: torch.device, name: str) -> tuple[torch.dtype, str]:
    import torch

    if name == "auto":
        if device.type == "cuda":
            return torch.float16, "float16: the default on CUDA"
        if native_bfloat16():
            return torch.bfloat16, "bfloat16: this processor computes it natively"
        return torch.float32, "float32: this processor has no native bfloat16"
    if name not in DTYPES:
        raise BackendError(f"dtype is {name!r}; it must be auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise BackendError(
            "dtype is 'float16' on a CPU; torch computes it there hundreds of times slower than float32. "
            "Use bfloat16, float32, or a CUDA device"
        )
    if (
        name == "bfloat16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise BackendError(
            f"dtype is 'bfloat16'; {torch.cuda.get_device_name(device)} does not compute it: use float16"
        )
    return getattr(torch, name), f"{name}: as asked"
