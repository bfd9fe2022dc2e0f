"""The exporter: what it writes, what it refuses, and that nothing is left where it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

import ritocco
from ritocco import backends
from ritocco.artefacts import GRAPH_FILE, open_artefacts, read_manifest
from ritocco.checkpoint import fingerprint, open_checkpoint
from ritocco.cli import _add_plugins, app
from ritocco.errors import BackendError, CheckpointError, RequestError
from ritocco.nets.io import GRAPHS
from ritocco_export import exporter, graphs, plugin
from ritocco_export.exporter import contract_for, export_checkpoint, profile_ranges
from ritocco_export.figures import LARGEST_ERROR, LEAST_PICTURE_PSNR_DB, LEAST_PSNR_DB, Figures
from ritocco_export.gate import difference
from ritocco_export.profiles import Profile, ranges_of


def export(*words: object) -> None:
    """Run the command; what it raises is raised."""
    _add_plugins()
    done = CliRunner().invoke(app, ["export", *map(str, words)])
    if done.exception is not None:
        raise done.exception


def graph_of(folder: Path, name: str) -> onnx.ModelProto:
    return onnx.load(folder / name / GRAPH_FILE, load_external_data=False)


def ports(values: Any) -> dict[str, tuple[int, list[str | int]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def test_the_manifest_says_what_was_written(tiny_graphs: Path, tiny_checkpoint: Path) -> None:
    opened = open_artefacts(tiny_graphs)
    manifest = read_manifest(tiny_graphs)
    assert opened.manifest == manifest
    assert opened.version == manifest.version == fingerprint(open_checkpoint(tiny_checkpoint))
    assert (manifest.layout, manifest.dtype, manifest.opset) == ("ritocco", "float32", 20)
    assert opened.contract["unet"].ranges == {"M": (1, 2, 4), "H": (8, 32, 32), "W": (8, 32, 32)}
    assert all(manifest.parity[name]["error"] < 1e-4 for name in GRAPHS)
    assert {Path(file).parts[0] for file in manifest.files} == {
        *GRAPHS,
        "scheduler",
        "tokenizer",
        "model_index.json",
    }


def test_graphs_have_the_ports_of_the_contract(tiny_graphs: Path) -> None:
    unet = graph_of(tiny_graphs, "unet")
    floats = onnx.TensorProto.FLOAT
    assert ports(unet.graph.input) == {
        "sample": (floats, ["rows", 9, "2*height", "2*width"]),
        "timestep": (floats, ["rows"]),
        "context": (floats, ["rows", 77, 32]),
    }
    assert ports(unet.graph.output) == {"noise": (floats, ["rows", 4, "2*height", "2*width"])}
    decoder = graph_of(tiny_graphs, "vae_decoder")
    assert ports(decoder.graph.input) == {"latents": (floats, ["images", 4, "height", "width"])}
    assert ports(decoder.graph.output)["pixels"][1] == ["images", 3, "8*height", "8*width"]


def test_optimums_layout_has_its_names(tiny_optimum_graphs: Path) -> None:
    unet = graph_of(tiny_optimum_graphs, "unet")
    assert ports(unet.graph.input)["timestep"] == (onnx.TensorProto.FLOAT, [])
    assert [value.name for value in unet.graph.input] == ["sample", "timestep", "encoder_hidden_states"]
    assert [value.name for value in unet.graph.output] == ["out_sample"]
    encoder = graph_of(tiny_optimum_graphs, "vae_encoder")
    assert ports(encoder.graph.output)["latent_parameters"][1][1] == 8
    index = json.loads((tiny_optimum_graphs / "model_index.json").read_text(encoding="utf-8"))
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]


@pytest.mark.parametrize("name", GRAPHS)
def test_only_standard_operators_and_no_double(tiny_graphs: Path, name: str) -> None:
    model = graph_of(tiny_graphs, name)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    types = {value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert onnx.TensorProto.DOUBLE not in types
    assert "NonZero" not in {node.op_type for node in model.graph.node}, "shapes that depend on data"


def test_half_graphs_are_half(tiny_half_graphs: Path) -> None:
    manifest = read_manifest(tiny_half_graphs)
    assert manifest.dtype == "float16"
    assert all(manifest.parity[name]["arithmetic"] == "float32" for name in GRAPHS)
    unet = graph_of(tiny_half_graphs, "unet")
    half = onnx.TensorProto.FLOAT16
    assert ports(unet.graph.input)["sample"][0] == half
    assert ports(unet.graph.input)["timestep"][0] == onnx.TensorProto.FLOAT
    weights = {tensor.name: tensor.data_type for tensor in unet.graph.initializer if len(tensor.dims) == 4}
    assert set(weights.values()) == {half}


def test_static_graphs_have_one_size(tiny_static_graphs: Path) -> None:
    unet = graph_of(tiny_static_graphs, "unet")
    assert ports(unet.graph.input)["sample"][1] == [2, 9, 8, 16]
    opened = open_artefacts(tiny_static_graphs)
    assert opened.contract["unet"].ranges["W"] == (16, 16, 16)
    assert opened.profiles("unet") == ({"M": (2, 2, 2), "W": (16, 16, 16), "H": (8, 8, 8)},)
    assert opened.contract["unet"].shapes(opened.profiles("unet")[0]) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("512x", "write WIDTHxHEIGHT"),
        ("500", "widths must be multiples of 64"),
        ("64..2048", "multiples of 64 from 64 to 1024"),
        ("512..256", "the smaller first"),
        ("512@0", "pictures must be from 1 to 16"),
        ("512@1..99", "from 1 to 16"),
        ("\x1b[2J", "--profile is"),
        ("9" * 5000 + "@1", "--profile is"),
        ("\u0665\u0661\u0662@1", "--profile is"),
    ],
)
def test_profiles_that_make_no_sense(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        Profile.parse(text)
    assert str(caught.value).isprintable()


def test_ranges_cover_every_profile() -> None:
    both = ranges_of([Profile.parse("512x768@1..4"), Profile.parse("256..1024x512@2")])
    assert both["unet"] == {"M": (1, 2, 8), "W": (32, 64, 128), "H": (64, 64, 96)}
    assert ranges_of([])["unet"]["H"] == (8, 64, 128)


def test_every_profile_is_kept(tiny_checkpoint: Path) -> None:
    profiles = [Profile.parse("64x128@1..2"), Profile.parse("64..256@1")]
    contract = contract_for(
        open_checkpoint(tiny_checkpoint), dtype="float32", layout="ritocco", profiles=profiles, static=False
    )
    first, second = profile_ranges(contract, profiles, static=False)
    assert first["unet"] == {"M": (1, 2, 4), "W": (8, 8, 8), "H": (16, 16, 16)}
    assert second["unet"] == {"M": (1, 2, 2), "W": (8, 32, 32), "H": (8, 32, 32)}
    assert contract["unet"].ranges == {"M": (1, 2, 4), "W": (8, 32, 32), "H": (8, 32, 32)}
    whole = profile_ranges(contract, [], static=False)
    assert whole == ({graph: io.ranges for graph, io in contract.items()},)


def test_static_needs_one_profile(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="exactly one --profile"):
        export_checkpoint(open_checkpoint(tiny_checkpoint), tmp_path / "out", static=True)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_departs_is_not_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = graphs.graph_module

    def off(*args: Any, **kwargs: Any) -> torch.nn.Module:
        module = made(*args, **kwargs)
        with torch.no_grad():
            next(module.parameters()).mul_(1.01)
        return module

    monkeypatch.setattr(exporter, "graph_module", off)
    with pytest.raises(CheckpointError, match=r"text_encoder: the float32 graph departs from torch"):
        export_checkpoint(open_checkpoint(tiny_checkpoint), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "write_graph", full)
    monkeypatch.setattr("sys.argv", ["ritocco"])
    _add_plugins()
    done = CliRunner().invoke(
        app, ["export", "--model", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 1
    assert "No space left on device; nothing was kept (" in done.stderr
    assert not list(tmp_path.iterdir())


LIMITED = """
import functools, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
from ritocco.checkpoint import open_checkpoint
from ritocco_export.exporter import export_checkpoint
model, out = map(Path, sys.argv[1:3])
export_checkpoint(open_checkpoint(model), out, say=functools.partial(print, flush=True))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_disk_that_is_full_in_the_middle_of_a_file_leaves_nothing(
    tiny_checkpoint: Path, tiny_graphs: Path, tmp_path: Path
) -> None:
    """A file that may not grow any further stands for the disk: the system refuses the same write."""
    weights = tiny_graphs / "unet" / "model.onnx.data"
    limit = weights.stat().st_size // 2
    assert limit > max(f.stat().st_size for f in tiny_graphs.rglob("*") if f.is_file() and f != weights) // 2
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, str(tiny_checkpoint), str(out), str(limit)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "unet: exporting", "in the middle"
    assert "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--dtype", "fp8"], ["--layout", "x"], ["--profile", "7"]])
