"""The compatibility check: our graphs are clean, and every kind of planted violation is caught by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from planted_graphs import IO, PLANTED, VIOLATIONS
from ritocco.artefacts import files_of, open_artefacts, read_manifest, sha256_of, write_manifest
from ritocco.cli import _add_plugins, app
from ritocco.nets.io import GRAPHS
from ritocco_export.tensorrt_check import OPSETS, check_graph, check_model, matrix


def test_the_matrix_is_whole() -> None:
    assert (OPSETS[0], OPSETS[-1]) == (9, 20)
    assert len(matrix()) == 196
    assert matrix()["Conv"].types == {"FP32", "FP16", "BF16"}
    assert not matrix()["Bernoulli"].supported
    assert set().union(*(row.types for row in matrix().values())) <= {
        "FP32", "FP16", "BF16", "FP8", "INT4", "INT8", "UINT8", "INT32", "INT64", "BOOL",
    }  # fmt: skip


def test_a_clean_model_passes() -> None:
    assert check_model(PLANTED["clean"].make(), IO) == []


@pytest.mark.parametrize("planted", VIOLATIONS)
def test_planted_violations_are_caught_by_name(planted: str) -> None:
    violation = VIOLATIONS[planted]
    found = check_model(violation.make(), violation.io)
    assert any(finding.rule == violation.rule and finding.level == "error" for finding in found), found
    assert re.search(violation.said, " ".join(finding.message for finding in found))


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
    assert text.count("parity") == 5, "four graphs and the picture"
    folder = shutil.copytree(tiny_graphs, tmp_path / "damaged")
    (folder / "unet" / "model.onnx").write_bytes(b"x")
    status, text = run("--check", str(folder), "--json")
    assert status == 1
    held = json.loads(text)
    assert not held["passed"]
    assert "changed since it was exported" in held["findings"]["folder"][0]["message"]


@pytest.mark.parametrize(
    ("graphs", "said"),
    [
        ("tiny_graphs", "dB against torch, in float32"),
        ("tiny_half_graphs", "dB against torch, in float32 arithmetic on float16 weights"),
    ],
)
def test_it_says_in_which_arithmetic_parity_was_measured(
    graphs: str, said: str, request: pytest.FixtureRequest
) -> None:
    _, text = run("--check", str(request.getfixturevalue(graphs)))
    lines = [line for line in text.splitlines() if " parity " in line]
    assert len(lines) == 5
    assert all(line.endswith(said) for line in lines)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (None, "was not measured"),
        ({"error": 0.9, "psnr_db": 9.0, "arithmetic": "float32"}, "more than float32 graphs are allowed"),
        ({"error": "none"}, "was not measured"),
        ({"error": -1.0, "psnr_db": None, "arithmetic": "float32"}, "was not measured"),
        ({"error": True, "psnr_db": None, "arithmetic": "float32"}, "was not measured"),
        ({"error": None, "psnr_db": None, "arithmetic": ""}, "was not measured"),
    ],
)
def test_it_holds_the_gates_figures_to_its_limits(
    tiny_graphs: Path, tmp_path: Path, figures: object, said: str
) -> None:
    folder = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    held = read_manifest(folder)
    parity = {name: one for name, one in held.parity.items() if name != "unet"}
    write_manifest(folder, replace(held, parity=parity | ({"unet": figures} if figures else {})))
    status, text = run("--check", str(folder))
    (line,) = (one for one in text.splitlines() if "unet " in one and "parity" in one)
    assert said in line
    assert status == (0 if said == "not run" else 1)
    assert json.loads(run("--check", str(folder), "--json")[1])["passed"] == (status == 0)


def test_it_reads_every_byte_of_large_files(
    tiny_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritocco.artefacts._WHOLE_BYTES", 1 << 20)
    folder = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    found = replace(read_manifest(folder), files=files_of(folder), sha256=sha256_of(folder))
    write_manifest(folder, found)
    assert list(found.sha256) == ["unet/model.onnx.data"]
    assert run("--check", str(folder))[0] == 0
    with (folder / "unet" / "model.onnx.data").open("r+b") as stream:
        stream.seek(5000)  # between the blocks that opening reads
        held = stream.read(1)
        stream.seek(5000)
        stream.write(bytes([held[0] ^ 1]))
    open_artefacts(folder)
    status, text = run("--check", str(folder))
    assert status == 1
    assert "unet/model.onnx.data: changed since it was exported" in text


def test_what_a_graph_calls_its_nodes_does_not_steer_a_terminal(tiny_graphs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    model = onnx.load(folder / "vae_decoder" / "model.onnx", load_external_data=False)
    model.graph.node[0].name, model.graph.node[0].op_type = "x\x1b[2J\npassed", "NotThere"
    model.graph.node[0].domain = "somebody"
    model.opset_import.append(onnx.helper.make_opsetid("somebody", 1))
    (folder / "vae_decoder" / "model.onnx").write_bytes(model.SerializeToString())
    write_manifest(folder, replace(read_manifest(folder), files=files_of(folder)))
    status, text = run("--check", str(folder))
    assert status == 1
    assert "somebody.NotThere" in text
    assert "\x1b" not in text
    assert "passed" not in text.splitlines()


def test_weights_that_are_cut_are_found(tiny_optimum_graphs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_optimum_graphs, tmp_path / "theirs")
    (folder / "ritocco.json").unlink()
    with (folder / "unet" / "model.onnx.data").open("r+b") as stream:
        stream.truncate(100_000)
    status, text = run("--check", str(folder))
    assert status == 1
    assert "are needed, the file has 100000" in text


def test_a_folder_without_manifest_is_noted(tiny_optimum_graphs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_optimum_graphs, tmp_path / "theirs")
    (folder / "ritocco.json").unlink()
    status, text = run("--check", str(folder))
    assert status == 0
    assert "somebody else's export" in text


def edited(folder: Path, **changes: Any) -> None:
    """The manifest of what lies there now."""
    write_manifest(folder, replace(read_manifest(folder), files=files_of(folder), **changes))


def no_merges(folder: Path) -> None:
    (folder / "tokenizer" / "merges.txt").unlink()
    edited(folder)


def odd_scheduler(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    held = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(held | {"beta_schedule": "zigzag"}), encoding="utf-8")
    edited(folder)


def two_opsets(folder: Path) -> None:
    model = onnx.load(folder / "unet" / "model.onnx", load_external_data=False)
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx", 12))
    (folder / "unet" / "model.onnx").write_bytes(model.SerializeToString())
    edited(folder)


def in_the_graph(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    file = folder / "vae_decoder" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())
    edited(folder)


def own_bytes(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="own", dims=[4], data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="model.onnx")
    model.graph.initializer.append(tensor)


def odd_weights(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="odd", dims=[1], data_type=onnx.TensorProto.STRING, string_data=[b"x"])
    model.graph.initializer.append(tensor)


def to_train(model: onnx.ModelProto) -> None:
    model.training_info.add().algorithm.name = "more"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (own_bytes, "own: lie nowhere that can be read"),
        (odd_weights, "odd: weights in STRING"),
        (to_train, "vae_decoder"),
    ],
)
def test_it_finds_what_hides_in_a_graph(
    change: Callable[[onnx.ModelProto], object], said: str, tiny_graphs: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    in_the_graph(folder, change)
    status, text = run("--check", str(folder))
    assert status == 1
    assert said in text


def test_a_manifest_may_not_leave_out_large_files(
    tiny_graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritocco.artefacts._WHOLE_BYTES", 1 << 20)
    folder = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    edited(folder, sha256={})
    status, text = run("--check", str(folder))
    assert status == 1
    assert "unet/model.onnx.data: changed since it was exported" in text


@pytest.mark.parametrize(
    ("spoil", "said", "status"),
    [
        (no_merges, r"error +folder +tokenizer .*merges\.txt", 1),
        (odd_scheduler, r"error +folder +scheduler .*zigzag", 1),
        (lambda folder: edited(folder, opset=17), "error +unet +opset .* says 17; the graph imports 20", 1),
        (two_opsets, "error +unet ", 1),
        (lambda folder: (folder / "README").write_text("x"), "note +folder +manifest +README: not of the", 0),
    ],
    ids=["tokenizer", "scheduler", "opset", "two opsets", "a stranger"],
)
def test_it_looks_beside_the_graphs(
    tiny_graphs: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str, status: int
) -> None:
    folder = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    spoil(folder)
    found, text = run("--check", str(folder))
    assert re.search(said, text), text
    assert found == status
