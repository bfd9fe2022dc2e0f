"""The commands that `ritocco export --trtexec` prints: what a shell makes of them."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ritocco.artefacts import MANIFEST, open_artefacts
from ritocco.cli import _add_plugins, app
from ritocco.errors import RequestError
from ritocco_export.trtexec import commands


@pytest.fixture
def graphs(tiny_graphs: Path, tmp_path: Path) -> Path:
    """Of two profiles, in a folder whose name a shell would take apart."""
    folder = shutil.copytree(tiny_graphs, tmp_path / "the $graphs")
    held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    small = {"M": [1, 2, 4], "H": [8, 8, 8], "W": [8, 16, 16]}
    large = {"M": [1, 2, 2], "H": [8, 32, 32], "W": [8, 32, 32]}
    held["profiles"] = [held["ranges"] | {"unet": one} for one in (small, large)]
    (folder / MANIFEST).write_text(json.dumps(held), encoding="utf-8")
    return folder


def lines(text: str, tool: str) -> list[list[str]]:
    """The commands of a tool, as a shell splits them."""
    whole = text.replace("\\\n", "")
    return [shlex.split(line) for line in whole.splitlines() if line.startswith(tool)]


def test_trtexec_has_a_block_for_each_profile(graphs: Path) -> None:
    _, unet, encoder, _ = lines(commands(open_artefacts(graphs)), "trtexec")
    assert unet == [
        "trtexec",
        f"--onnx={graphs / 'unet' / 'model.onnx'}",
        "--saveEngine=unet.engine",
        "--stronglyTyped",
        "--noTF32",
        "--skipInference",
        "--profile=0",
        "--minShapes=sample:1x9x8x8,timestep:1,context:1x77x32",
        "--optShapes=sample:2x9x8x16,timestep:2,context:2x77x32",
        "--maxShapes=sample:4x9x8x16,timestep:4,context:4x77x32",
        "--profile=1",
        "--minShapes=sample:1x9x8x8,timestep:1,context:1x77x32",
        "--optShapes=sample:2x9x32x32,timestep:2,context:2x77x32",
        "--maxShapes=sample:2x9x32x32,timestep:2,context:2x77x32",
    ]
    assert encoder[6:8] == ["--profile=0", "--minShapes=pixels:1x3x64x64"]
    assert "--profile=1" not in encoder


def test_polygraphy_has_shapes_for_each_profile(graphs: Path) -> None:
    text, unet, *_ = lines(commands(open_artefacts(graphs)), "polygraphy")
    assert unet[:5] == ["polygraphy", "convert", str(graphs / "unet" / "model.onnx"), "--convert-to", "trt"]
    assert unet[5:8] == ["--strongly-typed", "-o", "unet.engine"]
    assert unet.count("--trt-opt-shapes") == 2
    first = unet.index("--trt-max-shapes")
    assert unet[first + 1 : first + 4] == ["sample:[4,9,8,16]", "timestep:[4]", "context:[4,77,32]"]
    assert text[8::2] == ["--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes"]
    assert text[9::2] == ["tokens:[1,77]", "tokens:[2,77]", "tokens:[2,77]"]


def test_a_scalar_and_a_static_graph_have_no_shapes(tiny_optimum_graphs: Path, graphs: Path) -> None:
    _, unet, *_ = lines(commands(open_artefacts(tiny_optimum_graphs)), "trtexec")
    assert "--minShapes=sample:1x9x8x8,encoder_hidden_states:1x77x32" in unet
    held = json.loads((graphs / MANIFEST).read_text(encoding="utf-8"))
    one = {
        graph: {symbol: [sizes[1]] * 3 for symbol, sizes in ranges.items()}
        for graph, ranges in held["ranges"].items()
    }
    (graphs / MANIFEST).write_text(json.dumps(held | {"ranges": one, "profiles": [one]}), encoding="utf-8")
    said = commands(open_artefacts(graphs))
    assert "Shapes" not in said
    assert "-shapes" not in said
    assert "# unet: one size" in said


def test_the_command_line_prints_them(graphs: Path) -> None:
    _add_plugins()
    done = CliRunner().invoke(app, ["export", "--trtexec", str(graphs)])
    assert done.exit_code == 0
    assert done.stdout == commands(open_artefacts(graphs))
    assert done.stdout.count("# ") == 4
    both = CliRunner().invoke(app, ["export", "--trtexec", str(graphs), "--check", str(graphs)])
    assert isinstance(both.exception, RequestError)
