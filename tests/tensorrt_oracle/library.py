"""NVIDIA's ONNX parser and engine builder, TensorRT for RTX, called in this process; neither needs a GPU.

The libraries come in the package onnxruntime-ep-nv-tensorrt-rtx-cu13. They are C++ behind plain C entry
points: the first word of an object points to its table of functions; the second word of most points to the
implementation, whose table is the one to call. The places in the tables are this version's only.

A mistake here, or in there, ends the process: `child.py` is one of its own for it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
VERSION = 10701  # TensorRT for RTX 1.7.1
UNUSABLE = 3  # the exit status of a process that can't call the libraries
_CORE, _PARSER = "libtensorrt_rtx.so.1.7.1", "libtensorrt_onnxparser_rtx.so.1.7.1"
_VERBOSE = 4  # the most that its parser says
_SEVERITIES = ("error", "error", "warning")  # 0 to 2; what is above them is news

Shape = Sequence[int]
Sizes = Sequence[Shape]
"""Least, best and largest shape of an input."""

Say = Callable[[str, str], None]
"""Takes "error", "warning" or "news", and the message."""


class UnusableError(RuntimeError):
    """The libraries can't be called here; the message says what to install."""


class _Dims(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32), ("sizes", ctypes.c_int64 * 8))

    @classmethod
    def of(cls, shape: Shape) -> _Dims:
        return cls(len(shape), (ctypes.c_int64 * 8)(*shape))


class _Object:
    """An object of theirs. address: as their functions take it. direct: it has no implementation inside."""

    def __init__(self, address: int | None, what: str, *, direct: bool = False) -> None:
        if not address:
            raise RuntimeError(f"TensorRT-RTX gave no {what}")
        self.address = ctypes.c_void_p(address)
        self._self = address if direct else _word(address, 1)

    def call(self, place: int, result: Any, *arguments: Any) -> Any:
        """The function at a place of the table; arguments are of ctypes' types."""
        kind = ctypes.CFUNCTYPE(result, ctypes.c_void_p, *(type(argument) for argument in arguments))
        return kind(_word(_word(self._self, 0), place))(self._self, *arguments)


class Library:
    """The libraries, loaded, and their logger. `say` hears each message as it comes: replace it at will."""

    def __init__(self, say: Say) -> None:
        """Raises UnusableError where the package or a C compiler is missing, or the version is another."""
        self.say = say
        folder = package_folder()
        self._core = ctypes.CDLL(str(folder / _CORE), mode=ctypes.RTLD_GLOBAL)
        self._parser = ctypes.CDLL(str(folder / _PARSER))
        if (found := self._core.getInferLibVersion()) != VERSION:
            raise UnusableError(
                f"TensorRT-RTX is version {found}; its tables of functions are known for {VERSION}"
            )

        def take(severity: int, text: bytes) -> None:
            level = _SEVERITIES[severity] if severity < len(_SEVERITIES) else "news"
            self.say(level, " ".join(text.decode(errors="replace").split()))

        # They keep its address.
        self._take = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p)(take)
        self._logger = ctypes.c_void_p(_logger_to(self._take))

    def judge(self, file: Path, profiles: Sequence[Mapping[str, Sizes]], *, build: bool) -> tuple[int, int]:
        """Parse a graph, and build an engine of it. Returns the layers, and the bytes of the engine.

        profiles: each for every input with a dynamic axis. Layers are 0 where the graph can't be parsed,
        bytes 0 where no engine was built; `say` hears why.
        """
        builder = self._make(self._core, "createInferBuilder_INTERNAL", self._logger)
        network = _Object(builder.call(6, ctypes.c_void_p, ctypes.c_uint32(0)), "network")
        parser = self._make(
            self._parser, "createNvOnnxParser_INTERNAL", network.address, self._logger, direct=True
        )
        path = ctypes.c_char_p(str(file).encode())
        parsed = parser.call(1, ctypes.c_bool, path, ctypes.c_int32(_VERBOSE))
        for index in range(parser.call(3, ctypes.c_int32)):
            error = _Object(parser.call(4, ctypes.c_void_p, ctypes.c_int32(index)), "error", direct=True)
            text = error.call(1, ctypes.c_char_p).decode(errors="replace")
            self.say("error", f"{' '.join(text.split())} (parser error {error.call(0, ctypes.c_int32)})")
        if not parsed:
            return 0, 0
        layers = int(network.call(12, ctypes.c_int32))
        return layers, self._build(builder, network, profiles) if build else 0

    def _build(self, builder: _Object, network: _Object, profiles: Sequence[Mapping[str, Sizes]]) -> int:
        config = _Object(builder.call(5, ctypes.c_void_p), "configuration")
        for sizes in profiles:
            profile = _Object(builder.call(7, ctypes.c_void_p), "optimisation profile")
            for name, shapes in sizes.items():
                for which, shape in enumerate(shapes):
                    dims = ctypes.pointer(_Dims.of(shape))
                    arguments = ctypes.c_char_p(name.encode()), ctypes.c_int32(which), dims
                    if not profile.call(2, ctypes.c_bool, *arguments):
                        self.say("error", f"the profile takes no {list(shape)} for {name}")
            if config.call(23, ctypes.c_int32, profile.address) < 0:
                self.say("error", "the profile does not fit together")
        engine = builder.call(11, ctypes.c_void_p, network.address, config.address)
        return int(_Object(engine, "engine").call(3, ctypes.c_size_t)) if engine else 0

    def _make(self, library: ctypes.CDLL, name: str, *arguments: Any, direct: bool = False) -> _Object:
        function = getattr(library, name)
        function.restype = ctypes.c_void_p
        return _Object(function(*arguments, ctypes.c_int32(VERSION)), name, direct=direct)


def package_folder() -> Path:
    """Where the libraries lie; importing the package would change its files. Raises UnusableError."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise UnusableError('TensorRT-RTX is missing; pip install -c constraints.txt -e ".[dev]"')
    return Path(found.origin).parent


def _logger_to(take: Any) -> int:
    """Compile the logger, load it, and connect it. Returns its address."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UnusableError(
            "no C compiler: TensorRT-RTX's logger needs cc or gcc, as in Debian's package gcc"
        )
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "logger.so")
        source = Path(__file__).with_name("logger.c")
        done = subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", made, source], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UnusableError(f"{compiler} can't compile {source.name}: {done.stderr.strip()}")
        logger = ctypes.CDLL(str(made))
    logger.logger_to.restype = ctypes.c_void_p
    return int(logger.logger_to(take))


def _word(address: int, index: int) -> int:
    return ctypes.c_size_t.from_address(address + index * ctypes.sizeof(ctypes.c_size_t)).value
