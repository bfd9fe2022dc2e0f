"""NVIDIA's own parser and builder through NVIDIA's own bindings, no GPU needed: the extra tensorrt-rtx."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ritocco.artefacts import open_artefacts
from ritocco.backends.engine_store import EngineOptions
from ritocco.errors import CheckpointError, RequestError
from ritocco_export.tensorrt_build import build_all, build_engine

pytestmark = pytest.mark.slow


def test_tensorrt_for_rtx_builds_our_graphs(tiny_graphs: Path, tmp_path: Path) -> None:
    said: list[str] = []
    files = build_all(
        open_artefacts(tiny_graphs),
        library="tensorrt-rtx",
        options=EngineOptions(),
        targets=["sm89"],
        folder=tmp_path,
        say=said.append,
    )
    assert len(files) == 4
    assert all(file.stat().st_size > 10_000 for file in files)
    # Tokens are int64 in every runtime; no other binding is, and nothing is cast in silence.
    (warning,) = [line for line in said if "warning" in line]
    assert warning.startswith("text_encoder")
    assert "input tokens has Int64 binding" in warning
    assert any("steps" in line for line in said), "the progress monitor was never called"


def test_it_names_what_it_does_not_take(tiny_graphs: Path, tmp_path: Path) -> None:
    import onnx

    folder = shutil.copytree(tiny_graphs, tmp_path / "graphs")
    artefacts = open_artefacts(folder)
    file = folder / "unet" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Conv").op_type = "NotAnOperator"
    onnx.save(model, file)
    with pytest.raises(CheckpointError, match=r"tensorrt-rtx's parser does not take it.*NotAnOperator"):
        build_engine(
            artefacts, "unet", tmp_path / "x", library="tensorrt-rtx", options=EngineOptions(), target="sm89"
        )
    with pytest.raises(RequestError, match="it must be sm75"):
        build_all(
            artefacts,
            library="tensorrt-rtx",
            options=EngineOptions(),
            targets=["sm100"],
            folder=tmp_path / "engines",
            say=print,
        )
    assert not (tmp_path / "x").exists()
