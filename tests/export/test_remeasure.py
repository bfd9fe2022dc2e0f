"""`ritocco export --check GRAPHS --model CHECKPOINT`: parity is measured again, whatever was written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from ritocco.artefacts import files_of, read_manifest, write_manifest
from ritocco.cli import _add_plugins, app
from ritocco.errors import CheckpointError, RequestError


def check(graphs: Path, *words: str) -> tuple[int, str]:
    _add_plugins()
    done = CliRunner().invoke(app, ["export", "--check", str(graphs), *words])
    if isinstance(done.exception, RequestError | CheckpointError):
        raise done.exception
    return done.exit_code, done.stdout


def sealed(graphs: Path) -> None:
    """The manifest is of what lies there now."""
    write_manifest(graphs, replace(read_manifest(graphs), files=files_of(graphs)))


@pytest.mark.slow
def test_graphs_are_held_beside_what_they_were_made_of(
    tiny_graphs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    graphs = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    # Of a gate that is past: it must not be what is told.
    parity = {
        name: {**one, "error": 0.0, "psnr_db": None} for name, one in read_manifest(graphs).parity.items()
    }
    write_manifest(graphs, replace(read_manifest(graphs), parity=parity))
    status, text = check(graphs, "--model", str(tiny_checkpoint))
    lines = [line for line in text.splitlines() if "parity" in line]
    assert status == 0
    assert {line.split()[1] for line in lines} == {*read_manifest(graphs).parity}
    assert all(line.startswith("ok") and line.endswith("measured again") for line in lines)
    assert "measured again" not in check(graphs)[1]
    told = json.loads(check(graphs, "--model", str(tiny_checkpoint), "--json")[1])
    assert told["measured_again"] is True
    assert 0 < told["parity"]["unet"]["error"] < 1e-4


def test_weights_that_are_not_the_checkpoints_are_found(
    tiny_graphs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    graphs = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    data = graphs / "unet" / "model.onnx.data"
    weights = np.fromfile(data, np.float32)
    (weights * np.float32(1.01)).tofile(data)
    sealed(graphs)
    assert check(graphs)[0] == 0, "the manifest's own figures are of other weights"
    status, text = check(graphs, "--model", str(tiny_checkpoint))
    assert status == 1
    (line,) = (one for one in text.splitlines() if "unet " in one and "parity" in one)
    assert "the float32 graph departs from torch by" in line
    assert any(one.startswith("ok     vae_decoder ") for one in text.splitlines())


def test_another_checkpoint_is_a_stale_export(
    tiny_graphs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    (file,) = (other / "unet").glob("*.safetensors")
    held = load_file(file)
    save_file(held | {"conv_in.bias": held["conv_in.bias"] + 1}, file)
    status, text = check(tiny_graphs, "--model", str(other))
    assert status == 1
    assert "stale, made of the checkpoint" in text


def test_what_is_damaged_is_not_run(tiny_graphs: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    graphs = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    (graphs / "tokenizer" / "merges.txt").unlink()
    sealed(graphs)
    status, text = check(graphs, "--model", str(tiny_checkpoint))
    assert status == 1
    assert "not measured again: what is damaged is not run" in text


@pytest.mark.slow
def test_two_graphs_of_a_unet_are_measured_together(tiny_hoisted_graphs: Path, tiny_checkpoint: Path) -> None:
    told = json.loads(check(tiny_hoisted_graphs, "--model", str(tiny_checkpoint), "--json")[1])
    assert told["passed"]
    assert {"unet", "unet_once", "unet_step", "picture"} <= told["parity"].keys()


def test_somebody_elses_export_is_held_to_its_picture(
    tiny_optimum_graphs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    graphs = shutil.copytree(tiny_optimum_graphs, tmp_path / "theirs")
    (graphs / "ritocco.json").unlink()
    told = json.loads(check(graphs, "--model", str(tiny_checkpoint), "--json")[1])
    assert told["passed"]
    assert list(told["parity"]) == ["picture"]


def test_graphs_are_no_checkpoint(tiny_graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--model is .*which holds exported graphs"):
        check(tiny_graphs, "--model", str(tiny_graphs))
    with pytest.raises(CheckpointError, match="nowhere"):
        check(tiny_graphs, "--model", str(tmp_path / "nowhere"))