def test_options_that_make_no_sense(tiny_checkpoint: Path, tmp_path: Path, option: list[str]) -> None:
    _add_plugins()
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", "--model", str(tiny_checkpoint), "--out", str(out), *option])
    assert isinstance(done.exception, RequestError)
    assert option[0] in str(done.exception)
    assert not out.exists()


def test_what_the_gate_measures() -> None:
    wanted = np.array([[0.0, -2.0, 1.0]])
    assert difference(wanted, wanted) == (0.0, float("inf"))
    error, psnr = difference(wanted + np.array([[0.0, 0.0, 0.2]]), wanted)
    assert error == pytest.approx(0.1)
    assert psnr == pytest.approx(-10 * np.log10(0.01 / 3))
    assert difference(np.array([[np.nan, 0, 0]]), wanted)[0] == float("inf")
    assert difference(wanted[:, :2], wanted)[0] == float("inf")
    assert difference(wanted, wanted * np.nan)[0] == float("inf")
    assert set(LARGEST_ERROR) == set(LEAST_PSNR_DB) == set(LEAST_PICTURE_PSNR_DB)


def test_graphs_say_nothing_of_the_machine_that_wrote_them(
    tiny_graphs: Path, tiny_hoisted_graphs: Path
) -> None:
    for file in (*tiny_graphs.rglob("*.onnx"), *tiny_hoisted_graphs.rglob("*.onnx")):
        held = file.read_bytes()
        assert b"stack_trace" not in held
        assert str(Path(ritocco.__file__).parent).encode() not in held


