"""A folder by `ritocco batch`, beside a process for each picture, which is what a loop in a shell does.

    python -m ritocco_bench.folder_run --pictures 20 --pairs 3

Each takes its turn; seconds are those of the whole commands. Rows go to `--out`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ritocco_bench.processes import BenchError
from ritocco_bench.rows import append

OUT = Path("benchmarks/results/folders.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a command failed."""
    given = _parser().parse_args(arguments)
    inputs = ["--prompt", "a yellow cat on a park bench, high resolution", "--seed", "1"]
    inputs += ["--width", str(given.size), "--height", str(given.size)]
    inputs += ["--num-inference-steps", str(given.steps)]
    together: list[float] = []
    each: list[float] = []
    try:
        with tempfile.TemporaryDirectory() as held:
            names = _folder(Path(held), given.pictures, given.size)
            for turn in range(given.pairs):
                out = Path(held) / f"batch-{turn}"
                folders = ["--images", f"{held}/images", "--masks", f"{held}/masks", "--out", str(out)]
                together.append(_seconds("batch", *folders, *inputs))
                each.append(0.0)
                for name in names:
                    alone = Path(held) / f"alone-{turn}" / name
                    files = ["--image", f"{held}/images/{name}", "--mask", f"{held}/masks/{name}"]
                    each[-1] += _seconds("predict", *files, "--out", str(alone), *inputs)
                    _refuse_other(out / name, alone / "out-0.png")
                print(f"batch {together[-1]:.1f} s, a process each {each[-1]:.1f} s", flush=True)
    except BenchError as error:
        print(f"{error}\nNothing is reported.", file=sys.stderr)
        return 1
    ratios = [theirs / ours for ours, theirs in zip(together, each, strict=True)]
    row: dict[str, Any] = {"case": "folder", "pictures": given.pictures, "size": given.size}
    row |= {"steps": given.steps, "batch_s": together, "process_each_s": each, "times_faster": ratios}
    append(given.out, row)
    print(
        f"{given.pictures} pictures, {given.size} x {given.size}, {given.steps} steps: batch is "
        f"{statistics.median(ratios):.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    return 0


def _folder(held: Path, count: int, size: int) -> list[str]:
    mask = np.zeros((size, size), np.uint8)
    mask[: size // 2] = 255
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        for folder, array in (("images", pixels), ("masks", mask)):
            (held / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(held / folder / name)
    return names


def _seconds(*arguments: str) -> float:
    """Of a command of ours. Raises BenchError where it fails."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "ritocco", *arguments], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"`ritocco {arguments[0]}` failed: {done.stderr[-500:]}")
    return time.perf_counter() - begun


def _refuse_other(ours: Path, theirs: Path) -> None:
    """Raises BenchError where the two are not one picture, to the last bits that a shared step may change."""
    with Image.open(ours) as one, Image.open(theirs) as other:
        apart = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max()
    if apart > 1:
        raise BenchError(f"{ours.name} is another picture by `batch` than by `predict`: {apart} of 255 apart")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ritocco_bench.folder_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pictures", type=int, default=20, help="of the folder")
    parser.add_argument("--pairs", type=int, default=3, help="how often each is measured")
    parser.add_argument("--size", type=int, default=256, help="pixels per side")
    parser.add_argument("--steps", type=int, default=10, help="of each picture")
    parser.add_argument("--out", type=Path, default=OUT, help="JSONL file that rows are added to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
