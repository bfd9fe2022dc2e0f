"""Building engines, against stand-ins of TensorRT's API."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ritocco.artefacts import open_artefacts
from ritocco.backends.engine_store import EngineOptions
from ritocco.cli import _add_plugins, app
from ritocco.errors import BackendError, CheckpointError, RequestError
from ritocco_export.tensorrt_build import TARGETS, build_all, build_engine, structure

SURFACE = json.loads((Path(__file__).parent / "tensorrt_surface.json").read_text(encoding="utf-8"))


@pytest.fixture
def stand_in(standing_in: None) -> Iterator[Any]:
    cuda: Any = importlib.import_module("cuda.bindings.runtime")
    importlib.import_module("tensorrt")
    held: Any = importlib.import_module("trt_stand_in")
    cuda.reset()
    held.BUILT.clear()
    yield held
    cuda.reset()


def build(graphs: Path, out: Path, **changes: Any) -> list[str]:
    said: list[str] = []
    given: dict[str, Any] = {"library": "tensorrt", "options": EngineOptions(), "target": ""}
    build_engine(open_artefacts(graphs), "unet", out, say=said.append, **(given | changes))
    return said


def test_a_build_says_where_it_is_and_what_it_was_warned_of(
    tiny_graphs: Path, tmp_path: Path, stand_in: Any
) -> None:
    said = build(tiny_graphs, tmp_path / "unet.engine")
    assert said == ["unet: Building Engine: 2 steps", "unet: warning: a warning of the builder"]
    (built,) = stand_in.BUILT
    assert built["profiles"] == [
        {
            "sample": ([1, 9, 8, 8], [2, 9, 32, 32], [4, 9, 32, 32]),
            "timestep": ([1], [2], [4]),
            "context": ([1, 77, 32], [2, 77, 32], [4, 77, 32]),
        }
    ]
    assert json.loads((tmp_path / "unet.engine").read_bytes())["flavour"] == "tensorrt"


def test_rtx_builds_for_cards_by_name(tiny_graphs: Path, tmp_path: Path, stand_in: Any) -> None:
    build(tiny_graphs, tmp_path / "x", library="tensorrt-rtx", target="sm120")
    assert stand_in.BUILT[0]["set"] == {"num_compute_capabilities": 1, "capability": "SM120"}
    with pytest.raises(RequestError, match="are of TensorRT, not of tensorrt-rtx"):
        build(tiny_graphs, tmp_path / "y", library="tensorrt-rtx", options=EngineOptions(hardware="ampere+"))
    assert not (tmp_path / "y").exists()


def test_a_graph_that_the_parser_does_not_take(tiny_graphs: Path, tmp_path: Path, stand_in: Any) -> None:
    artefacts = open_artefacts(tiny_graphs)
    broken = tmp_path / "broken"
    (broken / "unet").mkdir(parents=True)
    (broken / "unet" / "model.onnx").write_bytes(b"no graph")
    object.__setattr__(artefacts, "path", broken)
    with pytest.raises(CheckpointError, match=r"unet.model\.onnx: tensorrt's parser does not take it"):
        build_engine(
            artefacts, "unet", tmp_path / "x", library="tensorrt", options=EngineOptions(), target=""
        )


def test_a_builder_that_does_not_start_or_gives_nothing(
    tiny_graphs: Path, tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda: Any = importlib.import_module("cuda.bindings.runtime")
    cuda.DEVICE["count"] = -1
    with pytest.raises(BackendError, match=r"CUDA initialization failure.*needs an NVIDIA GPU and driver"):
        build(tiny_graphs, tmp_path / "x")
    cuda.reset()
    monkeypatch.setattr(stand_in.IOptimizationProfile, "set_shape", lambda *args: None)
    with pytest.raises(BackendError, match=r"can't build an engine .context: profile 0 has no shape"):
        build(tiny_graphs, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_command_line_builds_what_is_not_there(tiny_graphs: Path, tmp_path: Path, stand_in: Any) -> None:
    _add_plugins()
    words = ["export", "--engines", str(tiny_graphs), "--out", str(tmp_path / "e"), "--target", "sm86"]
    first = CliRunner().invoke(app, [*words, "--target", "sm89"])
    assert first.exit_code == 0, first.output
    assert len(first.stdout.split()) == 8
    assert "unet: building for sm86" in first.stderr
    second = CliRunner().invoke(app, words)
    assert second.stdout.split() == first.stdout.split()[:4]
    assert "building" not in second.stderr
    assert len(stand_in.BUILT) == 8
    bad = CliRunner().invoke(app, ["export", "--engines", str(tiny_graphs), "--library", "tpu"])
    assert isinstance(bad.exception, RequestError)


@pytest.mark.parametrize(("library", "target"), [("tensorrt-rtx", "sm90"), ("tensorrt", "sm89")])
def test_targets_that_nothing_builds_for(
    tiny_graphs: Path, tmp_path: Path, library: Any, target: str
) -> None:
    with pytest.raises(RequestError, match=f"--target is '{target}'; it must be sm75"):
        build_all(
            open_artefacts(tiny_graphs),
            library=library,
            options=EngineOptions(),
            targets=[target],
            folder=tmp_path,
            say=print,
        )


def test_a_structure_is_that_of_the_shape_and_not_of_the_weights(tiny_graphs: Path, tmp_path: Path) -> None:
    import onnx

    file = tiny_graphs / "vae_decoder" / "model.onnx"
    model = onnx.load(file)
    before = structure(file)
    weight = next(one for one in model.graph.initializer if len(one.dims) == 4)
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(values * 2, weight.name))
    onnx.save(model, tmp_path / "weights.onnx")
    assert structure(tmp_path / "weights.onnx") == before
    node = next(one for one in model.graph.node if one.op_type == "InstanceNormalization")
    onnx.helper.get_node_attr_value(node, "epsilon")
    next(one for one in node.attribute if one.name == "epsilon").f = 0.5
    onnx.save(model, tmp_path / "epsilon.onnx")
    assert structure(tmp_path / "epsilon.onnx") != before


@pytest.mark.parametrize(
    ("flavour", "library"),
    [("tensorrt", "tensorrt 10.3.0"), ("tensorrt_rtx", "tensorrt_rtx 1.7.1")],
)
def test_the_stand_in_has_only_names_of_the_library(flavour: str, library: str, stand_in: Any) -> None:
    """The names were read from NVIDIA's own bindings. `Later` ones are asked for with hasattr."""
    real = next(held for name, held in SURFACE.items() if name.startswith(library))
    later = next(held for name, held in SURFACE.items() if "only" in name)
    module = stand_in.library(flavour)
    shown = {name: held for name, held in vars(module).items() if not name.startswith("_")}
    for name in (
        "INetworkDefinition",
        "IOptimizationProfile",
        "ICudaEngine",
        "IExecutionContext",
        "ParserError",
    ):
        shown[name] = getattr(stand_in, name)
    shown["ITimingCache"] = stand_in.ITimingCache
    shown["IBuilderConfig"] = stand_in.ClassicConfig if flavour == "tensorrt" else stand_in.RtxConfig
    if flavour == "tensorrt_rtx":
        shown["IRuntimeConfig"], shown["IRuntimeCache"] = stand_in.IRuntimeConfig, stand_in.IRuntimeCache
    assert shown.keys() <= real.keys()
    checked = 0
    for name, held in shown.items():
        members = getattr(held, "__members__", None)
        used = set(members or (one for one in dir(held) if not one.startswith("_")))
        used |= set(getattr(held, "_known", ()))
        used -= {"made", "flavour", "needs_gpu", "Severity"}
        if flavour == "tensorrt" and name == "ICudaEngine":
            used.discard("create_runtime_config")  # of the other library
        allowed = set(real[name]) | set(later.get(name, ()))
        assert used <= allowed, f"{name}: {used - allowed}"
        checked += len(used)
    assert checked > 50
    assert set(stand_in.Severity.__members__) == set(real["ILogger.Severity"])
    if flavour == "tensorrt_rtx":
        assert {target.upper() for target in TARGETS} < set(real["ComputeCapability"])


def test_hoisted_graphs_get_engines_too(tiny_hoisted_graphs: Path, tmp_path: Path, stand_in: Any) -> None:
    files = build_all(
        open_artefacts(tiny_hoisted_graphs),
        library="tensorrt-rtx",
        options=EngineOptions(),
        targets=["sm89"],
        folder=tmp_path / "engines",
        say=lambda line: None,
    )
    built = [Path(one["path"]).parent.name for one in stand_in.BUILT]
    assert built == ["text_encoder", "unet_once", "unet_step", "vae_encoder", "vae_decoder"]
    assert len(files) == len(set(files)) == 5
    (step,) = stand_in.BUILT[2]["profiles"]
    assert {name: shapes[2][0] for name, shapes in step.items() if name in ("latents", "time")} == {
        "latents": 2,
        "time": 2,
    }


def test_engines_are_not_built_where_they_would_not_be_kept(
    tiny_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("RITOCCO_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(BackendError, match="the cache can't be written: name --out"):
        build_all(
            open_artefacts(tiny_graphs),
            library="tensorrt-rtx",
            options=EngineOptions(),
            targets=["sm89"],
            folder=None,
            say=print,
        )
