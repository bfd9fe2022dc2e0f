"""The compatibility check: our graphs are clean, and every kind of planted violation is caught by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from ritocco.artefacts import open_artefacts
from ritocco.cli import _add_plugins, app
from ritocco.nets.io import GRAPHS, NetworkIO, Port
from ritocco_export.tensorrt_check import OPSETS, check_graph, check_model, matrix

IO = NetworkIO(
    inputs=(Port(name="x", shape=("M", 4, "H", "W"), dtype="float32"),),
    outputs=(Port(name="y", shape=("M", 4, "H", "W"), dtype="float32"),),
    ranges={"M": (1, 2, 4), "H": (8, 8, 16), "W": (8, 8, 16)},
    multiples={},
)
F = TensorProto.FLOAT
SHAPE: Sequence[str | int] = ["rows", 4, "h", "w"]


def model(
    *nodes: onnx.NodeProto,
    kind: int = F,
    name: str = "x",
    shape: Sequence[str | int] | None = None,
    opset: int = 20,
    constants: tuple[onnx.TensorProto, ...] = (),
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """Nodes between the input x and the output y."""
    graph = helper.make_graph(
        list(nodes),
        "planted",
        [helper.make_tensor_value_info(name, kind, shape or SHAPE)],
        [helper.make_tensor_value_info("y", F, None)],
        list(constants),
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports)


def node(kind: str, inputs: tuple[str, ...] = ("x",), output: str = "y", **more: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [output], name=f"the_{kind}", **more)


def int64(name: str, *values: int) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def floats(name: str, *values: float) -> onnx.TensorProto:
    return helper.make_tensor(name, F, [len(values)], values)


SCALES = floats("scales", 1, 1, 2, 2)
RESIZE = ("x", "", "scales")
VIOLATIONS: dict[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    "opset": (lambda: model(node("Relu"), opset=22), "opset", "opset 22; TensorRT 10.1 reads 9 to 20"),
    "custom": (
        lambda: model(node("Fused", domain="com.microsoft"), domains=("com.microsoft",)),
        "domain",
        r"com\.microsoft\.Fused",
    ),
    "operator": (lambda: model(node("Bernoulli")), "operator", "Bernoulli is not supported"),
    "unknown": (lambda: model(node("NotThere")), "operator", "NotThere is not supported"),
    "double": (
        lambda: model(node("Cast", to=TensorProto.DOUBLE, output="d"), node("Relu", ("d",))),
        "type",
        "Cast in DOUBLE",
    ),
    "integers": (
        lambda: model(
            node("Cast", to=TensorProto.INT32, output="i"),
            node("Sigmoid", ("i",), "s"),
            node("Cast", ("s",), to=F),
        ),
        "type",
        "Sigmoid in INT32",
    ),
    "double input": (lambda: model(node("Relu"), kind=TensorProto.DOUBLE), "input type", "float64"),
    "timestep": (
        lambda: model(node("Relu", ("timestep",)), kind=TensorProto.INT64, name="timestep", shape=["rows"]),
        "input type",
        "fractional timesteps",
    ),
    "channels": (lambda: model(node("Relu"), shape=["rows", "c", "h", "w"]), "profile", "axis 1 is dynamic"),
    "axes": (lambda: model(node("Relu"), shape=["rows", 4]), "contract", "2 axes; the contract has 4"),
    "port": (lambda: model(node("Relu", ("z",)), name="z"), "contract", "does not have"),
    "nonzero": (
        lambda: model(node("NonZero", output="n"), node("Cast", ("n",), to=F)),
        "data-dependent",
        "depends on the data",
    ),
    "cubic": (
        lambda: model(node("Resize", RESIZE, mode="cubic"), constants=(SCALES,)),
        "attribute",
        "Resize with mode cubic",
    ),
    "antialias": (
        lambda: model(node("Resize", RESIZE, mode="linear", antialias=1), constants=(SCALES,)),
        "attribute",
        "antialias",
    ),
    "axes of a slice": (
        lambda: model(
            node("Shape", output="s"),
            node("Slice", ("x", "zero", "one", "s")),
            constants=(int64("zero", 0), int64("one", 1)),
        ),
        "attribute",
        "Slice with axes that are no constant",
    ),
}


def test_the_matrix_is_whole() -> None:
    assert (OPSETS[0], OPSETS[-1]) == (9, 20)
    assert len(matrix()) == 196
    assert matrix()["Conv"].types == {"FP32", "FP16", "BF16"}
    assert not matrix()["Bernoulli"].supported
    assert set().union(*(row.types for row in matrix().values())) <= {
        "FP32", "FP16", "BF16", "FP8", "INT4", "INT8", "UINT8", "INT32", "INT64", "BOOL",
    }  # fmt: skip


def test_a_clean_model_passes() -> None:
    assert check_model(model(node("Relu")), IO) == []


@pytest.mark.parametrize("planted", VIOLATIONS)
def test_planted_violations_are_caught_by_name(planted: str) -> None:
    make, rule, said = VIOLATIONS[planted]
    found = check_model(make(), IO)
    assert any(finding.rule == rule and finding.level == "error" for finding in found), found
    assert re.search(said, " ".join(finding.message for finding in found))


@pytest.mark.parametrize("name", GRAPHS)
def test_our_graphs_are_clean(tiny_graphs: Path, tiny_half_graphs: Path, name: str) -> None:
    for folder in (tiny_graphs, tiny_half_graphs):
        artefacts = open_artefacts(folder)
        found = check_graph(artefacts.graph(name), artefacts.contract[name])  # type: ignore[index, arg-type]
        assert [finding for finding in found if finding.level == "error"] == []


def test_what_is_not_onnx_is_invalid(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"not a model")
    (finding,) = check_graph(file, IO)
    assert (finding.level, finding.rule) == ("error", "valid")


def run(*arguments: str) -> tuple[int, str]:
    _add_plugins()
    done = CliRunner().invoke(app, ["export", *arguments])
    return done.exit_code, done.stdout


def test_the_command_says_whether_a_folder_is_in_order(tiny_graphs: Path, tmp_path: Path) -> None:
    status, text = run("--check", str(tiny_graphs))
    assert (status, text.splitlines()[-1]) == (0, "passed")
    assert text.count("parity") == 4
    folder = shutil.copytree(tiny_graphs, tmp_path / "damaged")
    (folder / "unet" / "model.onnx").write_bytes(b"x")
    status, text = run("--check", str(folder), "--json")
    assert status == 1
    held = json.loads(text)
    assert not held["passed"]
    assert "changed since it was exported" in held["findings"]["folder"][0]["message"]


def test_a_folder_without_manifest_is_noted(tiny_optimum_graphs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_optimum_graphs, tmp_path / "theirs")
    (folder / "ritocco.json").unlink()
    status, text = run("--check", str(folder))
    assert status == 0
    assert "somebody else's export" in text
