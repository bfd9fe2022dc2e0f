"""`ritocco batch --ray`: the same manifest, whoever paints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ritocco import cli
from ritocco.folders.manifest import NAME

QUICK = ("--width=64", "--height=64", "--num-inference-steps=1", "--guidance-scale=1", "--prompt=a cat")


def picture(file: Path, shade: int) -> None:
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), (shade, 120, 90)).save(file)


def command(folder: Path, *options: str) -> list[str]:
    places = [f"--{name}={folder / name}" for name in ("images", "masks", "out")]
    return ["batch", *places, *QUICK, "--ray=local", *options]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_folder_is_painted_once(tmp_path: Path) -> None:
    for number in range(20):
        picture(tmp_path / "images" / f"{number}.png", number)
        picture(tmp_path / "masks" / f"{number}.png", 255)
    (tmp_path / "images" / "7.png").write_bytes(b"no picture")
    (tmp_path / "masks" / "8.png").unlink()
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAY_USAGE_STATS_ENABLED": "0",
    }

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        asked = [sys.executable, "-m", "ritocco", *command(tmp_path, *options)]
        return subprocess.run(asked, env=env, capture_output=True, text=True, check=False)

    first = run("--seed=3")
    assert (first.returncode, first.stdout.split(";")[0]) == (1, "18 painted, 0 done before, 2 failed"), first
    assert "failed: 7.png" in first.stderr
    assert "failed: 8.png: no mask" in first.stderr
    lines: dict[str, dict[str, Any]] = {}
    for text in (tmp_path / "out" / NAME).read_text().splitlines():
        line = json.loads(text)
        assert line["name"] not in lines, "entered once"
        lines[line["name"]] = line
    assert sum(line["status"] == "succeeded" for line in lines.values()) == 18
    assert lines["3"]["input"]["seed"] == 3
    for line in lines.values():
        assert all((tmp_path / "out" / name).is_file() for name in line["outputs"])
    (tmp_path / "out" / "5.png").unlink()
    again = run("--seed=3")
    assert again.stdout.startswith("1 painted, 17 done before, 2 failed"), again
    other = run("--seed=4")
    assert other.stdout.startswith("18 painted, 0 done before, 2 failed"), other


def test_a_device_is_the_clusters_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "images" / "1.png", 1)
    picture(tmp_path / "masks" / "1.png", 1)
    monkeypatch.setattr(sys, "argv", ["ritocco", *command(tmp_path, "--device=cuda:0,cuda:1")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "--device is 'cuda:0,cuda:1'; the cluster's engines have a device each" in capsys.readouterr().err
