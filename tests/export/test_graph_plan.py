"""`ritocco plan` of exported graphs: what a request asks of each, and what that takes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
from typer.testing import CliRunner

import ritocco
from ritocco.artefacts import Artefacts, open_artefacts
from ritocco.cli import app
from ritocco.errors import BackendError, CheckpointError, RequestError
from ritocco.graph_plan import asked_of
from ritocco.nets.io import GRAPHS, HOISTED_GRAPHS, GraphName, Range
from ritocco.plans import asked_without_pictures
from ritocco_export.graph_memory import graph_plan
from ritocco_export.liveness import read_graph

Ask = Callable[..., dict[str, Any]]
Shapes = dict[str, tuple[int, ...]]


def plan(graphs: Path, *words: str) -> dict[str, Any]:
    told = CliRunner().invoke(app, ["plan", "--model", str(graphs), *words, "--json"])
    assert told.exit_code == 0, told.exception
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def heard(sessions: dict[GraphName, Any]) -> dict[GraphName, list[Shapes]]:
    """What each session is fed from now on."""
    shapes: dict[GraphName, list[Shapes]] = {name: [] for name in sessions}

    class Spy:
        def __init__(self, name: GraphName, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def run(self, feeds: Any) -> Any:
            shapes[self.name].append({port: value.shape for port, value in feeds.items()})
            return self.inner.run(feeds)

        def run_all(self, feeds: Any) -> Any:
            shapes[self.name].append({port: value.shape for port, value in feeds.items()})
            return self.inner.run_all(feeds)

    for name, session in list(sessions.items()):
        sessions[name] = Spy(name, session)
    return shapes


@pytest.mark.parametrize("folder", ["tiny_graphs", "tiny_hoisted_graphs", "tiny_optimum_graphs"])
@pytest.mark.parametrize(("count", "guidance"), [(1, 7.5), (3, 7.5), (3, 1.0)])
def test_what_is_asked_of_each_graph_is_its_largest_call(
    folder: str, count: int, guidance: float, ask: Ask, request: pytest.FixtureRequest
) -> None:
    """These graphs take two lanes of a step and four rows: three guided pictures go in parts."""
    graphs = request.getfixturevalue(folder)
    artefacts = open_artefacts(graphs)
    wishes = {"num_outputs": count, "guidance_scale": guidance, "scheduler": "PNDM"}
    wishes |= {"num_inference_steps": 3}
    given = ask(size=(128, 64), disable_safety_checker=True, **wishes)
    asked = asked_of(artefacts, asked_without_pictures({"width": 128, "height": 64, **wishes}))
    with ritocco.load(graphs, device="cpu", backend="onnxruntime") as engine:
        shapes = heard(cast(Any, engine.runtime)._sessions)
        engine.predict(given)
    assert shapes.keys() == asked.keys()
    for name, io in artefacts.contract.items():
        wanted = {port.name: port.resolve(asked[name]) for port in io.inputs}
        assert max(shapes[name], key=lambda one: sum(shape[0] for shape in one.values() if shape)) == wanted


@pytest.mark.parametrize(
    ("lanes", "rows", "count", "guidance", "wanted"),
    [
        ((1, 1, 4), (1, 2, 4), 3, 7.5, (2, 4)),  # as many lanes as their rows allow
        ((1, 1, 4), (1, 2, 4), 3, 1.0, (3, 3)),
        ((1, 1, 4), (1, 1, 1), 1, 7.5, (1, 1)),
        ((2, 2, 2), (4, 4, 4), 1, 1.0, (2, 4)),  # filled up to the least
    ],
)
def test_lanes_and_rows_of_a_step_go_together(
    lanes: Range,
    rows: Range,
    count: int,
    guidance: float,
    wanted: tuple[int, int],
    tiny_hoisted_graphs: Path,
) -> None:
    opened = open_artefacts(tiny_hoisted_graphs)
    step = opened.contract["unet_step"]
    held = replace(step, ranges={**step.ranges, "N": lanes, "M": rows})
    artefacts = replace(opened, contract={**opened.contract, "unet_step": held}, manifest=None)
    wishes = {"width": 64, "height": 64, "num_outputs": count, "guidance_scale": guidance}
    asked = asked_of(artefacts, asked_without_pictures(wishes))
    assert (asked["unet_step"]["N"], asked["unet_step"]["M"]) == wanted


def test_a_plan_of_graphs(tiny_graphs: Path) -> None:
    words = ["--width", "128", "--height", "64", "--num-outputs", "2"]
    found = plan(tiny_graphs, *words)
    assert (found["width"], found["height"], found["num_outputs"]) == (128, 64, 2)
    assert found["dtype"] == "float32"
    assert tuple(found["graphs"]) == GRAPHS
    unet = found["graphs"]["unet"]
    assert unet["sizes"] == {"M": 4, "H": 8, "W": 16}
    assert unet["inputs_bytes"] == 4 * 4 * (9 * 8 * 16 + 1 + 77 * 32)
    assert unet["outputs_bytes"] == 4 * 4 * 4 * 8 * 16
    assert 0 < unet["lower_bound_bytes"] <= unet["arena_bytes"] < 1.1 * unet["lower_bound_bytes"]
    assert unet["moment"].startswith("Softmax ")
    stored = (tiny_graphs / "unet" / "model.onnx.data").stat().st_size
    assert unet["weights_bytes"] == pytest.approx(stored, rel=0.02)
    assert found["weights_bytes"] == sum(one["weights_bytes"] for one in found["graphs"].values())
    assert found["largest_arena_bytes"] == max(one["arena_bytes"] for one in found["graphs"].values())
    told = CliRunner().invoke(app, ["plan", "--model", str(tiny_graphs), *words]).stdout
    assert told.startswith("2 pictures of 128 x 64 on exported graphs, float32\n")
    row = next(line for line in told.splitlines() if line.startswith("unet "))
    assert "M=4 H=8 W=16" in row
    assert f"{unet['arena_bytes'] / 2**20:,.1f} MiB" in row
    assert row.endswith(unet["moment"])
    assert "keeps to the arena" in told


def test_more_pictures_take_a_larger_arena_of_the_unet_alone(tiny_graphs: Path) -> None:
    one, two = (plan(tiny_graphs, "--width", "64", "--height", "64", "--num-outputs", n) for n in "12")
    for name in GRAPHS:
        arenas = one["graphs"][name]["arena_bytes"], two["graphs"][name]["arena_bytes"]
        assert arenas[1] == pytest.approx(2 * arenas[0] if name == "unet" else arenas[0], rel=0.01)
    single = plan(
        tiny_graphs, "--width", "64", "--height", "64", "--num-outputs", "2", "--guidance-scale", "1"
    )
    assert single["graphs"]["unet"] == one["graphs"]["unet"]
    assert single["graphs"]["text_encoder"]["sizes"] == {"N": 1}


def test_hoisted_graphs_and_half_widths(tiny_hoisted_graphs: Path, tiny_half_graphs: Path) -> None:
    size = ["--width", "64", "--height", "64"]
    hoisted = plan(tiny_hoisted_graphs, *size, "--num-inference-steps", "20", "--scheduler", "PNDM")
    assert tuple(hoisted["graphs"]) == HOISTED_GRAPHS
    assert hoisted["graphs"]["unet_once"]["sizes"] == {"R": 21, "M": 2, "H": 8, "W": 8}
    assert hoisted["graphs"]["unet_step"]["sizes"] == {"N": 1, "M": 2, "H": 8, "W": 8}
    assert plan(tiny_half_graphs, *size, "--dtype", "float16")["dtype"] == "float16"


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--budget", "8GiB"], "--budget"),
        (["--verify"], "--verify"),
        (["--device", "cuda"], "--device"),
        (["--variant", "fp16"], "--variant"),
        (["--tokenizer", "."], "--tokenizer"),
        (["--dtype", "float16"], "--dtype"),
        (["--width", "512"], "input.width"),
        (["--num-outputs", "9"], "input.num_outputs"),
    ],
)
def test_what_graphs_have_no_plan_of_is_named(tiny_graphs: Path, words: list[str], field: str) -> None:
    told = CliRunner().invoke(
        app, ["plan", "--model", str(tiny_graphs), "--width", "64", "--height", "64", *words]
    )
    assert isinstance(told.exception, RequestError)
    assert told.exception.field == field
    assert field.removeprefix("input.") in str(told.exception)


def test_a_graph_that_has_no_plan_is_named(
    tiny_optimum_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its file, the node and the tensor; so is an installation without onnx."""
    artefacts: Artefacts = open_artefacts(tiny_optimum_graphs)
    file = tmp_path / "model.onnx"
    whole = artefacts.graph("vae_decoder").read_bytes()
    file.write_bytes(whole.replace(b"InstanceNormalization", b"InstanceNormalisation"))
    sizes = {"N": 1, "H": 8, "W": 8}
    with pytest.raises(
        CheckpointError, match=r"model\.onnx: InstanceNormalisation .*: no operator of ONNX's"
    ):
        graph_plan(file, artefacts.contract["vae_decoder"], sizes)
    monkeypatch.setattr("ritocco_export.plugin.installed", lambda name: False)
    told = CliRunner().invoke(
        app, ["plan", "--model", str(tiny_optimum_graphs), "--width", "64", "--height", "64"]
    )
    assert isinstance(told.exception, BackendError)
    assert 'pip install "ritocco[onnx]"' in str(told.exception)


