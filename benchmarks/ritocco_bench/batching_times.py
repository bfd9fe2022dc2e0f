"""Step times that the simulation of batching runs on: measured here, or on a GPU before."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ritocco import Engine
from ritocco_bench.processes import BenchError
from ritocco_bench.simulation import Given

LADDER = Path("benchmarks/results/ladder.jsonl")
TURNS = Path("benchmarks/results/gpu-turns.jsonl")
LANES = (1, 2, 4, 8)
TIMED_STEPS = 6


def asked_of(size: int, steps: int, seed: int) -> dict[str, Any]:
    """A request of random pixels, half of them to repaint, guided."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    mask = np.zeros((size, size), np.uint8)
    mask[: size // 2] = 255
    return {
        "image": pixels,
        "mask": mask,
        "prompt": "a yellow cat on a park bench, high resolution",
        "width": size,
        "height": size,
        "num_inference_steps": steps,
        "seed": seed,
        "scheduler": "DPMSolverMultistep",
    }


def measured(engine: Engine, sizes: Sequence[int], lanes: Sequence[int] = LANES, repeats: int = 5) -> Given:
    """On an engine: medians of `repeats`. A step is the mean of TIMED_STEPS after two that come first; sizes
    and numbers of lanes are in turns, so that a machine that changes its speed changes it for all.
    """
    from ritocco import stages

    runtime = engine.runtime
    steps: dict[tuple[int, int], list[float]] = {}
    starts: dict[int, list[float]] = {size: [] for size in sizes}
    finishes: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            job = engine.check(asked_of(size, TIMED_STEPS + 2, 1))
            for count in lanes:
                began = time.perf_counter()
                (lane,) = stages.lanes(runtime, job.request)
                starts[size].append(time.perf_counter() - began)
                batch = runtime.open(job.size, count)
                for slot in range(count):
                    batch.join(slot, lane)
                for row in range(TIMED_STEPS + 2):
                    if row == 2:
                        batch.leave(0)  # waits for the device
                        batch.join(0, lane)
                        began = time.perf_counter()
                    batch.step(dict.fromkeys(range(count), row))
                states = [batch.leave(slot) for slot in range(count)]
                steps.setdefault((size, count), []).append((time.perf_counter() - began) / TIMED_STEPS)
                began = time.perf_counter()
                stages.decoded(runtime, job.request, [states[0].latents])
                finishes[size].append(time.perf_counter() - began)
    return Given(
        steps={size: {count: statistics.median(steps[size, count]) for count in lanes} for size in sizes},
        starts={size: statistics.median(starts[size]) for size in sizes},
        finishes={size: statistics.median(finishes[size]) for size in sizes},
    )


def of_ladder(ladder: Path = LADDER, turns: Path = TURNS, sizes: Sequence[int] = (512, 1024)) -> Given:
    """The GPU's: 512 x 512 as measured, the last row of each number of lanes. Larger pictures were not timed:
    as many lanes of 512 x 512 as they have pixels are put in their place (attention's share grows faster, so
    it is a little short); numbers of lanes that were not timed either lie on a straight line.

    Raises BenchError where the files lack something.
    """
    found: dict[int, float] = {}
    for one in _rows(ladder):
        for count in LANES:
            if one["case"] == f"ladder-512x512-{count}x" and one["rung"] == "graphs":
                found[count] = one["p50_ms"] / 1000
    phases = {
        one["phase"]: one["p50_ms"] / 1000
        for one in _rows(turns)
        if one["variant"] == "ritocco" and one["case"] == "turns-512x512-25steps-1x"
    }
    missing = [name for name in ("text", "encode", "decode") if name not in phases]
    if missing or set(found) != set(LANES):
        raise BenchError(f"{ladder} and {turns} lack {', '.join(missing) or 'numbers of lanes'}")
    measured = Given(steps={512: found}, starts={}, finishes={})
    times = {size: (size / 512) ** 2 for size in sizes}
    return Given(
        steps={size: {n: measured.step(512, n * most) for n in LANES} for size, most in times.items()},
        starts={size: phases["text"] + most * phases["encode"] for size, most in times.items()},
        finishes={size: most * phases["decode"] for size, most in times.items()},
    )


def to_json(given: Given) -> dict[str, Any]:
    """For a row; JSON's keys are texts."""
    return {
        "steps_s": {str(size): {str(n): s for n, s in one.items()} for size, one in given.steps.items()},
        "start_s": {str(size): seconds for size, seconds in given.starts.items()},
        "finish_s": {str(size): seconds for size, seconds in given.finishes.items()},
    }


def from_json(held: dict[str, Any]) -> Given:
    """What `to_json` wrote."""
    return Given(
        steps={
            int(size): {int(n): float(s) for n, s in one.items()} for size, one in held["steps_s"].items()
        },
        starts={int(size): float(seconds) for size, seconds in held["start_s"].items()},
        finishes={int(size): float(seconds) for size, seconds in held["finish_s"].items()},
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
