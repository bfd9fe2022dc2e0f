"""`python -m ritocco_bench.gpu_plans`: what plans foretell of a GPU, beside what its allocator hands out.

A request is run in every strategy, or, where they are many, in the one that holds everything and in the
smallest, each with no more budget than its plan takes. Counted is the second of two requests, after one
like it. Its pictures are held beside those of the first strategy.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ritocco
from ritocco.checkpoint import Checkpoint, open_checkpoint
from ritocco.device import choose
from ritocco.memory import Rehearsal
from ritocco.plans import Planner, asked_without_pictures
from ritocco.scheduler_config import from_pipeline
from ritocco_bench.environment import Environment, environment
from ritocco_bench.folder import make_folder
from ritocco_bench.rows import add_options, append, held

CASES = "512x512@1,1024x1024@1,1024x1024@4"
STEPS = 4
AMPLE, MANY = 1 << 40, 4
LEAST_PSNR_DB = 30.0  # of bytes: other algorithms at other numbers of pictures, through four steps


def main() -> int:
    """Measure, append rows, print the table; 1 where a plan was too small, or a picture another."""
    arguments = _parser().parse_args()
    device = choose("cuda").device
    model = arguments.model or make_folder(Path(".cache/bench/full"))
    env = environment(str(device))
    there = held(arguments.out, env) if arguments.resume else []
    done = {(row.get("case"), row.get("model"), row.get("budget")) for row in there}
    cases = arguments.cases.split(",")
    kept = [measure(model, case, arguments.out, env, str(device), done) for case in cases]
    return 0 if all(kept) else 1


def asked(case: str) -> dict[str, Any]:
    """The request of WIDTHxHEIGHT@PICTURES."""
    sizes, count = case.split("@")
    width, height = map(int, sizes.split("x"))
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : -height // 4] = 255
    return {
        "image": pixels,
        "mask": mask,
        "width": width,
        "height": height,
        "num_outputs": int(count),
        "num_inference_steps": STEPS,
        "seed": 1,
    }


def budgets(checkpoint: Checkpoint, given: dict[str, Any]) -> list[int]:
    """What each strategy takes on a GPU in float16, from the first on; of many, the first and the last."""
    fields = asked_without_pictures(without_pictures(given))
    planner = Planner(
        lambda: Rehearsal(checkpoint, dtype=torch.float16, device="cuda", movable=True),
        device="cuda",
        dtype="float16",
        budget=AMPLE,
        schedule=from_pipeline(checkpoint.scheduler),
    )
    plan = planner.explained(fields)
    found = [plan.least]
    while plan.less is not None:
        planner.budget = plan.less[0]
        found.append(planner.budget)
        plan = planner.explained(fields)
    return found if len(found) <= MANY else [found[0], found[-1]]


def without_pictures(given: dict[str, Any]) -> dict[str, Any]:
    """What a plan is asked for."""
    return {name: value for name, value in given.items() if name not in ("image", "mask")}


def measure(
    model: Path, case: str, out: Path, env: Environment, device: str, done: Container[tuple[Any, Any, Any]]
) -> bool:
    """A row and a line of each strategy; whether every plan held, and every picture was the same. done: case,
    model and budget of what is there; the first strategy is run again for its picture where others are not.
    """
    given, first, kept = asked(case), None, True
    wanted = budgets(open_checkpoint(model), given)
    missing = [budget for budget in wanted if (f"plan-{case}", model.name, budget) not in done]
    for budget in dict.fromkeys([*wanted[:1], *missing]) if missing else ():
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with ritocco.load(model, device=device, backend="torch", memory_budget=budget) as engine:
            engine.predict(given)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            painted = [np.asarray(one, np.float64) for one in engine.predict(given).images]
            seconds = time.perf_counter() - began
            stats = torch.cuda.memory_stats()
            plan = engine.plan(**without_pictures(given))
        first = painted if first is None else first
        row = {
            "case": f"plan-{case}",
            "model": model.name,
            "dtype": plan.dtype,
            "budget": budget,
            "strategy": str(plan.strategy),
            "planned": plan.least,
            "requested": stats["requested_bytes.all.peak"] - before,
            "allocated": stats["allocated_bytes.all.peak"] - before,
            "reserved": stats["reserved_bytes.all.peak"],
            "read_again_seconds": plan.read_again_seconds,
            "seconds": seconds,
            "psnr_db": psnr(painted, first),
        }
        if budget in missing:
            append(out, row, env=env)
        enough = row["allocated"] <= plan.least and row["psnr_db"] >= LEAST_PSNR_DB
        kept = kept and enough
        sizes = (f"{name} {row[name] / 2**20:,.0f}" for name in ("planned", "allocated", "reserved"))
        what = f"{', '.join(sizes)} MiB, {seconds:.2f} s, {row['psnr_db']:.0f} dB"
        print(f"{case:12} {plan.strategy}: {what}{'' if enough else '  <- NOT KEPT'}", flush=True)
    return kept


def psnr(found: Sequence[np.ndarray[Any, Any]], wanted: Sequence[np.ndarray[Any, Any]]) -> float:
    """Of bytes; 99 where they are equal."""
    mean = float(np.mean([np.square(one - other).mean() for one, other in zip(found, wanted, strict=True)]))
    return 99.0 if mean == 0 else float(-10 * np.log10(mean / 255**2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ritocco_bench.gpu_plans", description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the full-size random folder")
    parser.add_argument("--cases", default=CASES, help="WIDTHxHEIGHT@PICTURES, separated by commas")
    add_options(parser, "gpu-plans.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
