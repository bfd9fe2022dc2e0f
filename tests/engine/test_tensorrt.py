"""TensorRT's sessions, their engines on disk and their buffers, against stand-ins of its API and CUDA's."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest

import ritocco
from random_lanes import random_lane, walk
from ritocco import BackendError, RequestError
from ritocco.artefacts import GRAPH_FILE, MANIFEST, file_digest, open_artefacts
from ritocco.backends import build_command, open_sessions
from ritocco.backends.bfloat16 import from_bfloat16, to_bfloat16
from ritocco.backends.cuda import Cuda
from ritocco.backends.engine_store import EngineOptions, EngineStore, engine_key, target_of, weights_of
from ritocco.backends.runtime import Floats, LatentSize
from ritocco.backends.sessions import SessionRuntime

pytestmark = pytest.mark.usefixtures("standing_in")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RITOCCO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cuda(standing_in: None) -> Iterator[Any]:
    runtime: Any = importlib.import_module("cuda.bindings.runtime")
    runtime.reset()
    yield runtime
    runtime.reset()


@pytest.fixture
def stand_in(cuda: ModuleType) -> Iterator[Any]:
    importlib.import_module("tensorrt")
    held: Any = importlib.import_module("trt_stand_in")
    held.BUILT.clear()
    version = dict(held.VERSION)
    yield held
    held.VERSION.update(version)
    for name in ("tensorrt", "tensorrt_rtx"):
        if name in sys.modules:
            sys.modules[name].__version__ = version[name]  # type: ignore[attr-defined]


def opened(graphs: Path, library: str = "tensorrt", **options: Any) -> SessionRuntime:
    via = {"via": "bindings"} if library == "tensorrt-rtx" else {}
    runtime, _ = open_sessions(
        open_artefacts(graphs), backend=library, device="auto", dtype="auto", options=via | options
    )
    return runtime


def beside(graphs: Path) -> tuple[SessionRuntime, SessionRuntime]:
    """The same graphs on TensorRT's stand-in and on ONNX Runtime."""
    plain, _ = open_sessions(open_artefacts(graphs), backend="onnxruntime", device="cpu", dtype="auto")
    return opened(graphs), plain


def with_profiles(graphs: Path, folder: Path) -> Path:
    """Two profiles of the UNet or its steps: many rows of 64 x 64 pixels, two of any size."""
    shutil.copytree(graphs, folder)
    held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    unet = "unet_step" if "unet_step" in held["ranges"] else "unet"
    small = held["ranges"][unet] | {"M": [1, 2, 4], "H": [8, 8, 8], "W": [8, 8, 8]}
    large = held["ranges"][unet] | {"M": [1, 2, 2], "H": [8, 32, 32], "W": [16, 32, 32]}
    if unet == "unet_step":
        small["N"], large["N"] = [1, 2, 2], [1, 1, 1]
    held["profiles"] = [held["ranges"] | {unet: one} for one in (small, large)]
    (folder / MANIFEST).write_text(json.dumps(held), encoding="utf-8")
    return folder


def unet_feeds(rows: int, height: int = 8, width: int = 8) -> list[Floats]:
    random = np.random.default_rng(rows)
    shapes = ((rows, 9, height, width), (rows,), (rows, 77, 32))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_engines_are_built_once(tiny_graphs: Path, stand_in: Any) -> None:
    opened(tiny_graphs)
    assert [Path(one["path"]).parent.name for one in stand_in.BUILT] == [
        "text_encoder",
        "unet",
        "vae_encoder",
        "vae_decoder",
    ]
    opened(tiny_graphs)
    assert len(stand_in.BUILT) == 4


@pytest.mark.parametrize(
    ("options", "why"),
    [({"level": 5}, "another option"), ({"workspace_bytes": 1 << 30}, "another option"), ({}, "nothing")],
)
def test_an_engine_of_other_options_is_another(
    tiny_graphs: Path, stand_in: Any, options: dict[str, Any], why: str
) -> None:
    opened(tiny_graphs)
    opened(tiny_graphs, **options)
    assert len(stand_in.BUILT) == (4 if why == "nothing" else 8)


