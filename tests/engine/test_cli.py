"""The command line: what it writes, where it prints, and the status it leaves with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ritocco import cli, demo
from ritocco.safety import NSFW_ERROR, SafetyChecker
from ritocco.sheet import fitted

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `main` with these arguments: (exit status, stdout, stderr). No other exception may escape."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ritocco", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture
def pictures(tmp_path: Path, ask: Callable[..., dict[str, Any]]) -> list[str]:
    """Arguments that name an image and a mask on disk, and ask for little work."""
    given = ask()
    given["image"].save(tmp_path / "bench.png")
    given["mask"].save(tmp_path / "mask.png")
    arguments = ["--image", str(tmp_path / "bench.png"), "--mask", str(tmp_path / "mask.png")]
    return [*arguments, "--width", "64", "--height", "64", "--num-inference-steps", "2", "--seed", "7"]


@pytest.fixture
def predict(run: Run, pictures: list[str], tiny_checkpoint: Path, tmp_path: Path) -> Run:
    """`ritocco predict` with all that it needs; further arguments go last, and the last of a name wins."""

    def call(*args: object) -> tuple[int, str, str]:
        out = tmp_path / "out"
        return run(
            "predict", *pictures, "--model", tiny_checkpoint, "--dtype", "float32", "--out", out, *args
        )

    return call


def test_predict_writes_pictures_and_prints_their_paths(
    predict: Run, tmp_path: Path, tiny_engine: Any, ask: Any
) -> None:
    status, out, err = predict("--prompt", "a cat", "--num-outputs", 2)
    assert status == 0
    paths = [tmp_path / "out" / f"out-{i}.png" for i in range(2)]
    assert out.splitlines() == [str(path) for path in paths]
    expected = tiny_engine.predict(ask(num_inference_steps=2, num_outputs=2, prompt="a cat")).images
    for path, image in zip(paths, expected, strict=True):
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(image))
    assert err.startswith("Using seed: 7\n")
    assert "it/s" not in err


def test_every_option_reaches_the_engine(predict: Run, tmp_path: Path) -> None:
    options: dict[str, object] = {
        "--prompt": "a cat",
        "--negative-prompt": "a bench",
        "--num-outputs": 3,
        "--guidance-scale": 2.5,
        "--scheduler": "K_EULER",
        "--output-format": "webp",
        "--mask-feather": 3,
        "--strength": 0.5,
        "--num-inference-steps": 4,
        "--width": 128,
    }
    flat = [part for pair in options.items() for part in pair]
    status, out, _ = predict(*flat, "--no-paste-back", "--disable-safety-checker", "--json")
    assert status == 0
    answer = json.loads(out)
    for name, value in options.items():
        field = name[2:].replace("-", "_")
        if field in ("output_format", "mask_feather", "strength"):
            assert field not in answer["input"]
        else:
            assert answer["input"][field] == value
    assert answer["input"]["disable_safety_checker"] is True
    assert answer["output"] == [str(tmp_path / "out" / f"out-{i}.webp") for i in range(3)]
    with Image.open(answer["output"][2]) as picture:
        assert (picture.format, picture.size) == ("WEBP", (128, 64))
    assert "2/2 [" in answer["logs"]  # half of four steps


def test_fields_are_checked_before_the_model_is_loaded(predict: Run, tmp_path: Path) -> None:
    status, _, err = predict("--width", 100, "--model", tmp_path / "nowhere")
    assert (status, "input.width is 100" in err) == (2, True)


def test_the_variant_and_the_tokenizer_can_be_named(predict: Run, tiny_checkpoint: Path) -> None:
    assert predict("--tokenizer", tiny_checkpoint / "tokenizer")[0] == 0
    assert "nothing here" in predict("--tokenizer", "nothing here")[2]
    assert "has no variant 'int3'" in predict("--variant", "int3")[2]


def test_the_version(run: Run) -> None:
    status, out, _ = run("--version")
    assert (status, out) == (0, f"ritocco {version('ritocco')}\n")


def test_json_alone_is_on_stdout(predict: Run, tmp_path: Path) -> None:
    status, out, err = predict("--json", "--prompt", "caf\u00e9 \u732b")
    assert status == 0
    assert err == ""
    assert out.isascii()
    answer = json.loads(out)
    assert answer["status"] == "succeeded"
    assert answer["output"] == [str(tmp_path / "out" / "out-0.png")]
    assert answer["input"]["prompt"] == "caf\u00e9 \u732b"
    assert answer["logs"].startswith("Using seed: 7\n")
    assert answer["metrics"]["predict_time"] > 0
    assert "images" not in answer


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--width", 100), "input.width is 100"),
        (("--num-outputs", 5), "input.num_outputs is 5"),
        (("--scheduler", "DDPM"), "input.scheduler is 'DDPM'"),
        (("--guidance-scale", "nan"), "input.guidance_scale"),
        (("--seed", 2**64), "input.seed"),
        (("--strength", 0), "strength is 0"),
        (("--output-format", "gif"), "output_format is 'gif'"),
        (("--mask-feather", -1), "mask_feather is -1"),
        (("--image", "nowhere.png"), "nowhere.png"),
        (("--mask", "nowhere.png"), "nowhere.png"),
        (("--image", "ftp://example.org/a.png"), "ftp"),
        (("--prompt", "half a pair: \udc80"), "input.prompt"),
        (("--backend-options", "[1]"), "--backend-options is '[1]'; it must be a JSON object"),
        (("--backend-options", "{level: 5}"), "it must be a JSON object"),
        (("--backend-options", '{"level": 99}'), "backend_options['level'] is 99"),
        (("--backend", "tpu"), "backend is 'tpu'; it must be auto, torch"),
        (("--dtype", "fp32"), "dtype is 'fp32'; it must be auto, float32"),
        (("--device", "gpu"), "device is 'gpu'; it must be auto, cpu"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_a_bad_request_is_exit_status_two(predict: Run, args: tuple[object, ...], words: str) -> None:
    status, out, err = predict(*args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("args", [("--width", "wide"), ("--no-such-option",), ("--steps",)])
def test_a_bad_command_line_is_exit_status_two(predict: Run, args: tuple[object, ...]) -> None:
    status, out, err = predict(*args)
    assert (status, out) == (2, "")
    assert str(args[0]) in err


def test_a_missing_image_option_is_exit_status_two(run: Run) -> None:
    status, _, err = run("predict", "--mask", "mask.png")
    assert status == 2
    assert "--image" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--model", "no/such/model"), "no such file or folder"),
        (("--model", "no\n\x1b[2J/model"), "no\\n\\x1b[2J"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--dtype", "float16", "--device", "cpu"), "float16"),
        (("--backend", "torch", "--backend-options", '{"level": 5}'), "backend_options are for TensorRT"),
    ],
)
def test_what_cannot_run_is_exit_status_one(predict: Run, args: tuple[object, ...], words: str) -> None:
    status, out, err = predict(*args)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.parametrize("command", ["predict", "demo"])
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_folder_should_be(
    run: Run, predict: Run, tiny_checkpoint: Path, tmp_path: Path, below: str, command: str
) -> None:
    taken = tmp_path / "taken"
    taken.write_bytes(b"mine")
    if command == "predict":
        status, out, err = predict("--out", taken / below)
    else:
        status, out, err = run("demo", "--model", tiny_checkpoint, "--out", taken / below)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: --out is {str(taken / below)!r}")
    assert taken.read_bytes() == b"mine"


def test_a_picture_that_cannot_be_written(predict: Run, tmp_path: Path) -> None:
    (tmp_path / "out" / "out-0.png").mkdir(parents=True)
    status, out, err = predict()
    assert (status, out) == (1, "")
    assert "out-0.png" in err
    assert err.splitlines()[-1].startswith("error: --out is ")


@pytest.mark.parametrize("as_json", [False, True])
def test_all_flagged_is_exit_status_one(
    predict: Run,
    tiny_safety_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_json: bool,
) -> None:
    monkeypatch.setattr(SafetyChecker, "flag", lambda self, images: [True] * len(images))
    status, out, err = predict("--model", tiny_safety_checkpoint, *(["--json"] if as_json else []))
    assert status == 1
    assert err.splitlines()[-1] == NSFW_ERROR
    assert list((tmp_path / "out").iterdir()) == []
    if as_json:
        answer = json.loads(out)
        assert (answer["status"], answer["output"], answer["error"]) == ("failed", None, NSFW_ERROR)
    else:
        assert out == ""


def test_doctor(run: Run) -> None:
    status, out, err = run("doctor")
    assert (status, err) == (0, "")
    for subject in ("python", "torch", "device cpu", "default", "diffusers"):
        assert f"  {subject} " in out


def test_doctor_verifies_a_checkpoint(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    status, out, _ = run("doctor", "--model", tiny_checkpoint)
    assert status == 0
    assert "diffusers folder, inpainting" in out
    broken = Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    (broken / "vae" / "config.json").unlink()
    status, out, err = run("doctor", "--model", broken)
    assert (status, err) == (1, "")
    assert "ERROR" in out
    assert "config.json" in out
    assert run("doctor", "--model", tmp_path / "nowhere")[0] == 1


def test_doctor_as_json(run: Run, tiny_checkpoint: Path) -> None:
    status, out, _ = run("doctor", "--json", "--model", tiny_checkpoint)
    rows = json.loads(out)
    assert status == 0
    assert {"level", "subject", "message"} == set(rows[0])
    assert {"torch", "unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= {r["subject"] for r in rows}


def test_demo_prints_the_sheet_last(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "STEPS", 1)
    monkeypatch.setattr(demo, "SIDE", 64)
    out = tmp_path / "shown"
    status, printed, _ = run("demo", "--model", tiny_checkpoint, "--dtype", "float32", "--out", out)
    assert status == 0
    assert printed.splitlines()[-1] == str(out / "sheet.png")
    names = {"sheet.png", *(f"out-{index}.png" for index in range(len(demo.PROMPTS)))}
    assert {path.name for path in out.iterdir()} == names
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 4 * 300
        assert len(np.unique(np.asarray(sheet))) > 100


@pytest.mark.parametrize("command", [[], ["predict"], ["demo"], ["doctor"]])
def test_help(command: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for word in ("predict", "demo", "doctor") if not command else (command[0], "Usage"):
        assert word in result.output


def test_no_command_shows_the_help(run: Run) -> None:
    status, out, err = run()
    assert status == 2
    assert "predict" in out + err


def test_a_process_of_its_own(pictures: list[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On a console that knows ASCII alone."""
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "PYTHONWARNINGS": "error",
        "OMP_NUM_THREADS": "1",
    }
    environment["RITOCCO_MODEL"] = str(tiny_checkpoint)
    command = [sys.executable, "-m", "ritocco", "predict", *pictures, "--json", "--out", "made/here"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer["output"] == [str(Path("made") / "here" / "out-0.png")]
    with Image.open(tmp_path / answer["output"][0]) as picture:
        assert picture.size == (64, 64)


def test_a_link_in_the_folder_is_replaced_not_followed(predict: Run, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "out-0.png").symlink_to(victim)
    assert predict()[0] == 0
    assert victim.read_text() == "mine"
    assert not (tmp_path / "out" / "out-0.png").is_symlink()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["out-0.png"]


def test_titles_of_a_sheet_fit_their_pictures() -> None:
    assert fitted("a red car", 9, len) == "a red car"
    assert fitted("a red sports car", 9, len) == "a red..."
    assert len(fitted("x" * 500, 9, len)) == 9
    assert fitted("anything", 0, len) == "..."