@pytest.mark.parametrize(
    "figures",
    [
        Figures(error=1e-6, psnr_db=120.0, arithmetic="float32"),
        Figures(error=0.0, psnr_db=float("inf"), arithmetic="float32"),
        Figures.not_run(),
    ],
)
def test_figures_are_json(figures: Figures) -> None:
    text = json.dumps(figures.as_json(), allow_nan=False)
    assert repr(Figures.from_json(json.loads(text))) == repr(figures)
    assert Figures.from_json({"error": "small"}) is None
    assert Figures.from_json({"error": 10**400, "psnr_db": 90.0, "arithmetic": "float32"}) is None
    assert Figures.from_json({"error": 1, "psnr_db": 10**400, "arithmetic": "float32"}) is None
    assert Figures.from_json(None) is None


def test_a_folder_of_something_else_stays(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match="exists and is no export"):
        export_checkpoint(open_checkpoint(tiny_checkpoint), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text(encoding="utf-8") == "x"


def test_what_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plugin, "installed", lambda name: name != "onnxscript")
    with pytest.raises(BackendError, match=r'export needs onnxscript; pip install "ritocco\[onnx\]"'):
        export("--out", tmp_path / "out")
    with pytest.raises(RequestError, match="one of --out, where to write graphs, --check"):
        export()
    monkeypatch.setattr(backends, "distributed", lambda name: name == "onnxruntime-gpu")
    with pytest.raises(BackendError, match=r'pip install "ritocco\[gpu\]"'):
        export("--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--check", "x", "--dtype", "fp32"), "--dtype does nothing with --check, which takes json, model,"),
        (("--check", "x", "--variant", "fp16"), "--variant does nothing with --check without --model"),
        (("--trtexec", "x", "--json"), "--json does nothing with --trtexec, which takes no other option"),
        (("--out", "x", "--target", "sm89"), "--target does nothing with --out, which takes dtype, hoisted"),
        (("--out", "x", "--refit"), "--refit does nothing with --out"),
        (("--engines", "x", "--layout", "optimum"), "--layout does nothing with --engines"),
        (("--engines", "x", "--out", "y", "--profile", "512"), "--profile does nothing with --out --engines"),
        (("--engines", "x", "--out", "x/engines"), "--out lies in the export 'x', in which engines"),
        (("--engines", "x", "--out", "y/../x"), "--out lies in the export 'x', in which engines"),
    ],
)
def test_options_that_would_do_nothing(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=re.escape(said)):
        export(*words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--out", "--check", "--trtexec", "--engines"])
def test_an_empty_name_is_no_folder(option: str) -> None:
    _add_plugins()
    done = CliRunner().invoke(app, ["export", option, ""])
    assert done.exit_code == 2
    assert "'' names no folder" in done.stderr


@pytest.mark.parametrize("part", ["tokenizer", "scheduler"])
def test_what_could_not_be_loaded_is_refused_before_the_work(
    part: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "write_graph", lambda *args, **kwargs: pytest.fail("exported first"))
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    if part == "tokenizer":
        (folder / "tokenizer" / "merges.txt").write_text("no merges", encoding="utf-8")
    else:
        file = folder / "scheduler" / "scheduler_config.json"
        held = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(held | {"beta_start": "x"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"merges|beta_start"):
        export_checkpoint(open_checkpoint(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "x"}, "--layout is 'x'"),
        ({"profiles": [Profile(width=(128, 64))]}, "the smaller first"),
        ({"profiles": [Profile(images=(0, 0))]}, "its pictures must be from 1"),
        ({"profiles": [Profile(width=(100, 100))]}, "multiples of 64"),
    ],
)
def test_options_of_the_function_are_checked_too(
    options: dict[str, Any], said: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=said):
        export_checkpoint(open_checkpoint(tiny_checkpoint), tmp_path / "out", **options)


def test_a_name_that_is_no_utf8_is_refused_before_the_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--out is '.*\\udcff'; it must be UTF-8"):
        export_checkpoint(open_checkpoint(tiny_checkpoint), tmp_path / "\udcff")
    assert not list(tmp_path.iterdir())


def test_graphs_are_not_exported_again(tiny_graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds exported graphs already"):
        export("--out", tmp_path / "out", "--model", tiny_graphs)