def test_a_newer_library_and_another_card_build_again(tiny_graphs: Path, stand_in: Any, cuda: Any) -> None:
    opened(tiny_graphs)
    stand_in.VERSION["tensorrt"] = sys.modules["tensorrt"].__version__ = "10.15.0"  # type: ignore[attr-defined]
    opened(tiny_graphs)
    assert len(stand_in.BUILT) == 8
    cuda.DEVICE["name"] = b"Another"
    opened(tiny_graphs)
    assert len(stand_in.BUILT) == 12
    opened(tiny_graphs, hardware="capability")
    cuda.DEVICE["name"] = b"Of the same capability"
    opened(tiny_graphs, hardware="capability")
    assert len(stand_in.BUILT) == 16


@pytest.mark.parametrize("harm", ["cut", "no json", "json", "another key"])
def test_a_damaged_engine_is_built_again(tiny_graphs: Path, stand_in: Any, cache: Path, harm: str) -> None:
    opened(tiny_graphs)
    engine = next(
        file
        for file in (cache / "engines").glob("*.engine")
        if json.loads(file.with_suffix(".json").read_text())["key"]["graph"] == "unet"
    )
    about = engine.with_suffix(".json")
    held = json.loads(about.read_text(encoding="utf-8"))
    match harm:
        case "cut":
            engine.write_bytes(engine.read_bytes()[:-1])
        case "no json":
            about.unlink()
        case "json":
            about.write_text("{", encoding="utf-8")
        case _:
            held["key"]["target"] = "another"
            about.write_text(json.dumps(held), encoding="utf-8")
    opened(tiny_graphs)
    assert [Path(one["path"]).parent.name for one in stand_in.BUILT[4:]] == ["unet"]
    opened(tiny_graphs)
    assert len(stand_in.BUILT) == 5
    assert not list((cache / "engines").glob(".*"))


def test_two_builds_of_one_engine_leave_one_whole(tiny_graphs: Path, cache: Path) -> None:
    """Whatever their order: the second begins before the first is done, and ends after it or before."""
    artefacts, store = open_artefacts(tiny_graphs), EngineStore()
    key = engine_key(artefacts, "unet", EngineOptions(), library="tensorrt", version="10.14.1", target="card")
    for first_ends_first in (True, False):
        builds = [store.written(key, {}) for _ in range(2)]
        for name, part in zip(("one", "two"), [build.__enter__() for build in builds], strict=True):
            part.write_text(f"{name} {first_ends_first}", encoding="utf-8")
        for build in builds if first_ends_first else reversed(builds):
            build.__exit__(None, None, None)
        found = store.find(key)
        assert found is not None
        assert (
            found[0].read_text(encoding="utf-8")
            == f"{'two' if first_ends_first else 'one'} {first_ends_first}"
        )
        assert len(list(store.folder.iterdir())) == 2


def test_an_engine_that_the_library_refuses_is_built_again_and_said(
    tiny_graphs: Path, stand_in: Any, cache: Path
) -> None:
    opened(tiny_graphs)
    for file in (cache / "engines").glob("*.engine"):
        file.write_bytes(file.read_bytes().replace(b"10.14.1", b"10.13.0"))
        about = file.with_suffix(".json")
        held = json.loads(about.read_text(encoding="utf-8")) | {"engine": file_digest(file)}
        about.write_text(json.dumps(held), encoding="utf-8")
    runtime = opened(tiny_graphs)
    assert len(stand_in.BUILT) == 8
    assert "unet's engine was not usable (Version tag does not match: 10.13.0), and is built again" in (
        runtime.notes
    )


