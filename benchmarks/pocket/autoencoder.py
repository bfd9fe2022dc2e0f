"""Train the autoencoder on crops of composites: `torchrun --nproc-per-node 2 -m pocket.autoencoder`.

Reconstruction is L1 plus L2 plus the L1 of neighbouring differences (edges); a little noise on the latents
makes the decoder forgive the small errors of a denoiser. A learned posterior collapses in so short a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pocket.data import Painter
from pocket.initial import start_as_block_means
from pocket.models import VAE
from pocket.norm import quicken
from pocket.training import Schedule, Trainer, run, seed, start

NOISE = 0.05  # standard deviation added to the latents, which are held near 1
SIZE_WEIGHT = 1e-3
LOGVAR = -6.0  # of the posterior that the file states; training does not learn one


def crops(painter: Painter, *, batch: int, size: int, seed: tuple[int, int]) -> Iterator[Tensor]:
    """Endless batches [batch,3,size,size] of crops in [-1,1], made one batch ahead."""

    def make(index: int) -> Tensor:
        rng = np.random.default_rng((*seed, index))
        out = np.empty((batch, size, size, 3), np.uint8)
        for i in range(0, batch, 2):
            image = painter.sample(rng, int(rng.choice([192, 256, 384])), empty=0.1).image
            for j in range(i, min(i + 2, batch)):
                y, x = (int(v) for v in rng.integers(0, image.shape[0] - size + 1, 2))
                out[j] = image[y : y + size, x : x + size]
        return torch.from_numpy(out).permute(0, 3, 1, 2).to(torch.bfloat16) / 127.5 - 1.0

    index = 0
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, index)
        while True:
            index += 1
            ready, ahead = ahead, pool.submit(make, index)
            yield ready.result()


def reconstruction_loss(model: Any, pixels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch, and the parts to log."""
    pixels = pixels.to(memory_format=torch.channels_last)
    mean = model.encode(pixels).latent_dist.mean
    latents = mean + NOISE * torch.randn_like(mean)
    error = model.decode(latents).sample.float() - pixels.float()
    edges = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (
        error[..., 1:] - error[..., :-1]
    ).abs().mean()
    size = mean.float().square().mean()
    each = error.square().mean((1, 2, 3))
    loss = error.abs().mean() + 2.0 * each.mean() + 0.5 * edges + SIZE_WEIGHT * size
    psnr = (10 * torch.log10(4.0 / each)).mean()
    return loss, {"mse": each.mean().item(), "psnr": psnr.item(), "std": size.sqrt().item()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--peak", type=float, default=7e-4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU a process")
    args = parser.parse_args()
    rank, device = start(args.device)
    torch.manual_seed(0)
    model: Any = AutoencoderKL(**VAE)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.quant_conv.weight[4:] = 0.0
        model.quant_conv.bias[4:] = LOGVAR
    start_as_block_means(model)
    quicken(model)
    model.to(device)
    trainer = Trainer(
        modules={"vae": model},
        folder=args.work / "vae",
        schedule=Schedule(steps=args.steps, peak=args.peak, warmup=100, cooldown=0.4),
        ema_decay=0.998,
    )
    batches = crops(Painter(args.assets), batch=args.batch, size=args.size, seed=seed(trainer, rank))
    run(trainer, batches, lambda pixels: reconstruction_loss(model, pixels.to(device)))
    if rank:
        return
    weights = trainer.averaged()["vae"]
    model.float().cpu().load_state_dict(weights, strict=True)
    model.register_to_config(scaling_factor=latent_scale(model, args.assets))
    model.half().save_pretrained(args.work / "model" / "vae")


@torch.no_grad()
def latent_scale(model: Any, assets: Path) -> float:
    """One over the standard deviation of the latents of 64 composites, as latent diffusion defines it."""
    painter, rng = Painter(assets), np.random.default_rng(1)
    images = np.stack([painter.sample(rng, 256).image for _ in range(64)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    latents = torch.cat([model.encode(part).latent_dist.mean for part in torch.split(pixels, 16)])
    return round(1.0 / float(latents.std()), 5)


if __name__ == "__main__":
    main()
