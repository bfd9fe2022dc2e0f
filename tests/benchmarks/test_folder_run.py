"""The benchmark of folders: both ways paint the same, and it says which took longer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ritocco_bench import folder_run
from ritocco_bench.processes import BenchError


@pytest.mark.slow
def test_a_folder_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    given = ["--pictures", "2", "--pairs", "1", "--size", "64", "--steps", "1", "--out", str(out)]
    assert folder_run.main(given) == 0
    (row,) = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert row["times_faster"] == [row["process_each_s"][0] / row["batch_s"][0]]
    assert "2 pictures, 64 x 64, 1 steps: batch is " in capsys.readouterr().out


def test_other_pictures_are_not_timed(tmp_path: Path) -> None:
    for name, shade in (("a.png", 10), ("b.png", 11), ("c.png", 12)):
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(tmp_path / name)
    folder_run._refuse_other(tmp_path / "a.png", tmp_path / "b.png")
    with pytest.raises(BenchError, match=r"another picture by `batch` than by `predict`: 2 of 255"):
        folder_run._refuse_other(tmp_path / "a.png", tmp_path / "c.png")


def test_a_command_that_fails_is_not_timed() -> None:
    with pytest.raises(BenchError, match="`ritocco predict` failed"):
        folder_run._seconds("predict", "--image", "nowhere.png", "--mask", "nowhere.png")