def test_new_weights_go_into_an_engine_that_is_there(
    tiny_graphs: Path, tmp_path: Path, stand_in: Any
) -> None:
    import onnx

    first = opened(tiny_graphs, refit=True)
    other = shutil.copytree(tiny_graphs, tmp_path / "other")
    file = other / "unet" / GRAPH_FILE
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 4:
            changed = onnx.numpy_helper.to_array(tensor) * np.float32(1.5)
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    for old in (other / "unet").glob("model.*"):
        old.unlink()
    onnx.save(model, file)
    held = json.loads((other / MANIFEST).read_text(encoding="utf-8"))
    held["files"] = {n: d for n, d in held["files"].items() if not n.startswith("unet/model.")}
    held["files"]["unet/" + GRAPH_FILE] = file_digest(file)
    (other / MANIFEST).write_text(json.dumps(held), encoding="utf-8")
    refitted = opened(other, refit=True)
    assert len(stand_in.BUILT) == 4
    assert all("REFIT" in one["flags"] for one in stand_in.BUILT)
    expected, _ = open_sessions(open_artefacts(other), backend="onnxruntime", device="cpu", dtype="auto")
    feeds = unet_feeds(2)
    found = refitted._unet(*feeds)
    assert np.allclose(found, expected._unet(*feeds), atol=1e-6)
    assert not np.allclose(found, first._unet(*feeds), atol=1e-2)


def test_engines_that_another_machine_built_are_taken(
    tiny_graphs: Path, tmp_path: Path, stand_in: Any
) -> None:
    from ritocco_export.tensorrt_build import build_all

    said: list[str] = []
    build_all(
        open_artefacts(tiny_graphs),
        library="tensorrt-rtx",
        options=EngineOptions(),
        targets=["sm86", "sm89"],
        folder=tmp_path / "engines",
        say=said.append,
    )
    assert len(stand_in.BUILT) == 8
    opened(tiny_graphs, "tensorrt-rtx", engines=str(tmp_path / "engines"))
    assert len(stand_in.BUILT) == 8
    opened(tiny_graphs, "tensorrt-rtx")
    assert len(stand_in.BUILT) == 12


def test_rows_go_through_the_profile_that_takes_them(
    tiny_graphs: Path, tmp_path: Path, stand_in: Any
) -> None:
    runtime, plain = beside(with_profiles(tiny_graphs, tmp_path / "two"))
    session: Any = runtime._sessions["unet"]
    for rows, size, profile in ((3, (8, 8), 0), (3, (16, 16), 1), (1, (8, 8), 0), (4, (32, 32), 1)):
        feeds = unet_feeds(rows, *size)
        assert np.allclose(runtime._unet(*feeds), plain._unet(*feeds), atol=1e-6)
        assert session._profile == profile


def test_hoisted_steps_go_through_the_profile_of_their_size(
    tiny_hoisted_graphs: Path, tmp_path: Path, stand_in: Any
) -> None:
    runtime, plain = beside(with_profiles(tiny_hoisted_graphs, tmp_path / "two"))
    session: Any = runtime._sessions["unet_step"]
    for cells, profile in (((8, 8), 0), ((16, 16), 1)):
        lanes = [
            random_lane("DDIM", 4, seed, guidance, cells=cells, width=32)
            for seed, guidance in enumerate((5.0, 1.0, 3.0))
        ]
        size = LatentSize(height=cells[0], width=cells[1])
        for ours, theirs in zip(walk(runtime, size, lanes), walk(plain, size, lanes), strict=True):
            np.testing.assert_allclose(ours.latents, theirs.latents, atol=1e-4 * np.abs(theirs.latents).max())
        assert session._profile == profile


