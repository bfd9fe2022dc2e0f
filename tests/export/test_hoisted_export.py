"""`ritocco export --hoisted`: what the two graphs hold, the gate around them, and options that don't fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from ritocco.artefacts import GRAPH_FILE, open_artefacts, read_manifest
from ritocco.checkpoint import open_checkpoint
from ritocco.cli import _add_plugins, app
from ritocco.errors import CheckpointError, RequestError
from ritocco.nets.io import HOISTED_GRAPHS
from ritocco_export import exporter, hoisted
from ritocco_export.exporter import export_checkpoint
from ritocco_export.gate import compare_hoisted
from ritocco_export.profiles import Profile, ranges_of
from ritocco_export.tensorrt_check import check_graph

UNET = ("unet_once", "unet_step")


def graph_of(folder: Path, name: str) -> onnx.ModelProto:
    return onnx.load(folder / name / GRAPH_FILE, load_external_data=False)


def ports(values: Any) -> dict[str, tuple[str, list[str | int]]]:
    return {
        value.name: (
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def export(checkpoint: Path, out: Path, *, profile: str, **options: Any) -> Path:
    profiles = [Profile.parse(profile)]
    export_checkpoint(open_checkpoint(checkpoint), out, profiles=profiles, hoisted=True, **options)
    return out


def test_the_manifest_says_hoisted(tiny_hoisted_graphs: Path, tiny_graphs: Path) -> None:
    manifest = read_manifest(tiny_hoisted_graphs)
    assert manifest.hoisted
    assert not read_manifest(tiny_graphs).hoisted
    assert set(manifest.ranges) == set(HOISTED_GRAPHS)
    assert manifest.ranges["unet_step"] == {
        "N": (1, 1, 2),
        "M": (1, 2, 4),
        "H": (8, 32, 32),
        "W": (8, 32, 32),
    }
    assert manifest.ranges["unet_once"]["R"] == (1, 50, 512)
    # Each graph beside torch, and the two together beside the whole UNet.
    assert set(manifest.parity) == {*HOISTED_GRAPHS, "unet", "picture"}
    assert all(figures["error"] < 1e-4 for name, figures in manifest.parity.items() if name != "picture")
    assert not (tiny_hoisted_graphs / "unet" / GRAPH_FILE).exists()


def test_the_graphs_have_the_ports_of_the_contract(tiny_hoisted_graphs: Path) -> None:
    once, step = (graph_of(tiny_hoisted_graphs, name).graph for name in UNET)
    size: list[str | int] = ["2*height", "2*width"]
    assert ports(once.input) == {
        "timesteps": ("FLOAT", ["steps"]),
        "context": ("FLOAT", ["rows", 77, 32]),
        "condition": ("FLOAT", [1, 5, *size]),
    }
    found = ports(once.output)
    assert found["time"] == ("FLOAT", ["steps", 416])
    assert found["hoisted_condition"] == ("FLOAT", [1, 32, *size])
    assert found["keys_03"] == ("FLOAT", ["rows", 2, 77, 16])
    taken = ports(step.input)
    assert list(taken)[:4] == ["latents", "rows", "time", "hoisted_condition"]
    assert taken["latents"] == ("FLOAT", ["images", 4, *size])
    assert taken["rows"] == ("INT32", ["rows"])
    assert taken["time"] == ("FLOAT", ["images", 416])
    assert taken["keys_01"] == ("FLOAT", ["rows", 4, 77, 16])
    assert ports(step.output) == {"noise": ("FLOAT", ["rows", 4, *size])}
    assert set(found) == set(taken) - {"latents", "rows"}


@pytest.mark.parametrize("name", UNET)
def test_standard_operators_that_tensorrt_takes(tiny_hoisted_graphs: Path, name: str) -> None:
    model = graph_of(tiny_hoisted_graphs, name)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    assert "NonZero" not in {node.op_type for node in model.graph.node}, "shapes that depend on data"
    opened = open_artefacts(tiny_hoisted_graphs)
    assert check_graph(opened.graph(name), opened.contract[name]) == []  # type: ignore[arg-type, index]


def test_each_weight_is_written_once(tiny_hoisted_graphs: Path, tiny_graphs: Path) -> None:
    def numbers(folder: Path, name: str) -> int:
        kept = graph_of(folder, name).graph.initializer
        return sum(int(np.prod(tensor.dims)) for tensor in kept if tensor.data_type == onnx.TensorProto.FLOAT)

    whole = numbers(tiny_graphs, "unet")
    both = sum(numbers(tiny_hoisted_graphs, name) for name in UNET)
    assert 0.1 * whole < numbers(tiny_hoisted_graphs, "unet_once") < 0.5 * whole
    assert abs(both - whole) < 0.01 * whole
    # What the first graph does is not in the second.
    names = {tensor.name for tensor in graph_of(tiny_hoisted_graphs, "unet_step").graph.initializer}
    assert not [name for name in names if "time_emb" in name or "attn2.to_k" in name or "attn2.to_v" in name]


def test_the_check_of_a_folder(tiny_hoisted_graphs: Path, tmp_path: Path) -> None:
    _add_plugins()
    done = CliRunner().invoke(app, ["export", "--check", str(tiny_hoisted_graphs)])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "passed")
    assert done.output.count("parity") == 7
    folder = shutil.copytree(tiny_hoisted_graphs, tmp_path / "damaged")
    (folder / "unet_once" / GRAPH_FILE).unlink()
    done = CliRunner().invoke(app, ["export", "--check", str(folder)])
    assert done.exit_code == 1
    assert "unet_once/model.onnx: missing" in done.output


def test_optimums_layout_has_no_such_graphs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    _add_plugins()
    line = ["export", "--model", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*line, "--hoisted", "--layout", "optimum"])
    assert isinstance(done.exception, RequestError)
    assert "--hoisted with --layout optimum" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_the_command_line_asks_for_them(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(exporter, "export_checkpoint", lambda *args, hoisted, **rest: asked.append(hoisted))
    _add_plugins()
    line = ["export", "--model", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    for more in ([], ["--hoisted"]):
        assert CliRunner().invoke(app, [*line, *more]).exit_code == 0
    assert asked == [False, True]


def test_ranges_of_eight_pictures() -> None:
    found = ranges_of([Profile.parse("512x512@1..8")])
    assert found["unet_step"] == {"N": (1, 1, 8), "M": (1, 2, 16), "H": (64, 64, 64), "W": (64, 64, 64)}
    assert found["unet_once"] == {"R": (1, 50, 512), "M": (1, 2, 2), "H": (64, 64, 64), "W": (64, 64, 64)}


@pytest.mark.slow
def test_one_size_in_float16(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = export(tiny_checkpoint, tmp_path / "one", profile="128x64@2", static=True, dtype="float16")
    once, step = (graph_of(folder, name).graph for name in UNET)
    assert ports(once.input)["timesteps"] == ("FLOAT", [50])
    assert ports(once.input)["context"] == ("FLOAT16", [2, 77, 32])
    assert ports(step.input)["latents"] == ("FLOAT16", [2, 4, 8, 16])
    assert ports(step.input)["rows"] == ("INT32", [4])
    assert ports(step.input)["values_02"] == ("FLOAT16", [4, 2, 77, 16])
    parity = read_manifest(folder).parity
    assert parity["unet"]["arithmetic"] == "float32"
    assert parity["unet"]["error"] < 4e-3


@pytest.mark.slow
def test_bfloat16_is_written_and_gated(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = export(tiny_checkpoint, tmp_path / "brain", profile="64@1", dtype="bfloat16")
    step = graph_of(folder, "unet_step").graph
    assert ports(step.input)["keys_00"][0] == "BFLOAT16"
    assert ports(step.input)["rows"][0] == "INT32"
    parity = read_manifest(folder).parity
    assert {figures["arithmetic"] for figures in parity.values()} == {"float32"}
    assert parity["unet"]["error"] < 0.02


@pytest.mark.slow
def test_graphs_that_do_not_fit_together_are_not_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is what torch gives for it, but keys come where values are taken."""
    forward = hoisted.UNetOnceGraph.forward

    def swapped(self: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        time, condition, keys, values, *rest = forward(self, *inputs)
        return time, condition, values, keys, *rest

    monkeypatch.setattr(hoisted.UNetOnceGraph, "forward", swapped)
    with pytest.raises(CheckpointError, match="unet_step on unet_once: the float32 graph departs from torch"):
        export(tiny_checkpoint, tmp_path / "out", profile="64@1")
    assert not list(tmp_path.iterdir())


def test_the_gate_sees_a_weight_of_the_first_graph(
    tiny_hoisted_graphs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    contract = open_artefacts(tiny_hoisted_graphs).contract
    folder = shutil.copytree(tiny_hoisted_graphs, tmp_path / "graphs")
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert compare_hoisted(checkpoint, folder, contract, static=False).error < 1e-4
    file = folder / "unet_once" / GRAPH_FILE
    model = onnx.load(file)
    (bias,) = (one for one in model.graph.initializer if one.name.endswith("conv_in.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(bias), bias.name))
    onnx.save(model, file)
    with pytest.raises(CheckpointError, match=r"unet_step on unet_once: .* departs from torch"):
        compare_hoisted(checkpoint, folder, contract, static=False)
