"""ONNX Runtime's CUDA provider: what it is told, and what stays on the device; its CPU stands in for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from provider_double import Ort
from random_lanes import random_lane
from ritocco import BackendError, CheckpointError
from ritocco.artefacts import GRAPH_FILE, MANIFEST, open_artefacts
from ritocco.backends import onnx_binding, onnxruntime_, open_sessions
from ritocco.backends.onnx_binding import DeviceBinding
from ritocco.backends.onnxruntime_ import PROVIDERS
from ritocco.backends.runtime import LatentSize
from ritocco.backends.sessions import SessionRuntime


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> Ort:
    """Device memory is the host's."""
    stand_in = Ort()
    real = onnxruntime.OrtValue.ortvalue_from_shape_and_type

    def allocated(shape: list[int], dtype: type, device: str, index: int) -> Any:
        assert (device, index) == ("cuda", 1)
        return real(shape, dtype, "cpu", 0)

    memory = SimpleNamespace(OrtValue=SimpleNamespace(ortvalue_from_shape_and_type=allocated))
    monkeypatch.setattr(onnxruntime_, "onnxruntime", stand_in)
    monkeypatch.setattr(onnx_binding, "onnxruntime", memory)
    return stand_in


def opened(graphs: Path, device: str = "cuda:1") -> SessionRuntime:
    return open_sessions(open_artefacts(graphs), backend="onnxruntime", device=device, dtype="auto")[0]


def told(ort: Ort) -> list[dict[str, str]]:
    return [dict(providers[0][1]) for _, _, providers in ort.opened]


def agree(found: SessionRuntime, graphs: Path) -> None:
    """Twice: the second call finds its buffers allocated."""
    plain = open_sessions(open_artefacts(graphs), backend="openvino", device="cpu", dtype="float32")[0]
    rng = np.random.default_rng(0)
    for _ in range(2):
        pixels = rng.uniform(-1, 1, (1, 3, 64, 128)).astype(np.float32)
        latents = found.encode_image(pixels)
        np.testing.assert_allclose(latents, plain.encode_image(pixels), atol=1e-4)
        np.testing.assert_allclose(found.decode(latents), plain.decode(latents), atol=1e-4)


def test_graphs_of_one_size_are_captured(tiny_static_graphs: Path, ort: Ort) -> None:
    runtime = opened(tiny_static_graphs)
    assert [one["enable_cuda_graph"] for one in told(ort)] == ["1"] * 4
    assert {one["device_id"] for one in told(ort)} == {"1"}
    assert runtime.notes == ()
    agree(runtime, tiny_static_graphs)


def test_what_can_not_be_captured_runs_and_is_named(tiny_static_graphs: Path, ort: Ort) -> None:
    ort.captures = False
    runtime = opened(tiny_static_graphs)
    assert ["enable_cuda_graph" in one for one in told(ort)] == [True, False] * 4
    assert "unet: runs without a CUDA graph" in runtime.notes[1]
    assert "cannot use the graph capture" in runtime.notes[1]
    agree(runtime, tiny_static_graphs)


def test_graphs_of_many_sizes_are_not_captured(tiny_graphs: Path, ort: Ort) -> None:
    runtime = opened(tiny_graphs)
    assert not any("enable_cuda_graph" in one for one in told(ort))
    agree(runtime, tiny_graphs)


def test_a_provider_that_falls_back_is_an_error(tiny_static_graphs: Path, ort: Ort) -> None:
    ort.fallback = True
    with pytest.raises(BackendError, match="CUDAExecutionProvider is wanted; ONNX Runtime fell back to CPU"):
        opened(tiny_static_graphs)


@pytest.mark.parametrize("graphs", ["tiny_graphs", "tiny_static_graphs"])
def test_a_provider_that_does_not_start_is_named_and_not_the_graph(
    graphs: str, ort: Ort, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(graphs)
    ort.broken = "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version"
    said = r"CUDAExecutionProvider failed at text_encoder \(CUDA failure 35.*NVIDIA's driver are needed"
    with pytest.raises(BackendError, match=said):
        opened(folder)
    runtime = opened(folder, "auto")
    assert runtime.traits.device == "cpu"
    assert runtime.notes[-1].startswith("not on cuda:0 (CUDAExecutionProvider failed")
    agree(runtime, folder)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_damaged_graph_is_no_fault_of_the_provider(
    device: str, tiny_optimum_graphs: Path, tmp_path: Path, ort: Ort
) -> None:
    folder = shutil.copytree(tiny_optimum_graphs, tmp_path / "graphs")
    (folder / MANIFEST).unlink()
    (folder / "unet" / GRAPH_FILE).write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"unet.*ONNX Runtime can't open it"):
        opened(folder, device)


def test_the_tensorrt_providers_inputs_stay_on_the_device(
    tiny_hoisted_graphs: Path, ort: Ort, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RITOCCO_CACHE", str(tmp_path))
    runtime = opened(tiny_hoisted_graphs, "tensorrt:1")
    copies = copies_of(monkeypatch)
    batch = runtime.open(LatentSize(height=8, width=8), 1)
    batch.join(0, random_lane("DDIM", 3, 1, 5.0, cells=(8, 8), width=32))
    counts = []
    for index in range(3):
        copies.clear()
        batch.step({0: index})
        counts.append(len(copies))
    inputs = len(open_artefacts(tiny_hoisted_graphs).contract["unet_step"].inputs)
    assert counts == [inputs, 3, 3]  # latents, rows, time


def copies_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the bytes of each copy to the device."""
    copies: list[int] = []
    update = onnxruntime.OrtValue.update_inplace

    def counted(value: Any, data: np.ndarray[Any, Any]) -> None:
        copies.append(data.nbytes)
        update(value, data)

    monkeypatch.setattr(onnxruntime.OrtValue, "update_inplace", counted)
    return copies


def test_only_what_may_have_changed_is_copied(tiny_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_graphs / "vae_decoder" / "model.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=[PROVIDERS["cpu"]])
    copies = copies_of(monkeypatch)
    binding = DeviceBinding(session, "cpu", 0, replayable=False)
    (name,) = (port.name for port in session.get_inputs())
    latents = np.random.default_rng(0).normal(size=(1, 4, 16, 16)).astype(np.float32)

    def agrees(array: np.ndarray[Any, Any]) -> None:
        (wanted,) = session.run(None, {name: array})
        (found,) = binding.run({name: array})
        np.testing.assert_array_equal(found, wanted)

    agrees(latents)
    latents *= 2  # in place, as a caller may
    agrees(latents)
    assert len(copies) == 2
    latents.setflags(write=False)
    kept = latents.copy()
    kept.setflags(write=False)
    agrees(kept)
    agrees(kept)
    assert len(copies) == 3
    agrees(np.ascontiguousarray(latents[:, :, :8]))  # another shape, and back
    agrees(kept)
    assert len(copies) == 5


def test_outputs_stay_as_they_are(tiny_graphs: Path) -> None:
    session = onnxruntime.InferenceSession(
        str(tiny_graphs / "vae_decoder" / "model.onnx"), providers=[PROVIDERS["cpu"]]
    )
    binding = DeviceBinding(session, "cpu", 0, replayable=False)
    (name,) = (port.name for port in session.get_inputs())
    (first,) = binding.run({name: np.ones((1, 4, 16, 16), np.float32)})
    before = first.copy()
    binding.run({name: np.zeros((1, 4, 16, 16), np.float32)})
    np.testing.assert_array_equal(first, before)
