"""Stands in for TensorRT's Python API: engines are notes of what was built, and ONNX Runtime computes.

It keeps the API's rules, as far as this project relies on them: what must be called before what, what is
refused with False or None and a line in the log, and which shapes a profile takes. Its names are held against
the real libraries' in tests/export/test_tensorrt_build.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

VERSION = {"tensorrt": "10.14.1", "tensorrt_rtx": "1.7.1"}
BUILT: list[dict[str, Any]] = []
"""Of every build: what it was asked for."""

Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
DataType = Enum("DataType", "FLOAT HALF BF16 INT32 INT64")
TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
BuilderFlag = Enum("BuilderFlag", "REFIT TF32 VERSION_COMPATIBLE")
MemoryPoolType = Enum("MemoryPoolType", "WORKSPACE")
HardwareCompatibilityLevel = Enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY")
ComputeCapability = Enum("ComputeCapability", "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121")
CudaGraphStrategy = Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


_DTYPES = {
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(int64)": "INT64",
    "tensor(int32)": "INT32",
}
_NUMPY = {"FLOAT": np.float32, "BF16": np.uint16, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32}


class ILogger:
    Severity = Severity
    made = False

    def __init__(self) -> None:
        self.made = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def __init__(self) -> None:
        self.made = True


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text

    def node_name(self) -> str:
        return "a node"

    def node_operator(self) -> str:
        return "Op"


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED), "not strongly typed"
        self._path: str | None = None
        self._inputs: dict[str, tuple[Any, ...]] = {}


def _session(path: str) -> Any:
    from ritocco.backends.onnxruntime_library import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:
        if not _is_bfloat16(path):
            raise
        return BFloat16Session(path)


def _is_bfloat16(path: str) -> bool:
    import onnx

    (output, *_) = onnx.load(path, load_external_data=False).graph.output
    return bool(output.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16)


class BFloat16Session:
    """As ONNX Runtime's, whose CPU does not run such graphs: OpenVINO does. NumPy has the bits alone."""

    def __init__(self, path: str) -> None:
        from ritocco.backends.openvino_library import openvino

        self._openvino = openvino
        self._model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})

    def get_inputs(self) -> list[Any]:
        return [self._port(one) for one in self._model.inputs]

    def get_outputs(self) -> list[Any]:
        return [self._port(one) for one in self._model.outputs]

    def run(self, names: Sequence[str], feeds: dict[str, Any]) -> list[Any]:
        narrow = {one.name for one in self.get_inputs() if one.type == "tensor(bfloat16)"}
        request = self._model.create_infer_request()
        request.infer({name: self._tensor(one, name in narrow) for name, one in feeds.items()})
        found = [request.get_tensor(name) for name in names]
        return [
            (one.data.view(np.uint16) if one.element_type == self._openvino.Type.bf16 else one.data).copy()
            for one in found
        ]

    def _tensor(self, array: Any, narrow: bool) -> Any:
        if not narrow:
            return array
        return self._openvino.Tensor(array, self._openvino.Shape(array.shape), self._openvino.Type.bf16)

    def _port(self, port: Any) -> Any:
        kinds = {"bf16": "bfloat16", "f32": "float", "i64": "int64", "i32": "int32"}
        shape = [one.get_length() if one.is_static else "any" for one in port.get_partial_shape()]
        kind = kinds[port.element_type.get_type_name()]
        return SimpleNamespace(name=port.get_any_name(), type=f"tensor({kind})", shape=shape)


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        assert logger.made, "the logger's own constructor was not called"
        self._network = network
        self._errors: list[ParserError] = []

    def parse_from_file(self, model: str) -> bool:
        assert isinstance(model, str)
        try:
            session = _session(model)
        except Exception as error:
            self._errors.append(ParserError(str(error)))
            return False
        self._network._path = model
        self._network._inputs = {port.name: tuple(port.shape) for port in session.get_inputs()}
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        assert len(min) == len(opt) == len(max)
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self._shapes[input] = (list(min), list(opt), list(max))


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data + b"timed "


class IBuilderConfig:
    """Sets only attributes that the library has: pybind11's classes take any, in silence."""

    _known = frozenset({"progress_monitor", "builder_optimization_level"})

    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._profiles: list[dict[str, Any]] = []
        self._set: dict[str, Any] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        assert name in self._known, f"{type(self).__name__} has no {name}"
        self._set[name] = value

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._set["workspace"] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1


class ClassicConfig(IBuilderConfig):
    _known = IBuilderConfig._known | {"hardware_compatibility_level"}

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._data.startswith(b"another GPU"):
            return False
        self._set["timings"] = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        cache: ITimingCache = self._set["timings"]
        return cache


class RtxConfig(IBuilderConfig):
    _known = IBuilderConfig._known | {"num_compute_capabilities"}

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        if not index < self._set.get("num_compute_capabilities", 0):
            return False
        self._set["capability"] = compute_capability.name
        return True


