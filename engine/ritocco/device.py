"""Which device, dtype and backend a machine offers, and which of them are taken when nothing is asked for."""

from __future__ import annotations

import gc
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ritocco.backends import SESSION_BACKENDS
from ritocco.errors import BackendError, RequestError
from ritocco.shown import shown

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
BACKENDS = ("torch",)
_ALL_BACKENDS = ("auto", *BACKENDS, *SESSION_BACKENDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What an engine runs on. reasons: why, a line each, for the log."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    reasons: tuple[str, ...]


def check_names(device: str, dtype: str, backend: str) -> None:
    """Raises RequestError for a device, dtype or backend that no machine has."""
    for name, value, pattern, rule in (
        ("device", device, r"auto|cpu(:0)?|(cuda|tensorrt)(:[0-9]{1,9})?", "auto, cpu, cuda or cuda:N"),
        ("dtype", dtype, "|".join(("auto", *DTYPES)), ", ".join(("auto", *DTYPES))),
        ("backend", backend, "|".join(_ALL_BACKENDS), ", ".join(_ALL_BACKENDS)),
    ):
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise RequestError(f"{name} is {shown(value)}; it must be {rule}", field=name)


def choose(device: str = "auto", dtype: str = "auto", backend: str = "auto") -> Choice:
    """Resolve what was asked for on this machine.

    device: `auto` (the first CUDA device, else the CPU), `cpu`, `cuda`, `cuda:1`.
    dtype: `auto` (float16 on CUDA; on a CPU bfloat16 where the processor computes it natively, else float32),
    `float32`, `float16`, `bfloat16`. backend: `auto` or `torch`.
    Raises RequestError for a name that no machine knows, BackendError with the reason where this one can't.
    """
    check_names(device, dtype, backend)
    if backend not in ("auto", *BACKENDS):
        raise BackendError(f"backend is {backend!r}, which runs exported graphs; torch runs checkpoints")
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


def onednn_bfloat16() -> bool:
    """Whether torch leaves bfloat16 on this CPU to oneDNN; else it takes other ways, and more memory."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def responds(name: str) -> bool:
    """Whether a device still computes. After a fault in a kernel CUDA refuses everything to the process that
    it was in, until that has ended; a lack of memory is no such fault.
    """
    import torch

    if not name.startswith("cuda"):
        return True
    try:
        return bool(torch.ones(1, device=name).add_(1).item() == 2.0)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def held_memory(name: str) -> dict[str, int]:
    """Bytes that torch holds of a CUDA device: `allocated` and `reserved` now, and at the `peak`, the most
    allocated; nothing of other devices.
    """
    import torch

    if not name.startswith("cuda"):
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(name),
        "reserved": torch.cuda.memory_reserved(name),
        "peak": torch.cuda.max_memory_allocated(name),
    }


def give_back_memory(name: str) -> None:
    """Let the driver have what torch keeps of a CUDA device and nobody uses, where it can; nothing on other
    devices, or where torch computed nothing.
    """
    if name.startswith("cuda") and "torch" in sys.modules:
        from ritocco.backends.allocator import give_back_unused

        gc.collect()
        give_back_unused()


def refuse_unplanned(device: torch.device, dtype: torch.dtype) -> None:
    """Raises BackendError where memory can't be planned: in bfloat16 on a CPU where oneDNN has it not."""
    import torch

    if device.type == "cpu" and dtype == torch.bfloat16 and not onednn_bfloat16():
        rule = "plans of it are of processors on which oneDNN computes it (x86 with AVX-512, Arm with BF16)"
        raise BackendError(f"dtype is 'bfloat16'; {rule}, and this is none: use float32")


def _device(name: str) -> torch.device:
    import torch

    cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda:0" if cuda else "cpu")
    kind, _, number = name.partition(":")
    if kind == "tensorrt":
        raise BackendError(f"device is {name!r}, which is onnxruntime's alone; torch runs on cpu and cuda")
    if kind == "cpu":
        return torch.device("cpu")
    if not cuda:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise BackendError(
            f"device is {name!r}; torch {torch.__version__} ({built}) sees no CUDA device here"
        )
    index, count = int(number or 0), torch.cuda.device_count()
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
