"""What this machine can do, and what to install for the rest."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ritocco.backends import NEEDS_DRIVER, SESSION_BACKENDS, build_command, faster_command, found, installed
from ritocco.device import choose, native_bfloat16
from ritocco.errors import BackendError


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One finding. level: ok, note or missing; a missing optional part is no error."""

    level: str
    subject: str
    message: str


def examine() -> list[Line]:
    """Look at this machine: python, torch, devices, dtypes, backends, optional packages."""
    import torch

    lines = [
        Line(
            level="ok",
            subject="python",
            message=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        ),
        Line(level="ok", subject="torch", message=torch.__version__),
        _cpu(),
        *_cuda(),
        *_choice(),
        Line(level="ok", subject="backend torch", message="found"),
        *(_backend(name, extra) for name, extra in SESSION_BACKENDS.items()),
    ]
    return lines + [_optional(package, package, purpose, extra) for package, purpose, extra in _OPTIONAL]


# Package, what it is for, the extra that installs it.
_OPTIONAL = (
    ("onnx", "ritocco export", "onnx"),
    ("diffusers", "sharing a pipeline in memory; the reference in tests and benchmarks", "diffusers"),
)
# Package -> the distribution that brings it, where the two differ.
_DISTRIBUTIONS = {"onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu13"}


def _cpu() -> Line:
    import torch

    bfloat16 = "native" if native_bfloat16() else "emulated: float32 is faster"
    message = f"{torch.get_num_threads()} threads; float32, bfloat16 ({bfloat16}); float16 is refused"
    return Line(level="ok", subject="device cpu", message=message)


def _cuda() -> list[Line]:
    import torch

    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}, but sees no device"
            if torch.version.cuda
            else ("torch is a CPU build; install a CUDA build of torch to use a GPU")
        )
        return [Line(level="missing", subject="device cuda", message=built)]
    lines = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = f"{about.total_memory / 2**30:.1f} GiB"
        message = f"{about.name}, {memory}, compute capability {about.major}.{about.minor}"
        lines.append(Line(level="ok", subject=f"device cuda:{index}", message=message))
    return lines


def _choice() -> list[Line]:
    try:
        choice = choose()
    except BackendError as error:
        return [Line(level="missing", subject="default", message=str(error))]
    lines = [Line(level="ok", subject="default", message="; ".join(choice.reasons))]
    faster = (*faster_command(choice.device.type), *build_command(choice.device.type))
    return lines + [Line(level="note", subject="fastest", message=line) for line in faster]


def _backend(name: str, extra: str) -> Line:
    from ritocco.backends.cuda import driver_here

    line = _optional(f"backend {name}", found(name) or name, "runs exported graphs", extra)
    if line.level == "ok" and name in NEEDS_DRIVER and not driver_here():
        message = f"{line.message}, with NVIDIA's driver, which is not on this machine"
        return Line(level="missing", subject=line.subject, message=message)
    return line


def _optional(subject: str, package: str, purpose: str, extra: str) -> Line:
    if not installed(package):
        message = f'missing: {purpose}. pip install "ritocco[{extra}]"'
        return Line(level="missing", subject=subject, message=message)
    try:
        installed_version = version(_DISTRIBUTIONS.get(package, package))
    except PackageNotFoundError:
        installed_version = "unknown version"
    return Line(level="ok", subject=subject, message=f"{installed_version}: {purpose}")


def report(lines: list[Line]) -> str:
    """The findings as aligned text."""
    width = max(len(line.subject) for line in lines)
    marks = {"ok": "ok     ", "note": "note   ", "missing": "missing", "error": "ERROR  "}
    return "\n".join(f"{marks[line.level]}  {line.subject:<{width}}  {line.message}" for line in lines)
