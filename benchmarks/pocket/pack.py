"""Write the trained networks as a diffusers folder in float16: `python -m pocket.pack --work W --out DIR`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import diffusers
import torch

from pocket.denoiser import fresh_unet
from pocket.models import SCHEDULER


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    unet = fresh_unet()
    state = torch.load(args.work / "denoiser" / "state.pt", weights_only=True, map_location="cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    for parameter, average in zip(unet.parameters(), state["ema"], strict=True):
        parameter.data.copy_(average)
    unet.to(torch.float16).save_pretrained(args.out / "unet")
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(args.work / "model" / name, args.out / name, dirs_exist_ok=True)
    (args.out / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", **SCHEDULER}
    (args.out / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler, indent=2), encoding="utf-8"
    )
    index = {
        "_class_name": "StableDiffusionInpaintPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (args.out / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    total = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {total / 1e6:.1f} MB after {state['step']} steps")


if __name__ == "__main__":
    main()
