"""Write the trained networks as a diffusers folder in float16: `python -m pocket.pack --work W --out DIR`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import diffusers
import torch

from pocket.denoiser import networks
from pocket.models import SCHEDULER
from pocket.training import Schedule, Trainer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    _, text, unet = networks(args.work / "model")
    trainer = Trainer(
        modules={"unet": unet, "text_encoder": text},
        folder=args.work / "denoiser",
        schedule=Schedule(steps=1, peak=1e-4),
    )
    if not trainer.resume():
        raise SystemExit(f"no training state in {trainer.folder}")
    averaged = trainer.averaged()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, module in (("unet", unet), ("text_encoder", text)):
        module.float().load_state_dict(averaged[name], strict=True)
        module.to(torch.float16).save_pretrained(args.out / name)
    for name in ("vae", "tokenizer"):
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
    print(f"{args.out}: {total / 1e6:.1f} MB after {trainer.step} steps")


if __name__ == "__main__":
    main()