def test_what_steps_share_is_copied_to_the_device_once(
    tiny_hoisted_graphs: Path, stand_in: Any, cuda: Any
) -> None:
    runtime = opened(tiny_hoisted_graphs)
    size = LatentSize(height=8, width=8)
    batch = runtime.open(size, 1)
    batch.join(0, random_lane("DDIM", 4, 1, 5.0, cells=(8, 8), width=32))
    copied = []
    for index in range(4):
        cuda.CALLS.clear()
        batch.step({0: index})
        copied.append(Counter(call[0] for call in cuda.CALLS)["HostToDevice"])
    inputs = len(open_artefacts(tiny_hoisted_graphs).contract["unet_step"].inputs)
    assert copied == [inputs, 3, 3, 3]  # latents, rows, time


def test_a_size_between_the_profiles_is_refused_before_anything_runs(
    tiny_graphs: Path, tmp_path: Path, ask: Any, stand_in: Any
) -> None:
    graphs = with_profiles(tiny_graphs, tmp_path / "two")
    engine = ritocco.load(graphs, backend="tensorrt")
    with pytest.raises(
        RequestError, match=r"width is 64 and input\.height 128, which none of the 2 profiles"
    ):
        engine.predict(ask(size=(64, 128)))
    assert engine.predict(ask(size=(128, 64))).status == "succeeded"
    with pytest.raises(BackendError, match="unet: 16 x 8 cells is in none of the 2 profiles"):
        opened(graphs)._unet(*unet_feeds(1, 16, 8))


def test_buffers_stay_and_graphs_are_replayed(tiny_graphs: Path, stand_in: Any, cuda: Any) -> None:
    runtime = opened(tiny_graphs)
    cuda.CALLS.clear()
    outputs = [runtime._unet(*unet_feeds(2)) for _ in range(4)]
    counts = Counter(call[0] for call in cuda.CALLS)
    assert (counts["malloc"], counts["begin capture"], counts["replay"]) == (4, 1, 3)
    assert all((output == outputs[0]).all() for output in outputs)
    cuda.CALLS.clear()
    runtime._unet(*unet_feeds(1))
    counts = Counter(call[0] for call in cuda.CALLS)
    assert counts == {"destroy graph": 1, "HostToDevice": 3, "DeviceToHost": 1, "synchronize": 1}
    cuda.CALLS.clear()
    runtime._unet(*unet_feeds(2, 16, 16))
    counts = Counter(call[0] for call in cuda.CALLS)
    assert (counts["malloc"], counts["free"]) == (2, 2), "timestep and context fit where they were"


def test_graphs_are_not_replayed_where_that_is_switched_off(
    tiny_graphs: Path, stand_in: Any, cuda: Any
) -> None:
    runtime = opened(tiny_graphs, cuda_graph=False)
    cuda.CALLS.clear()
    for _ in range(3):
        runtime._unet(*unet_feeds(2))
    assert "replay" not in {call[0] for call in cuda.CALLS}


