"""ONNX Runtime's providers of TensorRT: what they are told, what is kept, and what is said without a card.

ONNX Runtime itself computes, on its CPU; its calls for devices and providers are stood in for.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest

from provider_double import RTX, Ort
from ritocco import BackendError, backends
from ritocco.artefacts import open_artefacts
from ritocco.backends import onnxruntime_, open_sessions, tensorrt_, tensorrt_rtx_provider
from ritocco.backends.onnxruntime_ import PROVIDERS, OnnxSession
from ritocco.backends.sessions import SessionRuntime
from ritocco.backends.tensorrt_library import PLUGIN

# What ONNX Runtime 1.32 says where there is no driver.
NO_DRIVER = (
    "[ONNXRuntimeError] : 1 : FAIL : Failed to load library libonnxruntime_providers_nv_tensorrt_rtx.so with "
    "error: libcuda.so.1: cannot open shared object file: No such file or directory"
)


@pytest.fixture
def ort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ort:
    monkeypatch.setenv("RITOCCO_CACHE", str(tmp_path / "cache"))
    stand_in = Ort()
    plugin: Any = ModuleType(PLUGIN)
    plugin.__spec__ = ModuleSpec(PLUGIN, None)
    plugin.get_ep_name, plugin.get_library_path = lambda: RTX, lambda: "plugin.so"
    plugin.__version__ = "0.5.0"
    monkeypatch.setitem(sys.modules, PLUGIN, plugin)
    monkeypatch.setattr(tensorrt_rtx_provider, "_registered", set())
    monkeypatch.setattr(tensorrt_rtx_provider, "onnxruntime", stand_in)
    monkeypatch.setattr(onnxruntime_, "onnxruntime", stand_in)
    return stand_in


def opened(
    graphs: Path, backend: str = "tensorrt-rtx", device: str = "auto", **options: Any
) -> SessionRuntime:
    if backend == "tensorrt-rtx":
        options = {"via": "onnxruntime"} | options
    runtime, _ = open_sessions(
        open_artefacts(graphs), backend=backend, device=device, dtype="auto", options=options
    )
    return runtime


def feeds() -> list[Any]:
    random = np.random.default_rng(0)
    shapes = ((2, 9, 8, 8), (2,), (2, 77, 32))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_graphs_are_compiled_once_for_the_chosen_card(tiny_graphs: Path, ort: Ort) -> None:
    ort.cards = 2
    runtime = opened(tiny_graphs, device="cuda:1", workspace_bytes=77)
    assert ort.registered == [(RTX, "plugin.so")]
    path, options, providers = ort.opened[1]
    assert path == tiny_graphs / "unet" / "model.onnx"
    assert providers is None
    assert [device.place for device in options.devices] == [1]
    assert options.given["nv_profile_min_shapes"] == "sample:1x9x8x8,timestep:1,context:1x77x32"
    assert options.given["nv_profile_max_shapes"] == "sample:4x9x32x32,timestep:4,context:4x77x32"
    assert options.given["nv_max_workspace_size"] == "77"
    assert options.entries["ep.context_embed_mode"] == "0"
    assert runtime.traits.device == "cuda:1"
    before = runtime._unet(*feeds())
    again = opened(tiny_graphs, device="cuda:1", workspace_bytes=77)
    assert [path.name for path, _, _ in ort.opened[4:]] == ["model.onnx"] * 4
    assert all(path.parent.suffix == ".context" for path, _, _ in ort.opened[4:])
    assert "ep.context_enable" not in ort.opened[5][1].entries
    assert (again._unet(*feeds()) == before).all()
    assert len(ort.registered) == 1


def test_a_compiled_graph_that_changed_or_is_refused_is_made_again(
    tiny_graphs: Path, tmp_path: Path, ort: Ort
) -> None:
    opened(tiny_graphs)
    context = ort.opened[0][1].entries["ep.context_file_path"]
    assert not Path(context).exists(), "it was moved to its place, whole"
    (folder, *_) = (tmp_path / "cache" / "engines").glob("*.context")
    (folder / "model.onnx").write_bytes(b"")
    assert "not usable" not in " ".join(opened(tiny_graphs).notes), "it was opened, though its digest differs"
    assert sum("ep.context_enable" in options.entries for _, options, _ in ort.opened) == 5
    ort.damaged = True
    runtime = opened(tiny_graphs)
    assert sum("was not usable" in note for note in runtime.notes) == 4
    assert "the context is of another driver" in " ".join(runtime.notes)


def test_no_driver_and_no_card_are_said_in_words(tiny_graphs: Path, ort: Ort) -> None:
    ort.refused = NO_DRIVER
    with pytest.raises(BackendError, match=r"needs NVIDIA's driver, and libcuda\.so is not on this machine"):
        opened(tiny_graphs)
    ort.refused = "something else"
    with pytest.raises(BackendError, match=r"does not take the provider.*something else"):
        opened(tiny_graphs)
    ort.refused, ort.cards = "", 0
    with pytest.raises(BackendError, match=r"finds no card.*8\.6, 8\.9 and from 12\.0"):
        opened(tiny_graphs)
    ort.cards = 1
    with pytest.raises(BackendError, match="takes 1 cards here"):
        opened(tiny_graphs, device="cuda:1")
    with pytest.raises(BackendError, match="runs on cuda and cuda:N"):
        opened(tiny_graphs, device="cpu")


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "onnxruntime"])
def test_fallbacks_are_said(tiny_graphs: Path, ort: Ort, backend: str) -> None:
    ort.left = 3
    device = "auto" if backend == "tensorrt-rtx" else "tensorrt"
    wanted = RTX if backend == "tensorrt-rtx" else "TensorrtExecutionProvider"
    notes = opened(tiny_graphs, backend, device).notes
    assert f"unet: {wanted} left nodes to others: 3 to CPUExecutionProvider" in notes
    ort.fallback = True
    with pytest.raises(
        BackendError, match=f"{wanted} is wanted; ONNX Runtime fell back to CPUExecutionProvider"
    ):
        opened(tiny_graphs, backend, device)


def test_the_tensorrt_provider_is_told_of_shapes_and_its_cache(
    tiny_half_graphs: Path, tmp_path: Path, ort: Ort
) -> None:
    runtime = opened(tiny_half_graphs, "onnxruntime", "tensorrt:1", level=4, hardware="ampere+")
    assert runtime.traits.device == "cuda:1"
    (name, given), cuda = ort.opened[1][2]
    assert (name, cuda) == ("TensorrtExecutionProvider", ("CUDAExecutionProvider", {"device_id": "1"}))
    assert given["trt_profile_opt_shapes"] == "sample:2x9x32x32,timestep:2,context:2x77x32"
    assert Path(given["trt_engine_cache_path"]).is_dir()
    assert Path(given["trt_engine_cache_path"]).is_relative_to(tmp_path / "cache" / "engines")
    assert given["trt_fp16_enable"] == "True"
    assert (given["device_id"], given["trt_builder_optimization_level"]) == ("1", "4")
    assert given["trt_engine_hw_compatible"] == "True"
    folders = {providers[0][1]["trt_engine_cache_path"] for _, _, providers in ort.opened}
    assert len(folders) == 4, "an engine of another graph would be taken for this one's"
    with pytest.raises(BackendError, match="has no refit"):
        opened(tiny_half_graphs, "onnxruntime", "tensorrt", refit=True)


def test_what_onnx_runtime_says_of_its_own_nodes_is_read(tiny_graphs: Path) -> None:
    """With ONNX Runtime itself: its CPU takes everything."""
    session = OnnxSession(
        tiny_graphs / "unet" / "model.onnx",
        onnxruntime.SessionOptions(),
        wanted=PROVIDERS["cpu"],
        graph="unet",
        providers=[PROVIDERS["cpu"]],
    )
    taken = onnxruntime_._nodes_by_provider(session._session)
    assert taken.keys() == {PROVIDERS["cpu"]}
    assert taken[PROVIDERS["cpu"]] > 50
    assert session.notes == ()


def test_auto_takes_graphs_that_were_compiled(tiny_graphs: Path, ort: Ort) -> None:
    graphs = open_artefacts(tiny_graphs)
    ask: dict[str, Any] = {"backend": "auto", "device": "cuda", "dtype": "auto"}
    _, reasons = open_sessions(graphs, **ask)
    assert reasons[0].startswith("onnxruntime on cuda")
    assert reasons[-1].startswith("Installed: tensorrt-rtx. --backend tensorrt-rtx builds its engines once")
    opened(tiny_graphs)
    _, reasons = open_sessions(graphs, **ask)
    assert reasons[0] == "tensorrt-rtx on cuda:0: the fastest that is installed"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level": 3}, "has level, which ONNX Runtime's provider .* does not have"),
        ({"refit": True, "engines": "."}, "has refit, engines"),
        ({"cuda_graph": False}, "has cuda_graph"),
    ],
)
def test_options_that_the_provider_lacks_are_refused(
    tiny_graphs: Path, ort: Ort, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BackendError, match=said):
        opened(tiny_graphs, **options)


def test_the_bindings_are_taken_for_what_the_provider_lacks(
    tiny_graphs: Path, tiny_bfloat16_graphs: Path, ort: Ort, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="bfloat16 graphs don't run on ONNX Runtime's provider"):
        opened(tiny_bfloat16_graphs)
    monkeypatch.setattr(backends, "installed", lambda package: True)
    taken = []
    monkeypatch.setattr(tensorrt_, "open_tensorrt", lambda *_, **given: taken.append(given["library"]))
    monkeypatch.setattr(tensorrt_, "is_built", lambda *_, **__: bool(taken))
    for graphs, options in ((tiny_bfloat16_graphs, {}), (tiny_graphs, {"engines": "."}), (tiny_graphs, {})):
        with suppress(AttributeError):  # what it opened is not a runtime
            opened(graphs, via="auto", **options)
    assert taken == ["tensorrt-rtx"] * 3, "the last because its engines were built ahead"


def test_a_failing_run_is_told_and_goes_on_nowhere_else(tiny_graphs: Path) -> None:
    runtime, _ = open_sessions(open_artefacts(tiny_graphs), backend="onnxruntime", device="cpu", dtype="auto")
    with pytest.raises(BackendError, match="unet on CPUExecutionProvider: ONNX Runtime failed"):
        runtime._run("unet", [np.zeros((1, 9, 8, 8)), np.zeros(2), np.zeros((3, 77, 32))])