class Builder:
    flavour = ""
    needs_gpu = False

    def __init__(self, logger: ILogger) -> None:
        assert logger.made, "the logger's own constructor was not called"
        if self.needs_gpu:
            from cuda.bindings import runtime

            if runtime.cudaGetDeviceCount()[1] in (None, 0):
                logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return ClassicConfig() if self.flavour == "tensorrt" else RtxConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        moving = {n for n, shape in network._inputs.items() if any(not isinstance(d, int) for d in shape)}
        if moving and not config._profiles:
            self._logger.log(Severity.ERROR, "Network has dynamic inputs, but no optimization profile")
            return None
        for index, shapes in enumerate(config._profiles):
            if missing := sorted(moving - shapes.keys()):
                self._logger.log(Severity.ERROR, f"{missing[0]}: profile {index} has no shape")
                return None
        monitor = config._set.get("progress_monitor")
        if monitor is not None:
            assert monitor.made, "the monitor's own constructor was not called"
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Tactic timing", "Building Engine", 1)
            assert monitor.step_complete("Tactic timing", 0)
            monitor.phase_finish("Tactic timing")
            monitor.phase_finish("Building Engine")
        self._logger.log(Severity.WARNING, "a warning of the builder")
        plain = {name: value for name, value in config._set.items() if isinstance(value, str | int)}
        about = {
            "flavour": self.flavour,
            "version": VERSION[self.flavour],
            "path": network._path,
            "profiles": config._profiles,
            "flags": sorted(flag.name for flag in config._flags),
            "set": plain | {n: v.name for n, v in config._set.items() if isinstance(v, Enum)},
        }
        BUILT.append(about)
        return json.dumps(about).encode()


class IRuntimeCache:
    def __init__(self) -> None:
        self._kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        if not bytes(blob).startswith(b"kernels "):
            return False
        self._kernels |= set(bytes(blob).decode().split()[1:])
        return True

    def serialize(self) -> bytes:
        return " ".join(["kernels", *sorted(self._kernels)]).encode()


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self._cache: IRuntimeCache | None = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class ICudaEngine:
    def __init__(self, about: dict[str, Any], logger: ILogger) -> None:
        self._about, self._logger = about, logger
        self._session = _session(about["path"])
        self._ports = [*self._session.get_inputs(), *self._session.get_outputs()]
        self._inputs = {port.name for port in self._session.get_inputs()}

    @property
    def num_io_tensors(self) -> int:
        return len(self._ports)

    def get_tensor_name(self, index: int) -> str:
        return str(self._ports[index].name)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[_DTYPES[next(port.type for port in self._ports if port.name == name)]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = next(port.shape for port in self._ports if port.name == name)
        return tuple(side if isinstance(side, int) else -1 for side in shape)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig | None = None) -> IExecutionContext:
        if self._about["flavour"] == "tensorrt_rtx":
            assert runtime_config is not None
            assert runtime_config._cache is not None
        return IExecutionContext(self, runtime_config)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig | None) -> None:
        self._engine, self._config = engine, config
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if profile_index >= len(self._engine._about["profiles"]):
            return False
        self._profile = profile_index
        self._shapes.clear()  # they belong to the profile before
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple)
        profiles = self._engine._about["profiles"]
        if profiles and name in profiles[self._profile]:
            least, _, most = profiles[self._profile][name]
            if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
                self._engine._logger.log(Severity.ERROR, f"{name} {shape} is outside its profile")
                return False
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return sorted(self._engine._inputs - self._shapes.keys())

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        zeros = {
            port.name: np.zeros(self._shapes[port.name], _NUMPY[_DTYPES[port.type]])
            for port in self._engine._session.get_inputs()
        }
        shape: tuple[int, ...] = self._engine._session.run([name], zeros)[0].shape
        return shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        from cuda.bindings import runtime

        if self.infer_shapes() or set(self._addresses) != {port.name for port in self._engine._ports}:
            return False
        if self._config is not None and self._config._cache is not None:
            self._config._cache._kernels.add("x".join(str(n) for s in self._shapes.values() for n in s))
        shapes, addresses, session = dict(self._shapes), dict(self._addresses), self._engine._session

        def work() -> None:
            feeds = {}
            for port in session.get_inputs():
                kind, shape = np.dtype(_NUMPY[_DTYPES[port.type]]), shapes[port.name]
                size = int(np.prod(shape)) * kind.itemsize
                held = runtime.view(addresses[port.name], size)
                feeds[port.name] = np.frombuffer(held, kind).reshape(shape).copy()
            names = [port.name for port in session.get_outputs()]
            for name, found in zip(names, session.run(names, feeds), strict=True):
                runtime.view(addresses[name], found.nbytes)[:] = found.tobytes()

        runtime.enqueue(stream_handle, work)
        return True


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert logger.made, "the logger's own constructor was not called"
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        about = json.loads(bytes(serialized_engine))
        if "VERSION_COMPATIBLE" in about["flags"] and not self.engine_host_code_allowed:
            self._logger.log(Severity.ERROR, "host code is not allowed")
            return None
        if about["version"] != VERSION[about["flavour"]]:
            self._logger.log(Severity.ERROR, f"Version tag does not match: {about['version']}")
            return None
        return ICudaEngine(about, self._logger)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine, self._path = engine, ""

    def refit_cuda_engine(self) -> bool:
        self._engine._session = _session(self._path)
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        if "REFIT" not in self._refitter._engine._about["flags"]:
            return False
        self._refitter._path = model
        return True


def library(flavour: str) -> SimpleNamespace:
    """The names of one of the two modules."""
    shared = {
        held.__name__: held
        for held in (
            BuilderFlag,
            DataType,
            HardwareCompatibilityLevel,
            ILogger,
            IProgressMonitor,
            MemoryPoolType,
            NetworkDefinitionCreationFlag,
            OnnxParser,
            OnnxParserRefitter,
            Refitter,
            Runtime,
            TensorIOMode,
        )
    }
    rtx = {"ComputeCapability": ComputeCapability, "CudaGraphStrategy": CudaGraphStrategy}
    builder = type("Builder", (Builder,), {"flavour": flavour, "needs_gpu": flavour == "tensorrt"})
    return SimpleNamespace(
        **shared,
        **(rtx if flavour == "tensorrt_rtx" else {}),
        Builder=builder,
        __version__=VERSION[flavour],
    )
