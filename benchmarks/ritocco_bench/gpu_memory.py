"""`python -m ritocco_bench.gpu_memory`: what torch's allocator hands out on a GPU, phase by phase.

Three requests of one kind with a fresh runtime: in the first cuDNN looks for its algorithms (with `search`)
and work runs operation by operation, in the second it is captured (with `graphs`), the third is as all that
follow. Each phase's most is counted from what is held when it begins. The text is encoded once a prompt.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ritocco.backends.fast_path import FastPath
from ritocco.backends.runtime import LatentSize
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import Checkpoint, open_checkpoint
from ritocco.device import choose
from ritocco_bench.environment import Environment, environment
from ritocco_bench.folder import make_folder
from ritocco_bench.ladder import PLAIN, joined, make_lanes, walk
from ritocco_bench.rows import add_options, append, held

PATHS: dict[str, FastPath] = {
    "plain": PLAIN,
    "kernels": replace(PLAIN, kernels=True, packed=True),
    "search": replace(PLAIN, kernels=True, packed=True, search=True),
    "graphs": replace(PLAIN, kernels=True, packed=True, search=True, graphs=True),
}
CASES = "512x512@1,512x512@4,768x512@2,768x768@1,1024x1024@1,1024x1024@4"
STEPS = 4
REQUESTS = ("first", "second", "third")


def main() -> int:
    """Measure, append rows, print the table."""
    arguments = _parser().parse_args()
    device = choose("cuda").device
    model = arguments.model or make_folder(Path(".cache/bench/full"))
    cases = [(name, case) for name in arguments.paths.split(",") for case in arguments.cases.split(",")]
    measure(cases, model, arguments.dtype, arguments.out, environment(str(device)), device, arguments.resume)
    return 0


def measure(
    cases: Sequence[tuple[str, str]],
    model: Path,
    dtype: str,
    out: Path,
    env: Environment,
    device: torch.device,
    resume: bool,
) -> None:
    """A row, at once, and a line of each case (of PATHS, and WIDTHxHEIGHT@PICTURES). resume: leave out those
    that the file has of this model from the same sources on such a machine.
    """
    checkpoint = open_checkpoint(model)
    keys = ("path", "case", "model", "dtype")
    there = {tuple(row.get(key) for key in keys) for row in held(out, env)} if resume else set()
    for name, case in cases:
        row: dict[str, Any] = {"case": f"memory-{case}", "path": name, "model": model.name, "dtype": dtype}
        if tuple(row[key] for key in keys) in there:
            print(f"{name:8} {case:14} is there", flush=True)
            continue
        rows = measured(checkpoint, device, getattr(torch, dtype), PATHS[name], case)
        append(out, row | {"requests": rows}, env=env)
        print(f"{name:8} {case:14}", *(_shown(request, rows[request]) for request in rows), flush=True)


def measured(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, path: FastPath, case: str
) -> dict[str, dict[str, dict[str, int]]]:
    """request -> phase -> bytes: the most `allocated` (in blocks), `requested` and `reserved`; `held` at its
    end. The phase `load` is the first's alone.
    """
    sizes, count = case.split("@")
    width, height = map(int, sizes.split("x"))
    gc.collect()
    torch.cuda.empty_cache()
    rows: dict[str, dict[str, dict[str, int]]] = {}
    made: list[TorchRuntime] = []

    def load() -> None:
        made.append(TorchRuntime(checkpoint, device=device, dtype=dtype, path=path))

    loaded = _peak(load)
    lanes = make_lanes(checkpoint, LatentSize(height=height // 8, width=width // 8), int(count), STEPS)
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = pixels[..., 0] > 99
    tokens = np.ones((2, 77), np.int64)
    latents = np.stack([lane.latents for lane in lanes])
    runtime = made.pop()

    def denoise() -> None:
        batch = joined(runtime, LatentSize(height=height // 8, width=width // 8), lanes)
        walk(batch, lanes, range(STEPS))
        for slot in range(len(lanes)):
            batch.leave(slot)

    for request in REQUESTS:
        rows[request] = {"load": loaded} if request == "first" else {}
        rows[request] |= {
            "text": _peak(partial(runtime.encode_text, tokens)),
            "encode": _peak(partial(runtime.encode_pixels, pixels, mask)),
            "denoise": _peak(denoise),
            "decode": _peak(partial(runtime.decode_pixels, latents, (pixels, mask))),
        }
    return rows


def _peak(work: Callable[[], Any]) -> dict[str, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    return {
        "allocated": stats["allocated_bytes.all.peak"],
        "requested": stats["requested_bytes.all.peak"],
        "reserved": stats["reserved_bytes.all.peak"],
        "held": stats["allocated_bytes.all.current"],
    }


def _shown(request: str, phases: dict[str, dict[str, int]]) -> str:
    each = (f"{phase} {one['allocated'] / 2**20:.0f}" for phase, one in phases.items())
    reserved = max(one["reserved"] for one in phases.values()) / 2**20
    return f"| {request}: {', '.join(each)}, reserved {reserved:.0f} MiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ritocco_bench.gpu_memory", description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the full-size random folder")
    parser.add_argument("--cases", default=CASES, help="WIDTHxHEIGHT@PICTURES, separated by commas")
    parser.add_argument(
        "--paths",
        default=",".join(PATHS),
        help="of torch's runtime, separated by commas; default: %(default)s",
    )
    parser.add_argument("--dtype", default="float16", help="of weights and arithmetic; default: %(default)s")
    add_options(parser, "gpu-memory.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
