"""`ritocco batch --ray`: the same manifest, whoever paints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ritocco import cli
from ritocco.folders.manifest import NAME, Manifest

QUICK = ("--width=64", "--height=64", "--num-inference-steps=1", "--guidance-scale=1", "--prompt=a cat")


# Ray's own modules use what others call old.
pytestmark = pytest.mark.filterwarnings("ignore")


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


@pytest.mark.parametrize("engines", [1, 2, 3, 8])
@pytest.mark.parametrize("pictures", [1, 2, 5, 16, 17, 20, 64, 65, 1000])
def test_every_engine_has_some_of_few_pictures(pictures: int, engines: int) -> None:
    from ritocco.folders.run import THREADS
    from ritocco.scale.folders import BLOCKS_EACH, block_count

    blocks = block_count(pictures, engines)
    assert 1 <= blocks <= pictures, "none is empty"
    assert -(-pictures // blocks) <= THREADS, "what an engine has in hand, and what a lost one costs"
    assert blocks >= min(pictures, BLOCKS_EACH * engines)
    if pictures >= engines * BLOCKS_EACH * THREADS:
        assert blocks == -(-pictures // THREADS), "no smaller ones than needed"


def test_ray_is_given_those_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself stands aside: what it is asked for is looked at."""
    from ritocco.folders.pairs import Pair
    from ritocco.scale import folders

    asked: dict[str, Any] = {}

    class Data:
        ActorPoolStrategy: Any = staticmethod(dict)

        def from_items(self, items: list[Any], **options: Any) -> Data:
            asked.update(options, items=items)
            return self

        def map_batches(self, painter: Any, **options: Any) -> Data:
            asked.update(options)
            return self

        def iter_rows(self) -> list[Any]:
            return []

    double = SimpleNamespace(
        init=lambda **_: None, data=Data(), cluster_resources=lambda: {"GPU": 2.0, "CPU": 8.0}
    )
    monkeypatch.setattr(folders, "ray", double)

    def run(count: int) -> dict[str, Any]:
        pairs = [
            Pair(name=str(i), image=tmp_path / f"{i}.png", mask=tmp_path / "m.png") for i in range(count)
        ]
        with Manifest(tmp_path) as manifest:
            folders.run(
                "auto", pairs, (), load={}, out=tmp_path, manifest=manifest, options={}, told=lambda _: None
            )
        return asked

    assert run(12)["override_num_blocks"] == 8
    assert asked["batch_size"] is None, "or Ray puts small blocks together"
    assert (asked["num_gpus"], asked["compute"]) == (1, {"size": 2, "max_tasks_in_flight_per_actor": 1})
    assert run(1)["compute"]["size"] == 1, "no engine is loaded for nothing"


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
