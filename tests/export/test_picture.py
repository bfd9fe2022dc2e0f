"""The gate's picture: measured, kept in the manifest, and able to stop an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ritocco.artefacts import read_manifest
from ritocco.checkpoint import open_checkpoint
from ritocco.engine import Engine
from ritocco.errors import CheckpointError
from ritocco_export import picture
from ritocco_export.exporter import export_checkpoint
from ritocco_export.figures import LEAST_PICTURE_PSNR_DB
from ritocco_export.picture import compare_picture
from ritocco_export.profiles import Profile


def assert_near(folder: Path, dtype: str) -> None:
    """The manifest's figures pass the gate; a PSNR of null stands for pictures that are alike to the bit."""
    figures = read_manifest(folder).parity["picture"]
    assert figures["arithmetic"] == "float32"
    if figures["psnr_db"] is None:
        assert figures["error"] == 0
    else:
        assert figures["psnr_db"] >= LEAST_PICTURE_PSNR_DB[dtype]
        assert 0 < figures["error"] < 0.2


def test_the_manifest_holds_the_pictures_figures(tiny_graphs: Path, tiny_half_graphs: Path) -> None:
    assert_near(tiny_graphs, "float32")
    assert_near(tiny_half_graphs, "float16")


def test_every_layout_is_gated(tiny_optimum_graphs: Path, tiny_hoisted_graphs: Path) -> None:
    for folder in (tiny_optimum_graphs, tiny_hoisted_graphs):
        assert_near(folder, "float32")


def test_graphs_of_other_weights_paint_another_picture(
    tiny_graphs: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that differ stand for weights that do."""
    predict: Callable[..., Any] = Engine.predict
    prompts = iter(["a yellow cat", "the bench in a photograph"])

    def other(engine: Engine, asked: dict[str, Any], **options: Any) -> Any:
        return predict(engine, {**asked, "prompt": next(prompts), "guidance_scale": 20}, **options)

    monkeypatch.setattr(Engine, "predict", other)
    monkeypatch.setattr(picture, "LEAST_PICTURE_PSNR_DB", {"float32": 51.0})
    with pytest.raises(CheckpointError, match=r"picture: painted on the float32 graphs it departs"):
        compare_picture(open_checkpoint(tiny_checkpoint), tiny_graphs)


@pytest.mark.slow
def test_an_export_whose_picture_departs_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "LEAST_PICTURE_PSNR_DB", {"float32": 1000.0})
    monkeypatch.setattr(picture, "difference", lambda *_, **__: (0.5, 12.0))
    with pytest.raises(CheckpointError, match=r"by 12\.0 dB.* are asked"):
        export_checkpoint(
            open_checkpoint(tiny_checkpoint), tmp_path / "out", profiles=[Profile.parse("64")], static=True
        )
    assert not list(tmp_path.iterdir())