def test_older_exports_of_optimum_have_the_timestep_in_brackets(
    tiny_optimum_graphs: Path, tmp_path: Path
) -> None:
    artefacts = open_artefacts(tiny_optimum_graphs)
    model = onnx.load(str(artefacts.graph("unet")), load_external_data=False)
    port = next(one for one in model.graph.input if one.name == "timestep")
    port.type.tensor_type.shape.dim.add().dim_value = 1
    onnx.save(model, tmp_path / "model.onnx")
    sizes = {"M": 2, "H": 8, "W": 8}
    files = (artefacts.graph("unet"), tmp_path / "model.onnx")
    new, old = (graph_plan(file, artefacts.contract["unet"], sizes) for file in files)
    assert new == old


def test_what_follows_from_sizes_alone_lies_beside_the_weights(tiny_graphs: Path) -> None:
    """The text encoder's causal mask."""
    artefacts = open_artefacts(tiny_graphs)
    file, io = artefacts.graph("text_encoder"), artefacts.contract["text_encoder"]
    stored = sum(math.prod(one.dims) * 4 for one in read_graph(file).graph.initializer)
    assert graph_plan(file, io, {"N": 2}).weights - stored >= 4 * 77 * 77


def test_a_plan_of_graphs_needs_no_torch(tiny_graphs: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from ritocco.graph_report import planned_graphs; "
        "planned_graphs(Path(sys.argv[1]), {'width': 64, 'height': 64}); "
        "print(sorted({'torch', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", program, str(tiny_graphs)], capture_output=True, text=True)
    assert (told.stdout, told.returncode) == ("[]\n", 0), told.stderr
