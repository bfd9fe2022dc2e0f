"""Optimum both ways, in an environment of its own: it paints from our export, and ritocco from its export."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest

import ritocco
from ritocco.checkpoint import open_checkpoint
from ritocco.loading import pocket_model
from ritocco_export.exporter import export_checkpoint
from ritocco_export.profiles import Profile

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "optimum==2.1.0",
    "optimum-onnx==0.1.0",
    "transformers==4.57.6",
    "tokenizers==0.22.2",
    "huggingface-hub==0.36.2",
    "diffusers==0.39.0",
)
# The rest is of the versions that everything else is tested with.
PINNED = ("torch", "numpy", "onnx", "onnxruntime", "pillow", "safetensors", "scipy")

# Paints with Optimum's pipeline; the masked image is the posterior's mean, as with ritocco.
PAINT = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from diffusers import DDIMScheduler
from optimum.onnxruntime import ORTStableDiffusionInpaintPipeline
from optimum.onnxruntime.modeling_diffusion import DiagonalGaussianDistribution
DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
folder, given, out = sys.argv[1:]
held = np.load(given)
pipe = ORTStableDiffusionInpaintPipeline.from_pretrained(folder, provider="CPUExecutionProvider")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pixels = pipe(
    prompt="a red apple", image=torch.from_numpy(held["image"]), mask_image=torch.from_numpy(held["mask"]),
    latents=torch.from_numpy(held["latents"]), height=128, width=128, num_inference_steps=4,
    guidance_scale=5.0, output_type="np",
).images
np.save(out, pixels)
"""
EXPORT = """
import sys, warnings
warnings.simplefilter("ignore")
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="inpainting", library_name="diffusers", do_validation=False)
"""
# On pictures from 0 to 1 after four steps: float32 on both sides, in another order of sums.
TOLERANCE = 1e-4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with Optimum and nothing of ours."""
    home = tmp_path_factory.mktemp("optimum")
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line.partition("==")[0] in PINNED]
    assert len(pinned) == len(PINNED)
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pinned, *PACKAGES)
    subprocess.run(pip, check=True)
    return python


def run(script: str, python: str, *arguments: Path) -> None:
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def inputs(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    ys, xs = np.mgrid[0:128, 0:128] / 127
    image = np.stack([xs, ys, 1 - xs])[None].astype(np.float32) * 2 - 1
    mask = np.zeros((1, 1, 128, 128), np.float32)
    mask[..., 32:96, 24:104] = 1
    latents = rng.standard_normal((1, 4, 16, 16), dtype=np.float32)
    held = {"image": image, "mask": mask, "latents": latents}
    np.savez(folder / "given.npz", **held)  # type: ignore[arg-type]
    return folder / "given.npz", held


def ours(model: Path, held: dict[str, np.ndarray]) -> np.ndarray:
    """What ritocco decodes, from 0 to 1: [1,128,128,3]."""
    engine = ritocco.load(model, backend="onnxruntime")
    kept: list[np.ndarray] = []
    runtime = engine.runtime
    decode = runtime.decode

    def keep(latents: np.ndarray) -> np.ndarray:
        kept.append(decode(latents))
        return kept[-1]

    runtime.decode = keep  # type: ignore[method-assign]
    engine.predict(
        {
            "image": np.rint((held["image"][0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8),
            "mask": (held["mask"][0, 0] * 255).astype(np.uint8),
            "prompt": "a red apple",
            "width": 128,
            "height": 128,
            "num_inference_steps": 4,
            "guidance_scale": 5.0,
            "scheduler": "DDIM",
        },
        latents=held["latents"],
    )
    return (kept[0] / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)


def test_optimum_paints_from_our_export(optimum: str, tmp_path: Path) -> None:
    graphs = tmp_path / "graphs"
    profile = Profile.parse("64..256@1..2")
    export_checkpoint(open_checkpoint(pocket_model()), graphs, layout="optimum", profiles=[profile])
    given, held = inputs(tmp_path)
    # Both start from the same bytes.
    held["image"] = np.rint((held["image"] + 1) * 127.5).astype(np.float32) / 127.5 - 1
    np.savez(given, **held)  # type: ignore[arg-type]
    run(PAINT, optimum, graphs, given, tmp_path / "theirs.npy")
    theirs = np.load(tmp_path / "theirs.npy")
    assert theirs.std() > 0.05
    assert np.abs(theirs - ours(graphs, held)).max() < TOLERANCE


def test_ritocco_paints_from_optimums_export(optimum: str, tmp_path: Path) -> None:
    graphs = tmp_path / "graphs"
    run(EXPORT, optimum, pocket_model(), graphs)
    given, held = inputs(tmp_path)
    held["image"] = np.rint((held["image"] + 1) * 127.5).astype(np.float32) / 127.5 - 1
    np.savez(given, **held)  # type: ignore[arg-type]
    run(PAINT, optimum, graphs, given, tmp_path / "theirs.npy")
    assert np.abs(np.load(tmp_path / "theirs.npy") - ours(graphs, held)).max() < TOLERANCE
