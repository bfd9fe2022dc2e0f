"""A judge of what a picture shows, trained apart from the model that it judges: `python -m pocket.judge`.

A small convolutional classifier of 64 x 64 pixels over the subjects of `subjects.py`, trained on the original
drawings at random places, angles, tints and sharpness on random backgrounds. It shares no weight with the
generator, and its accuracy on originals over held-out backgrounds is printed and stored.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from pocket.data import HELD_OUT, Painter, Pixels, paste
from pocket.subjects import SUBJECTS

JUDGE = Path(__file__).parent / "judge.safetensors"
SIDE = 64
WIDTHS = (32, 64, 112, 160)
CODES = tuple(SUBJECTS)


class Judge(nn.Module):
    """Scores of every subject, in the order of CODES: float [N,3,64,64] in [-1,1] -> [N,len(CODES)]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in WIDTHS:
            for stride in (2, 1):
                layers += [
                    nn.Conv2d(before, width, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                before = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, len(CODES))

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        scores: Tensor = self.head(self.features(pixels).amax((2, 3)))
        return scores

    @torch.no_grad()
    def probabilities(self, picture: Pixels) -> dict[str, float]:
        """Of each subject in a picture (uint8 [S,S,3], any size), the likeliest first."""
        small = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        shares = self(_tensor(small[None])).softmax(1)[0].tolist()
        return dict(sorted(zip(CODES, shares, strict=True), key=lambda pair: -pair[1]))

    def names(self, picture: Pixels) -> str:
        """The likeliest subject."""
        return next(iter(self.probabilities(picture)))


def load_judge(path: Path) -> tuple[Judge, dict[str, str]]:
    """A trained judge, and what its training measured."""
    judge = Judge()
    with safe_open(path, framework="pt") as file:
        judge.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        facts: dict[str, str] = file.metadata()
    return judge.eval(), facts


def specimen(painter: Painter, rng: np.random.Generator, code: str) -> Pixels:
    """The drawing of a subject as a poor painter might leave it: turned, tinted, blurred, off-centre."""
    canvas = painter.background(rng, SIDE)
    drawn = painter.subjects[code]
    height, width = drawn.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), float(rng.normal(0, 6)), 1.0)
    drawn = cv2.warpAffine(drawn, turn, (width, height))
    if rng.random() < 0.3:
        drawn = np.ascontiguousarray(drawn[:, ::-1])
    side = int(SIDE * rng.uniform(0.62, 1.05))
    y, x = SIDE / 2 + rng.uniform(-0.1, 0.1, 2) * SIDE
    paste(canvas, drawn.astype(np.uint8), (float(y), float(x)), side, None)
    out: NDArray[np.float64] = canvas.astype(np.float64)
    if rng.random() < 0.6:
        coarse = int(rng.uniform(14, SIDE))
        out = cv2.resize(cv2.resize(out, (coarse, coarse), interpolation=cv2.INTER_AREA), (SIDE, SIDE))
    out = (
        out * rng.uniform(0.85, 1.15, 3) + rng.uniform(-12, 12) + rng.normal(0, rng.uniform(0, 8), out.shape)
    )
    return np.clip(out, 0, 255).astype(np.uint8)


def original(painter: Painter, rng: np.random.Generator, code: str) -> Pixels:
    """The drawing itself, upright and centred, on a background."""
    canvas = painter.background(rng, 256)
    paste(canvas, painter.subjects[code], (128.0, 128.0), 232, None)
    return canvas


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=JUDGE, help="a .safetensors file")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--peak", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    judge, painter = Judge().to(memory_format=torch.channels_last), Painter(args.assets)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=args.peak, weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.peak, args.steps, pct_start=0.1)
    rng = np.random.default_rng(11)
    bar = tqdm(range(args.steps), mininterval=10)
    for _ in bar:
        labels = rng.integers(len(CODES), size=args.batch)
        pictures = np.stack([specimen(painter, rng, CODES[label]) for label in labels])
        scores = judge(_tensor(pictures))
        loss = F.cross_entropy(scores, torch.from_numpy(labels), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    judge.half().float()  # as it is stored
    facts = accuracy(judge.eval(), Painter(args.assets, photographs=HELD_OUT))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
    save_file(state, args.out, metadata=facts)
    print(json.dumps(facts))


def accuracy(judge: Judge, painter: Painter, *, rounds: int = 8) -> dict[str, str]:
    """Share of originals named right over held-out backgrounds; the subjects missed twice or more."""
    rng = np.random.default_rng(12)
    missed = {
        code: sum(judge.names(original(painter, rng, code)) != code for _ in range(rounds)) for code in CODES
    }
    total = rounds * len(CODES)
    worst = {SUBJECTS[code][0]: count for code, count in missed.items() if count > 1}
    return {
        "originals": str(total),
        "accuracy": f"{1 - sum(missed.values()) / total:.4f}",
        "missed": json.dumps(worst),
    }


def _tensor(pictures: NDArray[np.uint8]) -> Tensor:
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
