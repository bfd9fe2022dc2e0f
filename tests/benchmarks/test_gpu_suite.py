"""`benchmarks/gpu_suite.sh`: what its stages run, how they end, and that they go on. Python is a double."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_suite.sh"
DOUBLE = """#!/usr/bin/env bash
case "$*" in *is_available*) exit "$NO_GPU" ;; esac
[ "$1" = -c ] && exit 1
echo "$*" | tr -s ' ' >> "$CALLS"
case "$*" in *"$SLOW"*) [ -z "$SLOW" ] || { sleep 60 & wait; } ;; esac
case "$*" in *"$FAILS"*) [ -z "$FAILS" ] || exit 7 ;; esac
exit 0
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script for machines with a GPU")


def suite(
    folder: Path, *words: str, fails: str = "", slow: str = "", seconds: int = 470, gpu: bool = True
) -> tuple[int, list[str], str]:
    """Exit status, what Python was called with, and what was said on standard error."""
    double, calls = folder / "python3", folder / "calls"
    double.write_text(DOUBLE, encoding="utf-8")
    double.chmod(0o755)
    calls.unlink(missing_ok=True)
    variables = {
        "NO_GPU": str(int(not gpu)),
        "CALLS": str(calls),
        "FAILS": fails,
        "SLOW": slow,
        "STAGE_SECONDS": str(seconds),
    }
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SUITE), *words],
        env={**os.environ, **variables, "PATH": path},
        capture_output=True,
        text=True,
        timeout=30,
    )
    called = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
    return done.returncode, called, done.stderr


def test_each_stage_runs_what_it_names_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    stages = ["kernels", "ladder", "memory", "plans", "peers", "compiled", "autotuned", "turns", "tests"]
    status, called, said = suite(tmp_path, "--out", "rows", "--outputs", "2", *stages)
    made = "-m ritocco_bench make-folder --out .cache/bench/full"
    steps = (
        "-m ritocco_bench steps --model .cache/bench/full --device cuda --size 512 --steps 25 --pairs 1 "
        "--runs 7 --warm 3 --outputs 2 --peers {} --out rows/{}.jsonl --resume"
    )
    assert (status, said) == (0, "")
    assert called == [
        "-m ritocco_bench.kernel_floors --out rows/kernels.jsonl --resume",
        made,
        "-m ritocco_bench.ladder --model .cache/bench/full --out rows/ladder.jsonl "
        "--profile rows/profile.txt --resume",
        made,
        "-m ritocco_bench.gpu_memory --model .cache/bench/full --out rows/gpu-memory.jsonl --resume",
        made,
        "-m ritocco_bench.gpu_plans --model .cache/bench/full --out rows/gpu-plans.jsonl --resume",
        made,
        steps.format("", "peers").replace("  ", " "),
        made,
        steps.format("diffusers-compiled", "compiled"),
        made,
        steps.format("diffusers-autotuned", "autotuned"),
        made,
        "-m ritocco_bench turns --model .cache/bench/full --device cuda --size 512 --steps 25 --pairs 7 "
        "--outputs 2 --peers diffusers-compiled --out rows/gpu-turns.jsonl --resume",
        "-m pytest -q -m gpu -p no:cacheprovider -p no:benchmark tests/kernels "
        "tests/engine/test_fast_path.py tests/engine/test_device.py tests/engine/test_float16_range.py",
    ]
    _, called, _ = suite(tmp_path, "--again", "kernels")
    assert called == ["-m ritocco_bench.kernel_floors --out benchmarks/results/kernels.jsonl"]


def test_nothing_is_run_or_written_without_a_gpu_or_a_stage(tmp_path: Path) -> None:
    status, called, said = suite(tmp_path, "memory", gpu=False)
    assert (status, called) == (1, [])
    assert "torch sees no CUDA device here: nothing was run" in said
    status, called, said = suite(tmp_path)
    assert (status, called) == (2, [])
    assert "gpu_suite.sh [--out FOLDER]" in said


def test_a_model_that_is_there_is_not_written_into(tmp_path: Path) -> None:
    model = tmp_path / "real"
    status, called, _ = suite(tmp_path, "--model", str(model), "memory")
    assert (status, called[0]) == (0, f"-m ritocco_bench make-folder --out {model}")
    model.mkdir()
    status, called, said = suite(tmp_path, "--model", str(model), "memory", "kernels")
    assert (status, len(called)) == (1, 1)
    assert f"{model}: holds no model_index.json; name a diffusers folder" in said
    (model / "model_index.json").write_text("{}", encoding="utf-8")
    for stage in ("memory", "ladder", "peers", "turns", "warm"):
        status, called, _ = suite(tmp_path, "--model", str(model), stage)
        assert status == 0
        assert called
        assert not any("make-folder" in call for call in called)


@pytest.mark.parametrize(
    ("stage", "fails", "runs"),
    [
        ("kernels", "kernel_floors", 1),
        ("memory", "make-folder", 1),
        ("memory", "gpu_memory", 2),
        ("warm", '"outputs": 2', 4),
        ("warm", "make-folder", 1),
        ("tests", "pytest", 1),
    ],
)
def test_a_stage_that_fails_is_told_and_the_next_one_runs(
    tmp_path: Path, stage: str, fails: str, runs: int
) -> None:
    status, called, _ = suite(tmp_path, stage, "kernels", fails=fails)
    assert status == 1
    assert len(called) == runs + 1
    assert "kernel_floors" in called[-1]


@pytest.mark.parametrize("stage", ["kernels", "warm"])
def test_a_stage_is_cut_short_with_what_it_started(tmp_path: Path, stage: str) -> None:
    slow = {"kernels": "kernel_floors", "warm": '"outputs": 4'}[stage]
    status, called, said = suite(tmp_path, stage, "tests", slow=slow, seconds=1)
    assert status == 1
    assert said.splitlines() == ["cut short after 1 s"]
    assert "-m pytest" in called[-1]


def test_stages_that_there_are_not_are_refused(tmp_path: Path) -> None:
    status, called, said = suite(tmp_path, "kernel")
    assert (status, called, said) == (2, [], "unknown stage: kernel\n")
