"""Train the UNet, given autoencoder and text encoder: `torchrun --nproc-per-node 2 -m pocket.denoiser`.

Training begins on small pictures, where a sample costs a sixteenth of what it costs at 512 pixels, and grows:
what subjects look like is learned first, how large pictures look last. Composites are encoded once and drawn
several times from a rolling store, each time with another caption, noise and timestep: the autoencoder then
costs a fraction of a step. The loss is that of v-prediction (Salimans & Ho 2022, arXiv:2202.00512,
appendix D), weighted towards the hole.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pocket.data import Painter, caption_of
from pocket.initial import start_at_zero
from pocket.models import SCHEDULER, UNET
from pocket.norm import quicken
from pocket.phrasings import Phrasebook
from pocket.training import Schedule, Trainer, run, seed, start

CAPACITY = 8000  # composites kept of each size
REHEARSAL = 0.4
# Of many ways to fill a hole with background, one drawn at random errs twice as much (in mean squares) as
# their mean. So the background learned in holes is a smooth fill with a part of the truth: still texture, but
# closer to the mean.
SOFTENED = 0.8
# An empty prompt has to continue the background; but guidance pushes away from what an empty prompt gives, so
# once a subject shows through the noise the empty prompt must see it too, or guidance pushes on and burns it.
# So captions are dropped (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1) the more often the better the
# subject shows.
DROPPED = 0.15
SHOWS = 64.0  # nats of evidence from which captions are dropped in that share
PLAIN = 256.0  # and in half of the cases
# Where the picture has more signal than noise, with and without caption must give the same: guidance would
# multiply the network's errors there, and it makes the equation stiff. The fourth-order multistep methods
# (PNDM, KLMS) are stable while a step times the Jacobian is below 0.3, the interval of Adams-Bashforth's, and
# at guidance 7.5 they broke pictures into a mosaic below sigma 1, and nowhere else.
AGREEMENT = 4.0  # weight of the squared difference
AGREE_FROM, AGREE_FULLY = 1.6, 1.0  # sigma where the weight sets in, and where it is whole
# Sampling starts from noise alone, where the schedule still leaves a signal of 7 % (Lin et al. 2023,
# arXiv:2305.08891, section 3.1). What the network then takes for noise lacks that signal, and as samplers
# carry it along, so does every later step: over a wide hole its mean is off by far more than that of true
# noise, and a network that trusts the mean greys what it paints. So most pictures of training are mixed as
# they would arrive there from noise alone, see `mixture`.
STARTS_FROM = 940  # of 1000; "leading" spacing starts 25 steps at 961
STARTS = 0.25  # share of the items put there beside those that fall there
FROM_NOISE_ALONE = 0.8  # share of the items
OUTSIDE_WEIGHT = 0.15  # of the loss outside the hole, where the answer is given by the condition


@dataclass(frozen=True, slots=True)
class Encoded:
    """One composite in latent space. latents, masked: bfloat16 [4,h,w], scaled; mask: bfloat16 [1,h,w]."""

    latents: Tensor
    masked: Tensor
    mask: Tensor
    caption: str
    subject: str


@dataclass(frozen=True, slots=True)
class Stages:
    """What size each step trains on: `sizes[i]` pixels for `steps[i]` steps, then the next.

    From the second stage on, a share REHEARSAL of the steps goes back to an earlier size, mostly the last.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Stages:
        """From `128:4000,256:2000`."""
        pairs = [part.split(":") for part in text.split(",")]
        return cls(tuple(int(size) for size, _ in pairs), tuple(int(steps) for _, steps in pairs))

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(self.steps)

    def size_of(self, step: int, rank: int) -> int:
        """Pixels of step `step` (0-based) in process `rank`; a step of any size takes about the same time."""
        stage = 0
        while stage < len(self.steps) - 1 and step >= sum(self.steps[: stage + 1]):
            stage += 1
        rng = np.random.default_rng((7, step, rank))
        if stage and rng.random() < REHEARSAL:
            stage = max(0, stage - int(rng.geometric(0.7)))
        return self.sizes[stage]


