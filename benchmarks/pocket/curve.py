"""Draw the curves of both trainings: `python -m pocket.curve --work W --out curve.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PANELS = (
    ("vae", "psnr", "autoencoder: PSNR of training crops, dB"),
    ("denoiser", "hole", "v-loss in the hole"),
)
SPAN = 10  # points of the running mean


def draw(work: Path) -> Figure:
    """One panel a training; raw points and their running mean."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for place, (folder, key, title) in enumerate(PANELS, 1):
        axes = figure.add_subplot(1, len(PANELS), place, title=title, xlabel="step")
        lines = (work / folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        steps, values = [row["step"] for row in rows], [row[key] for row in rows]
        pieces = [values[max(0, i - SPAN + 1) : i + 1] for i in range(len(values))]
        axes.plot(steps, values, color="0.8")
        axes.plot(steps, [sum(piece) / len(piece) for piece in pieces], color="tab:blue")
        axes.grid(alpha=0.3)
        if key == "hole":
            axes.set_yscale("log")
    return figure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(args.work).savefig(args.out, dpi=90)
    print(args.out)


if __name__ == "__main__":
    main()