def test_an_engine_that_cant_be_captured_runs_as_it_is(
    tiny_graphs: Path, stand_in: Any, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BackendError("capture a graph: not permitted")

    monkeypatch.setattr(Cuda, "captured", refuse)
    runtime = opened(tiny_graphs)
    with pytest.warns(RuntimeWarning, match="unet runs without a CUDA graph.*not permitted") as said:
        outputs = [runtime._unet(*unet_feeds(2)) for _ in range(4)]
    assert len(said) == 1
    assert all((output == outputs[0]).all() for output in outputs)


def test_an_engines_key_has_every_byte_of_large_weights(tiny_graphs: Path) -> None:
    artefacts = open_artefacts(tiny_graphs)
    assert artefacts.manifest is not None
    whole = replace(artefacts.manifest, sha256={"unet/model.onnx.data": "of every byte"})
    found = weights_of(replace(artefacts, manifest=whole), "unet")
    assert found["unet/model.onnx.data"] == "of every byte"
    assert found.keys() == weights_of(artefacts, "unet").keys()


def test_everything_is_given_back(tiny_graphs: Path, stand_in: Any, cuda: Any, ask: Any) -> None:
    import gc

    before = cuda.allocated()
    engine = ritocco.load(tiny_graphs, backend="tensorrt")
    engine.predict(ask())
    assert cuda.allocated() > before
    engine.close()
    gc.collect()
    assert cuda.allocated() == before


def test_rtx_replays_by_itself_and_keeps_its_kernels(
    tiny_graphs: Path, stand_in: Any, cuda: Any, cache: Path
) -> None:
    runtime = opened(tiny_graphs, "tensorrt-rtx")
    session: Any = runtime._sessions["unet"]
    assert session._context._config.cuda_graph_strategy == stand_in.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    for _ in range(2):
        runtime._unet(*unet_feeds(2))
    assert "begin capture" not in {call[0] for call in cuda.CALLS}
    (kept,) = (cache / "engines").glob("kernels*")
    assert kept.read_bytes() == b"kernels 2x9x8x8x2x2x77x32"
    again: Any = opened(tiny_graphs, "tensorrt-rtx")._sessions["unet"]
    assert again._context._config._cache._kernels == {"2x9x8x8x2x2x77x32"}


def test_options_reach_the_builder(tiny_graphs: Path, stand_in: Any, cache: Path) -> None:
    opened(tiny_graphs, hardware="ampere+", version_compatible=True, level=4, workspace_bytes=99)
    built = stand_in.BUILT[0]
    assert built["flags"] == ["VERSION_COMPATIBLE"]  # TF32 is off: float32 means float32
    assert built["set"] == {
        "hardware_compatibility_level": "AMPERE_PLUS",
        "builder_optimization_level": 4,
        "workspace": 99,
    }
    (timings,) = (cache / "engines").glob("timing*")
    assert timings.read_bytes() == b"timed " * 4
    timings.write_bytes(b"another GPU")
    opened(tiny_graphs, hardware="ampere+", level=3)
    assert timings.read_bytes() == b"timed " * 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fast": True}, r"backend_options has 'fast'; known are cuda_graph"),
        ({"level": True}, r"backend_options\['level'\] is True; it must be 0 to 5"),
        ({"level": 2.0}, r"backend_options\['level'\] is 2\.0; it must be 0 to 5"),
        ([1], r"backend_options is \[1\]; it must be a dict"),
        ({"level": 9}, r"backend_options\['level'\] is 9; it must be 0 to 5"),
        ({"refit": "yes"}, r"backend_options\['refit'\] is 'yes'; it must be True or False"),
        ({"workspace_bytes": True}, "must be a number of bytes"),
        ({"workspace_bytes": -1}, "must be a number of bytes from 1 on"),
        ({"hardware": "any"}, "must be gpu, capability, ampere"),
    ],
)
def test_options_that_make_no_sense(options: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        EngineOptions.parse(options)
    with pytest.raises(RequestError, match=said):
        ritocco.load("no/such/model", backend_options=options)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_options_of_tensorrt_are_refused_elsewhere(tiny_graphs: Path, backend: str) -> None:
    with pytest.raises(BackendError, match="backend_options are for TensorRT"):
        ritocco.load(tiny_graphs, backend=backend, device="cpu", backend_options={"refit": True})


@pytest.mark.parametrize(
    ("device", "state", "said"),
    [
        ("cpu", {}, "TensorRT runs on cuda and cuda:N"),
        ("cuda:1", {}, "the driver sees 1 CUDA devices"),
        ("auto", {"count": -1}, "CUDA could not look for GPUs: cudaErrorInsufficientDriver"),
        ("auto", {"count": -2}, "CUDA could not look for GPUs: Failed to dlopen libcuda.so.1"),
        ("auto", {"count": 0}, "the driver sees 0 CUDA devices"),
    ],
)
def test_machines_that_can_not(cuda: Any, device: str, state: dict[str, Any], said: str) -> None:
    cuda.DEVICE.update(state)
    with pytest.raises(BackendError, match=said):
        Cuda(device)


def test_rtx_names_the_cards_that_it_takes(tiny_graphs: Path, stand_in: Any, cuda: Any) -> None:
    cuda.DEVICE.update(name=b"NVIDIA H100", major=9, minor=0)
    with pytest.raises(BackendError, match=r"NVIDIA H100 has compute capability 9.0.*backend tensorrt"):
        opened(tiny_graphs, "tensorrt-rtx")
    cuda.DEVICE.update(name=b"RTX 5090", major=12, minor=0)
    gpu = Cuda("auto").gpu
    assert target_of("tensorrt-rtx", EngineOptions(), gpu) == "sm120"
    assert target_of("tensorrt", EngineOptions(), gpu) == "RTX 5090 sm120"


def test_a_folder_without_manifest_has_a_key_too(tiny_optimum_graphs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_optimum_graphs, tmp_path / "theirs")
    (folder / MANIFEST).unlink()
    artefacts = open_artefacts(folder)
    assert weights_of(artefacts, "unet") == weights_of(open_artefacts(tiny_optimum_graphs), "unet")
    key = engine_key(artefacts, "unet", EngineOptions(), library="tensorrt", version="10.14.1", target="sm89")
    assert EngineStore(tmp_path / "store").find(key) is None


def test_bfloat16_graphs_run_on_the_bindings(
    tiny_bfloat16_graphs: Path, tiny_graphs: Path, stand_in: Any, cuda: Any
) -> None:
    """What goes in and comes out is rounded to 8 bits on the way; the rest is OpenVINO's arithmetic."""
    runtime, wide = opened(tiny_bfloat16_graphs), opened(tiny_graphs)
    assert (runtime.traits.dtype, wide.traits.dtype) == ("bfloat16", "float32")
    assert dict(cast(Any, runtime)._sessions["unet"].dtypes) == dict.fromkeys(
        ("sample", "timestep", "context"), "float32"
    )
    for _ in range(3):  # the third is replayed
        found, wanted = (one._unet(*unet_feeds(2)) for one in (runtime, wide))
        assert found.dtype == np.float32
        error = np.abs(found - wanted)
        assert 0 < error.max() < 0.15 * np.abs(wanted).max()
    with pytest.raises(BackendError, match="these graphs are bfloat16"):
        open_sessions(
            open_artefacts(tiny_bfloat16_graphs), backend="tensorrt", device="auto", dtype="float16"
        )


def test_bfloat16_is_rounded_as_torch_does() -> None:
    import torch

    values = np.random.default_rng(3).standard_normal(4096).astype(np.float32) * np.float32(1e3)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 3.3895e38, 1.00390625, 1.01171875, 1e-40], np.float32)
    values = np.concatenate([values, special])
    wanted = torch.from_numpy(values).to(torch.bfloat16)
    assert (to_bfloat16(values) == wanted.view(torch.uint16).numpy()).all()
    assert (from_bfloat16(to_bfloat16(values)) == wanted.float().numpy()).all()
    bits = np.array([0x7F800001, 0xFFFFFFFF], np.uint32)
    assert np.isnan(from_bfloat16(to_bfloat16(bits.view(np.float32)))).all()