class Store:
    """A rolling store of encoded composites of several sizes.

    batch, fresh: pictures of a batch at 128 pixels and how many of them are new; larger pictures make smaller
    batches of the same number of pixels, a larger share of them new. empty: share of holes with background
    alone. everyday: share of subjects asked for in words that other captions lack. rank: of this process,
    which draws its own composites.
    """

    def __init__(
        self,
        painter: Painter,
        vae: Any,
        tokenizer: CLIPTokenizer,
        *,
        batch: int,
        fresh: float,
        empty: float,
        everyday: float,
        rank: int,
    ) -> None:
        self.painter, self.vae, self.tokenizer = painter, vae, tokenizer
        self.batch, self.fresh, self.empty, self.rank = batch, fresh, empty, rank
        self.everyday, self.book = everyday, Phrasebook()
        self.items: dict[int, list[Encoded]] = {}

    def batches(self, stages: Stages, start: int, seed: tuple[int, int]) -> Iterator[tuple[Tensor, ...]]:
        """Endless batches (latents, masked, mask, tokens) from step `start` on."""
        rng = np.random.default_rng(seed)
        for step in count(start):
            size = stages.size_of(step, self.rank)
            batch = max(1, round(self.batch * (128 / size) ** 2))
            items = self.items.setdefault(size, [])
            new = int(rng.poisson(self.fresh * (128 / size) ** 1.5))
            new = min(batch, max(new, batch * 4 - len(items)))
            if new:
                self._encode(rng, new, size)
            picks = items[len(items) - new :] + [items[i] for i in rng.integers(len(items), size=batch - new)]
            captions = [self._caption(rng, item) for item in picks]
            tokens = self.tokenizer(
                captions, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            yield (
                torch.stack([i.latents for i in picks]),
                torch.stack([i.masked for i in picks]),
                torch.stack([i.mask for i in picks]),
                tokens,
            )

    def _caption(self, rng: np.random.Generator, item: Encoded) -> str:
        if not (item.subject and item.caption):
            return item.caption
        everyday = self.everyday and rng.random() < self.everyday
        return self.book.phrase(rng, item.subject).text if everyday else caption_of(rng, item.subject)

    @torch.no_grad()
    def _encode(self, rng: np.random.Generator, count: int, size: int) -> None:
        samples = [self.painter.sample(rng, size, empty=self.empty, softened=SOFTENED) for _ in range(count)]
        pixels = (
            torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float() / 127.5 - 1
        )
        mask = torch.from_numpy(np.stack([s.mask for s in samples]))[:, None].float()
        both = torch.cat([pixels, pixels * (mask < 0.5)]).to(torch.bfloat16)
        both = both.to(self.vae.device, memory_format=torch.channels_last)
        means = self.vae.encode(both).latent_dist.mean.cpu()
        latents, masked = (means * self.vae.config.scaling_factor).chunk(2)
        small = F.interpolate(mask, scale_factor=1 / 8, mode="nearest").to(torch.bfloat16)
        items = self.items[size]
        items += [
            Encoded(latents[i].clone(), masked[i].clone(), small[i].clone(), s.caption, s.subject)
            for i, s in enumerate(samples)
        ]
        del items[:-CAPACITY]


def drop_rate(alpha_bar: Tensor, mask: Tensor) -> Tensor:
    """Probability [N] of dropping a caption. alpha_bar: [N]; mask: [N,1,h,w].

    Two pictures that differ by 1 in each latent of the hole are told apart by snr / 2 nats a latent. From
    SHOWS nats on the rate is DROPPED, and grows to a half at PLAIN; below, it falls to e^-5 of DROPPED: an
    empty prompt then expects a subject that does not show yet in one case of four hundred.
    """
    latents = 4 * mask.float().sum((1, 2, 3))
    evidence = latents * alpha_bar / (1 - alpha_bar) / 2
    faint = DROPPED * torch.exp((evidence / SHOWS - 1).clamp(max=0) * 5)
    plain = (torch.log(evidence / SHOWS) / math.log(PLAIN / SHOWS)).clamp(0, 1)
    return faint + (0.5 - DROPPED) * plain


def agreement_weight(alpha_bar: Tensor) -> Tensor:
    """0 to 1 for each noise level [N]: how much the outputs with and without caption have to agree."""
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    return (torch.log(AGREE_FROM / sigma) / math.log(AGREE_FROM / AGREE_FULLY)).clamp(0, 1)


def mixture(x0: Tensor, timesteps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x0 [n,4,h,w] with noise, as a deterministic sampler has it at `timesteps` [n] where no step errs.

    From noise z alone at a start s the sampler takes (z - signal_s x0) / sigma_s for the noise, and keeps to
    it: x_t = (signal_t - sigma_t signal_s / sigma_s) x0 + sigma_t / sigma_s z. Without a start, signal_t x0 +
    sigma_t z.
    """
    count = len(timesteps)
    starts = torch.maximum(torch.randint(STARTS_FROM, len(alpha_bar), (count,)), timesteps)
    signal, sigma, signal_s, sigma_s = (
        level.sqrt().view(-1, 1, 1, 1)
        for at in (timesteps, starts)
        for level in (alpha_bar[at], 1 - alpha_bar[at])
    )
    started = (torch.rand(count) < FROM_NOISE_ALONE).view(-1, 1, 1, 1)
    signal_s = signal_s.where(started, 0.0)
    sigma_s = sigma_s.where(started, 1.0)
    return (signal - sigma * signal_s / sigma_s) * x0 + sigma / sigma_s * torch.randn(x0.shape)


def v_loss(
    unet: Any, text: Any, alpha_bar: Tensor, blank: Tensor, batch: tuple[Tensor, ...]
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch, and the parts to log. blank: int64 [77], an empty prompt's tokens."""
    latents, masked, mask, tokens = batch
    count = latents.shape[0]
    share = torch.rand(count) ** 0.75  # a little more weight on high noise, where the subject is decided
    early = STARTS_FROM / 1000 + (1 - STARTS_FROM / 1000) * torch.rand(count)
    share = torch.where(torch.rand(count) < STARTS, early, share)
    timesteps = (share * 999.999).long()
    signal = alpha_bar[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alpha_bar[timesteps]).sqrt().view(-1, 1, 1, 1)
    x0 = latents.float()
    noisy = mixture(x0, timesteps, alpha_bar)
    target = (signal * noisy - x0) / sigma  # v: signal * noise - sigma * x0, with all that is not x0 as noise
    sample = torch.cat([noisy.to(torch.bfloat16), mask, masked], 1)
    dropped = torch.rand(count) < drop_rate(alpha_bar[timesteps], mask)
    agree = agreement_weight(alpha_bar[timesteps]) * tokens.ne(blank).any(1)
    pairs = agree.nonzero()[:, 0]  # seen twice, with and without caption
    rows = torch.cat([torch.arange(count), pairs])
    dropped = torch.cat([dropped, ~dropped[pairs]])
    with torch.no_grad():
        context = text(torch.where(dropped[:, None], blank, tokens[rows])).last_hidden_state
    sample = sample[rows].to(memory_format=torch.channels_last)
    output = unet(sample, timesteps[rows], context, return_dict=False)[0].float()
    inside = F.max_pool2d(mask.float(), 3, 1, 1)
    weight = OUTSIDE_WEIGHT + (1 - OUTSIDE_WEIGHT) * inside
    weight = weight / weight.sum((1, 2, 3), keepdim=True) / 4
    error = (output[:count] - target).square()
    loss = (error * weight).sum() / count
    # Each pair counts as one item of the batch; its second member learns the target too.
    second, difference = output[count:] - target[pairs], output[count:] - output[pairs]
    apart = (difference.square() * weight[pairs]).sum((1, 2, 3))
    loss = loss + ((second.square() * weight[pairs]).sum() + AGREEMENT * (apart * agree[pairs]).sum()) / count
    hole = (error * inside).sum() / (4 * inside.sum())
    parts = {"loss": loss.item(), "hole": hole.item(), "apart": apart.sum().item() / max(1, len(pairs))}
    return loss, parts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stages", type=Stages.parse, default="128:1500,256:2650,384:3300,512:2350")
    parser.add_argument("--batch", type=int, default=32, help="of 128 pixels, per process")
    parser.add_argument("--fresh", type=float, default=3.0, help="new composites among them")
    parser.add_argument("--empty", type=float, default=0.4, help="share of holes with background alone")
    parser.add_argument("--plain", type=float, default=0.15, help="share of backgrounds of one colour")
    parser.add_argument("--everyday", type=float, default=0.3, help="share of phrases of pocket.phrasings")
    parser.add_argument("--peak", type=float, default=1e-3)
    parser.add_argument("--others", type=float, default=1.0, help="weight of subjects not among the first")
    parser.add_argument(
        "--init", type=Path, help="start from the weights of this folder, e.g. the packed model"
    )
    parser.add_argument(
        "--before", type=int, default=0, help="steps behind these weights, whose data is not drawn again"
    )
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cooldown", type=float, default=0.3, help="share of the steps with a falling rate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU a process")
    args = parser.parse_args()
    rank, device = start(args.device)
    model = args.work / "model"
    torch.manual_seed(0)
    unet = fresh_unet()
    if args.init is not None:
        load_weights(args.init / "unet", unet)
    quicken(unet)
    unet.set_attn_processor(AttnProcessor())  # the fused one's backward pass is slow on a CPU
    tokenizer = CLIPTokenizer.from_pretrained(str(model / "tokenizer"))
    text: Any = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.bfloat16)
    text.requires_grad_(False)
    vae: Any = AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]
        model / "vae", torch_dtype=torch.bfloat16
    ).requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    for network in (unet, text, vae):
        network.to(device)
    trainer = Trainer(
        modules={"unet": unet},
        folder=args.work / "denoiser",
        schedule=Schedule(steps=args.stages.total, peak=args.peak, warmup=200, cooldown=args.cooldown),
        ema_decay=0.996,
        muon=args.muon,
    )
    config = {key: value for key, value in SCHEDULER.items() if key != "skip_prk_steps"}
    alpha_bar = DDIMScheduler(**config).alphas_cumprod.to(device)  # type: ignore[no-untyped-call, attr-defined]
    store = Store(
        Painter(args.assets, others=args.others, plain=args.plain),
        vae,
        tokenizer,
        batch=args.batch,
        fresh=args.fresh,
        empty=args.empty,
        everyday=args.everyday,
        rank=rank,
    )
    blank = tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    drawn = seed(trainer, rank, args.before)

    def loss_of(batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, float]]:
        with device:
            return v_loss(unet, text, alpha_bar, blank.to(device), tuple(part.to(device) for part in batch))

    run(trainer, store.batches(args.stages, trainer.step, drawn), loss_of)


def fresh_unet() -> Any:
    """The UNet with fresh weights."""
    unet: Any = UNet2DConditionModel(**UNET)  # type: ignore[no-untyped-call]
    start_at_zero(unet)
    return unet


def load_weights(folder: Path, module: Any) -> None:
    """The weights of one network of a packed model."""
    file = next(folder.glob("*.safetensors"))
    module.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})


if __name__ == "__main__":
    main()
