"""The drawing of a plan."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ritocco.cli import app
from ritocco.errors import BackendError
from ritocco.memory import PHASES, Phase, Usage
from ritocco.plan_plot import draw
from ritocco.plans import MemoryPlan, Strategy


def plan(**changes: object) -> MemoryPlan:
    course = {name: tuple(one << 20 for one in range(at, at + 50)) for at, name in enumerate(PHASES)}
    phases = {name: Phase(most=max(one), moment="conv2d", course=one) for name, one in course.items()}
    values = {
        "device": "cpu",
        "dtype": "float32",
        "width": 64,
        "height": 64,
        "num_outputs": 1,
        "budget": 80 << 20,
        "strategy": Strategy(at_once=1),
        "usage": Usage(weights={"unet": 1}, phases=phases),
        "read_again": 0,
        "read_again_seconds": None,
        "more": None,
        "less": None,
    }
    return MemoryPlan(**{**values, **changes})  # type: ignore[arg-type]


def test_the_command_draws_each_phase_in_its_colour(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    words = ["plan", "--model", str(tiny_checkpoint), "--width", "64", "--height", "64", "--dtype", "float32"]
    done = CliRunner().invoke(app, [*words, "--plot", str(file)])
    assert done.exit_code == 0, done.exception
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    # Text, encode, denoise and decode take most of the operations; each has at least one column of pixels.
    for colour in ((0x4C, 0x78, 0xA8), (0x72, 0xB7, 0xB2), (0xF2, 0xA1, 0x3C), (0xB2, 0x79, 0xA2)):
        painted = 0.85 * np.array(colour) + 0.15 * 255
        assert (np.abs(pixels - painted).max(axis=1) < 3).any(), colour


def test_the_budget_is_a_line(tmp_path: Path) -> None:
    pictures = []
    for budget in (80 << 20, None):
        draw(plan(budget=budget), tmp_path / "plan.png")
        pixels = np.asarray(Image.open(tmp_path / "plan.png").convert("RGB")).reshape(-1, 3).astype(int)
        pictures.append((np.abs(pixels - (0xC0, 0x39, 0x2B)).max(axis=1) < 8).sum())
    assert pictures[0] > 50
    assert pictures[1] == 0


def test_the_most_may_be_held_before_the_first_operation(tmp_path: Path) -> None:
    phases = {"load": Phase(most=9, moment="to"), "text": Phase(most=9 << 20, moment="", course=(1, 2))}
    draw(plan(usage=Usage(weights={}, phases=phases)), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 0


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match=r'pip install "ritocco\[plot\]"'):
        draw(plan(), tmp_path / "plan.png")


def test_a_file_that_can_not_be_written_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritocco.plan_verify.allocated", None)  # nothing runs before
    words = ["plan", "--model", str(tiny_checkpoint), "--width", "64", "--height", "64", "--dtype", "float32"]
    done = CliRunner().invoke(app, [*words, "--verify", "--plot", str(tmp_path / "nowhere" / "plan.png")])
    assert done.exit_code == 1
    assert done.output.startswith("error: --plot is ")