def auto(graphs: Path, device: str = "auto", **options: Any) -> tuple[SessionRuntime, tuple[str, ...]]:
    return open_sessions(open_artefacts(graphs), backend="auto", device=device, dtype="auto", options=options)


def test_auto_takes_engines_that_were_built_and_builds_none(tiny_graphs: Path, stand_in: Any) -> None:
    runtime, reasons = auto(tiny_graphs)
    assert reasons[0].startswith("openvino on cpu")
    assert stand_in.BUILT == []
    opened(tiny_graphs)
    runtime, reasons = auto(tiny_graphs)
    assert (runtime.traits.device, reasons[0]) == (
        "cuda:0",
        "tensorrt on cuda:0: the fastest that is installed",
    )
    assert len(stand_in.BUILT) == 4
    assert auto(tiny_graphs, device="cpu")[1][0].startswith("openvino on cpu")


def test_auto_leaves_engines_for_another_card_or_with_a_part_gone(
    tiny_graphs: Path, stand_in: Any, cuda: Any, cache: Path
) -> None:
    opened(tiny_graphs)
    cuda.DEVICE["name"] = b"Another"
    assert auto(tiny_graphs)[1][0].startswith("openvino on cpu")
    cuda.DEVICE["count"] = 0
    assert auto(tiny_graphs)[1][0].startswith("openvino on cpu")
    cuda.reset()
    next((cache / "engines").glob("*.engine")).unlink()
    assert auto(tiny_graphs)[1][0].startswith("openvino on cpu")
    assert len(stand_in.BUILT) == 4


