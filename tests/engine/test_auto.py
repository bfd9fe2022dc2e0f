"""What `backend="auto"` takes for a checkpoint, and what it says of it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ritocco
from ritocco import BackendError, backends
from ritocco.backends.openvino_library import openvino
from ritocco.backends.sessions import SessionRuntime
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import fingerprint, open_checkpoint
from ritocco.disk import cache_root

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RITOCCO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cached(tiny_checkpoint: Path, tiny_hoisted_graphs: Path) -> Path:
    """Graphs of the tiny checkpoint in the cache, as a CPU has them. Returns their folder."""
    name = f"{fingerprint(open_checkpoint(tiny_checkpoint))[:32]}-hoisted"
    folder = cache_root() / "graphs" / name
    shutil.copytree(tiny_hoisted_graphs, folder)
    return folder


def test_torch_runs_where_nothing_is_exported_and_the_log_names_what_is_faster(
    tiny_checkpoint: Path, ask: Ask
) -> None:
    with ritocco.load(tiny_checkpoint, device="cpu") as engine:
        assert isinstance(engine.runtime, TorchRuntime)
        logs = engine.predict(ask()).logs
    assert "Running torch on cpu" in logs
    assert "Faster here: --backend openvino, which exports the graphs once, into the cache" in logs


@pytest.mark.parametrize(
    ("backend", "asked", "words"),
    [
        ("openvino", {"device": "cuda"}, "device is 'cuda'; the backend openvino takes auto, cpu"),
        ("openvino", {"dtype": "float16"}, "dtype is 'float16'; the backend openvino takes auto, float32"),
        ("openvino", {"device": "tensorrt"}, "device is 'tensorrt'; the backend openvino takes auto, cpu"),
        ("openvino", {"backend_options": {"level": 5}}, "the backend openvino has none"),
        (
            "onnxruntime",
            {"dtype": "float16"},
            "dtype is 'float16'; the backend onnxruntime takes auto, float32",
        ),
        (
            "onnxruntime",
            {"device": "cuda", "dtype": "bfloat16"},
            "the backend onnxruntime takes auto, float32, ",
        ),
        ("onnxruntime", {"device": "cuda"}, "the installed ONNX Runtime has no CUDAExecutionProvider"),
        ("onnxruntime", {"backend_options": {"level": 5}}, "name the device tensorrt"),
        ("tensorrt-rtx", {}, "the backend tensorrt-rtx needs NVIDIA's driver"),
        ("tensorrt", {}, "not installed"),
    ],
)
def test_what_a_backend_never_takes_is_refused_before_the_export(
    tiny_checkpoint: Path,
    backend: str,
    asked: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ritocco.backends.cuda.driver_here", lambda: False)
    with pytest.raises(BackendError, match=words):
        ritocco.load(tiny_checkpoint, backend=backend, **asked)
    assert not (cache_root() / "graphs").exists()


@pytest.mark.parametrize("device", ["auto", "cpu", "cpu:0"])
def test_graphs_in_the_cache_are_taken(tiny_checkpoint: Path, cached: Path, ask: Ask, device: str) -> None:
    with ritocco.load(tiny_checkpoint, device=device) as engine:
        assert isinstance(engine.runtime, SessionRuntime)
        logs = engine.predict(ask()).logs
    assert "Running openvino on cpu: the fastest that is installed" in logs
    assert "Faster here" not in logs


@pytest.mark.parametrize("fault", ["refused", "damaged", "dtype"])
def test_graphs_that_can_not_serve_leave_a_checkpoint_to_torch(
    tiny_checkpoint: Path, cached: Path, ask: Ask, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to ONNX Runtime, which is slower."""
    from ritocco.backends import openvino_

    def refused(*args: object, **kwargs: object) -> None:
        raise BackendError("no such plugin")

    dtype = "auto"
    if fault == "refused":
        monkeypatch.setattr(openvino_, "open_openvino", refused)
        why = "no such plugin"
    elif fault == "damaged":
        monkeypatch.setitem(sys.modules, "ritocco.backends.openvino_", None)
        why = "backend is 'openvino', which is damaged: import of ritocco.backends.openvino_ halted"
    else:
        able = SimpleNamespace(get_property=lambda *_: ["FP32"])
        monkeypatch.setattr(openvino, "Core", lambda: able)
        dtype = "bfloat16"
        why = "dtype is 'bfloat16', which this processor does not compute in"
    with ritocco.load(tiny_checkpoint, device="cpu", dtype=dtype) as engine:
        assert isinstance(engine.runtime, TorchRuntime)
        logs = engine.predict(ask()).logs
    assert f"Not on openvino, though its graphs are in the cache: {why}" in logs
    assert "Running torch on cpu" in logs
    assert "Faster here" not in logs


