"""The built archives, and a prediction from the wheel in an environment that holds nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ritocco": "engine", "ritocco_kernels": "kernels", "ritocco_export": "export"}
PACKAGES["ritocco_bench"] = "benchmarks"
NOT_SHIPPED = ("__pycache__", ".pyc", ".log", "tests/")
MAX_WHEEL_BYTES = 45 << 20
# As in the Makefile: PyPI's torch for Linux is a CUDA build of gigabytes.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def _run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run without the surrounding environment's Python settings."""
    hidden = ("PYTHON", "VIRTUAL_ENV", "RITOCCO_", "COVERAGE")
    env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the source archive and of the wheel that was built from it, not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    (path,) = archives.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment that holds the wheel and its requirements."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    install = (scripts / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt")
    _run(*install, "--no-deps", "--retries", "2", "--extra-index-url", TORCH_INDEX, "torch", cwd=home)
    _run(*install, wheel, cwd=home)
    return scripts


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = wheel.name.split("-")[1]
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, f"ritocco-{version}.dist-info"}
    assert [name for name in names if any(part in name for part in NOT_SHIPPED)] == []
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"{package}/{path.relative_to(ROOT / folder / package).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources == {name for name in names if ".dist-info/" not in name}


def test_the_wheel_holds_the_model_and_the_demos_pictures(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    model = "ritocco/models/pocket"
    assert {
        f"{model}/model_index.json",
        f"{model}/scheduler/scheduler_config.json",
        f"{model}/tokenizer/vocab.json",
        f"{model}/tokenizer/merges.txt",
        *(f"{model}/{part}/config.json" for part in ("text_encoder", "unet", "vae")),
        "ritocco/assets/coffee.jpg",
        "ritocco/assets/coffee-mask.png",
    } <= names
    weights = [name for name in names if name.startswith(model) and name.endswith(".safetensors")]
    assert {name.split("/")[3] for name in weights} == {"text_encoder", "unet", "vae"}


def test_the_wheels_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (home,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(archive.read(f"{home}/METADATA").decode("utf-8"))
    assert (metadata["Name"], metadata["License-Expression"]) == ("ritocco", "Apache-2.0")
    core = {
        re.split("[<>]", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line
    }
    assert core == {
        *("httpcore", "httpx", "numpy", "pillow", "pydantic"),
        *("safetensors", "tokenizers", "torch", "tqdm", "typer"),
    }
    for name in ("LICENSE", "NOTICE"):
        kept = archive.read(f"{home}/licenses/{name}").decode("utf-8")
        assert kept == (ROOT / name).read_text(encoding="utf-8")


def test_the_source_archive_can_be_tested_and_holds_no_leftovers(archives: Path) -> None:
    (path,) = archives.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "NOTICE", "Makefile", "constraints.txt", "tests/test_wheel.py"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops & {".venv", ".cache", ".git", "demo-output", "dist"} == set()


def test_an_empty_environment_is_enough(installed: Path, tmp_path: Path) -> None:
    """From another folder: doctor, and a prediction that keeps the pixels under black."""
    python = installed / "python"
    where = _run(python, "-c", "import ritocco; print(ritocco.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(installed.parent)
    absent = "import importlib.util as u; print([n for n in ('diffusers', 'transformers') if u.find_spec(n)])"
    assert _run(python, "-c", absent, cwd=tmp_path).stdout.strip() == "[]"
    _run(python, "-c", "import ritocco_kernels, ritocco_export, ritocco_bench", cwd=tmp_path)

    doctor = _run(installed / "ritocco", "doctor", cwd=tmp_path).stdout
    assert "backend torch" in doctor
    assert 'pip install "ritocco[diffusers]"' in doctor

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    asked = "--image image.png --mask mask.png --width 64 --height 64 --num-inference-steps 2 --seed 7 --json"
    done = _run(installed / "ritocco", "predict", "--prompt", "yellow cat face", *asked.split(), cwd=tmp_path)
    prediction = json.loads(done.stdout)
    assert (prediction["status"], prediction["error"]) == ("succeeded", None)
    painted = np.asarray(Image.open(tmp_path / prediction["output"][0]))
    assert np.array_equal(painted[mask == 0], pixels[mask == 0])
    assert not np.array_equal(painted, pixels)


def test_a_bad_request_says_why_and_exits_with_2(installed: Path, tmp_path: Path) -> None:
    asked = ("--image", "nowhere.png", "--mask", "nowhere.png")
    done = _run(installed / "ritocco", "predict", *asked, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "input.image" in done.stderr
    assert "Traceback" not in done.stderr
