"""End to end, with pictures that mean something: every scheduler on every backend paints the same cat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

import ritocco
from pocket.evaluate import psnr
from pocket.golden import FOLDER, SUBJECT, asked, hole, window
from pocket.judge import JUDGE, Judge, load_judge
from ritocco import Engine
from ritocco.loading import pocket_model
from ritocco.schedules import SCHEDULERS

# In the hole, float32 on both sides. Guidance and 25 steps amplify what another order of sums changes.
LEAST_PSNR_DB = 50.0
# Half of the mantissa's bits of float32: another picture of the same cat would be about 15 dB away.
LEAST_BFLOAT16_PSNR_DB = 22.0


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge(JUDGE)[0]


SESSIONS = ("onnxruntime", "openvino", "tensorrt")
# Each export of the model takes two minutes; quick tests hold small graphs against torch (test_sessions.py).
SLOW = [f"{graphs} on {runtime}" for graphs in ("plain", "hoisted") for runtime in SESSIONS]
ENGINES = ("plain on torch", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """TensorRT's library is a stand-in that computes with ONNX Runtime: what is tested is all around it."""
    graphs, _, backend = str(request.param).split()
    folder = {"plain": "pocket_graphs", "hoisted": "pocket_hoisted_graphs"}[graphs]
    model = pocket_model() if backend == "torch" else request.getfixturevalue(folder)
    with pytest.MonkeyPatch.context() as patch:
        if backend == "tensorrt":
            request.getfixturevalue("standing_in")
            patch.setenv("RITOCCO_CACHE", str(tmp_path_factory.mktemp("engines")))
        device = "cuda" if backend == "tensorrt" else "cpu"
        with ritocco.load(model, backend=backend, device=device, dtype="float32") as opened:
            yield opened


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_seed_gives_the_golden_picture(engine: Engine, judge: Judge, scheduler: str) -> None:
    painted = np.asarray(engine.predict(asked(scheduler)).images[0])
    golden = np.asarray(Image.open(FOLDER / f"{scheduler}.png"))
    assert psnr(painted[hole()], golden[hole()]) > LEAST_PSNR_DB
    assert judge.names(window(painted)) == SUBJECT


def test_golden_pictures_differ_between_schedulers() -> None:
    """So that a scheduler that was taken for another one is seen."""
    pictures = {name: np.asarray(Image.open(FOLDER / f"{name}.png"))[hole()] for name in SCHEDULERS}
    for name, one in pictures.items():
        nearest = max(psnr(one, other) for at, other in pictures.items() if at != name)
        assert nearest < LEAST_PSNR_DB - 5, name


@pytest.mark.slow
def test_bfloat16_paints_the_same_cat(judge: Judge) -> None:
    with ritocco.load(pocket_model(), device="cpu", dtype="bfloat16") as engine:
        painted = np.asarray(engine.predict(asked("DDIM")).images[0])
    golden = np.asarray(Image.open(FOLDER / "DDIM.png"))
    assert psnr(painted[hole()], golden[hole()]) > LEAST_BFLOAT16_PSNR_DB
    assert judge.names(window(painted)) == SUBJECT