def test_torch_as_asked_names_nothing_faster(tiny_checkpoint: Path, cached: Path, ask: Ask) -> None:
    with ritocco.load(tiny_checkpoint, backend="torch", device="cpu") as engine:
        assert isinstance(engine.runtime, TorchRuntime)
        assert "Faster here" not in engine.predict(ask()).logs


def test_damaged_graphs_are_left_alone(tiny_checkpoint: Path, cached: Path) -> None:
    (cached / "unet_step" / "model.onnx").write_bytes(b"no graph")
    with ritocco.load(tiny_checkpoint, device="cpu") as engine:
        assert isinstance(engine.runtime, TorchRuntime)


@pytest.mark.skipif(os.name != "posix", reason="names that are no UTF-8")
def test_a_cache_that_can_not_be_used_is_left_alone(
    tiny_checkpoint: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RITOCCO_CACHE", "no-\udcff-cache")
    with ritocco.load(tiny_checkpoint, device="cpu") as engine:
        assert isinstance(engine.runtime, TorchRuntime)


def test_what_to_install_is_named(
    tiny_checkpoint: Path, cached: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "installed", lambda package: False)
    with ritocco.load(tiny_checkpoint, device="cpu") as engine:
        assert isinstance(engine.runtime, TorchRuntime)
        logs = engine.predict(ask()).logs
    assert 'Faster here: pip install "ritocco[onnx,openvino]", then --backend openvino' in logs


@pytest.mark.parametrize(
    ("absent", "extras"),
    [
        (("onnxscript",), "onnx"),
        (("onnx", "onnxruntime", "onnxscript"), "onnx"),
        (("openvino",), "openvino"),
        (("onnx", "openvino"), "onnx,openvino"),
    ],
)
def test_the_extras_that_an_export_lacks_are_named(
    absent: tuple[str, ...], extras: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "installed", lambda package: package not in absent)
    (line,) = backends.faster_command("cpu")
    assert line.startswith(f'Faster here: pip install "ritocco[{extras}]", then --backend openvino')
    monkeypatch.setattr(backends, "distributed", lambda package: package == "onnxruntime-gpu")
    (line,) = backends.faster_command("cpu")
    assert f'"ritocco[{extras.replace("onnx", "gpu")}]"' in line, "onnx would exclude what is installed"


def test_nothing_was_measured_faster_on_cuda() -> None:
    assert backends.faster_than_torch("cuda") is None
    assert backends.faster_command("cuda") == ()


def test_graphs_that_openvino_does_not_open_run_elsewhere(
    tiny_graphs: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ritocco.backends import openvino_

    def refused(*args: object, **kwargs: object) -> None:
        raise BackendError("openvino: no such plugin")

    monkeypatch.setattr(openvino_, "open_openvino", refused)
    with ritocco.load(tiny_graphs, device="cpu") as engine:
        logs = engine.predict(ask()).logs
    assert "Running onnxruntime on cpu: openvino failed (openvino: no such plugin)" in logs
    monkeypatch.setattr(backends, "installed", lambda package: package == "openvino")
    with pytest.raises(BackendError, match="no such plugin"):
        ritocco.load(tiny_graphs, device="cpu")


def test_a_gpu_comes_before_the_cpu_where_onnxruntime_is_built_for_it(
    tiny_graphs: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here none is found, which is said."""
    monkeypatch.setattr(backends, "distributed", lambda package: package == "onnxruntime-gpu")
    with ritocco.load(tiny_graphs) as engine:
        logs = engine.predict(ask()).logs
    assert "Running openvino on cpu: onnxruntime failed (device is 'cuda:0'; " in logs
    with ritocco.load(tiny_graphs, device="cpu") as engine:
        assert "onnxruntime failed" not in engine.predict(ask()).logs


def test_distributions_are_told_apart() -> None:
    assert backends.distributed("numpy")
    assert not backends.distributed("no-such-distribution")


def test_bfloat16_is_refused_where_the_processor_lacks_it(
    tiny_graphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = SimpleNamespace(get_property=lambda *_: ["FP32"])
    monkeypatch.setattr(openvino, "Core", lambda: able)
    with pytest.raises(BackendError, match="'bfloat16', which this processor does not compute in"):
        ritocco.load(tiny_graphs, backend="openvino", dtype="bfloat16")