def test_auto_takes_engines_of_tensorrt_rtx(tiny_graphs: Path, stand_in: Any, cuda: Any) -> None:
    cuda.DEVICE.update(major=8, minor=9)
    opened(tiny_graphs, "tensorrt-rtx")
    _, reasons = auto(tiny_graphs, via="bindings")
    assert reasons[0].startswith("tensorrt-rtx on cuda:0")


def test_auto_takes_engines_of_a_checkpoints_graphs_in_the_cache(
    tiny_checkpoint: Path,
    tiny_graphs: Path,
    stand_in: Any,
    cuda: Any,
    cache: Path,
    ask: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def runs(device: str = "auto") -> tuple[str, str]:
        with ritocco.load(tiny_checkpoint, device=device, dtype="float32") as engine:
            return engine.traits.device, engine.predict(ask()).logs

    graphs = cache / "graphs" / open_artefacts(tiny_graphs).version[:32]
    shutil.copytree(tiny_graphs, graphs)
    assert "Running torch on cpu" in runs()[1], "no engine was built"
    ritocco.load(tiny_checkpoint, backend="tensorrt", dtype="float32").close()
    assert len(stand_in.BUILT) == 4
    device, logs = runs()
    assert device == "cuda:0"
    assert "Running tensorrt on cuda:0: the fastest that is installed" in logs
    assert runs("cuda")[0] == "cuda:0"
    assert "Running torch on cpu" in runs("cpu")[1]
    cuda.DEVICE["name"] = b"Another"
    assert "Running torch on cpu" in runs()[1]
    cuda.reset()
    monkeypatch.setattr("ritocco.backends.tensorrt_._Opener.session", no_memory)
    logs = runs()[1]
    assert "Not on tensorrt, though its graphs are in the cache: no memory" in logs
    assert "Running torch on cpu" in logs
    assert len(stand_in.BUILT) == 4


def no_memory(*args: object, **kwargs: object) -> None:
    raise BackendError("no memory")


def test_an_installed_tensorrt_is_named_where_it_was_not_taken(
    tiny_graphs: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritocco.backends.cuda.driver_here", lambda: False)
    (line,) = build_command("cuda:0")
    assert line.startswith("Installed: tensorrt. --backend tensorrt builds its engines once")
    assert build_command("cpu") == ()
    monkeypatch.setattr("ritocco.backends.cuda.driver_here", lambda: True)
    assert build_command("cpu") == (line,)
    _, reasons = auto(tiny_graphs)
    assert reasons[0].startswith("openvino on cpu")
    assert reasons[-1] == line
    _, reasons = open_sessions(open_artefacts(tiny_graphs), backend="auto", device="cpu", dtype="auto")
    assert line not in reasons, "the CPU was asked for"


def test_builds_are_told_of(tiny_graphs: Path, stand_in: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ritocco")
    opened(tiny_graphs)
    said = [record.getMessage() for record in caplog.records]
    assert sum("building for" in line and "takes minutes, once" in line for line in said) == 4
    assert "unet: warning: a warning of the builder" in said
    caplog.clear()
    opened(tiny_graphs)
    assert not caplog.records
