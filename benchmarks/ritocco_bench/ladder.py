"""`python -m ritocco_bench.ladder`: what each part of the fast path is worth, on one GPU in one process.

Every rung adds one flag of `FastPath`. Measured is the loop alone: the steps of a schedule but the first,
with their host work, between two events on the device. Before a rung is timed, its latents after a few steps
of the same lanes are compared with those of the plain path in float32: their distance may be twice that of
the plain path in the measured dtype.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ritocco.backends.fast_path import FastPath
from ritocco.backends.runtime import Lane, LatentSize
from ritocco.backends.torch_ import TorchBatch, TorchRuntime
from ritocco.checkpoint import Checkpoint, open_checkpoint
from ritocco.device import choose
from ritocco.noise import normal
from ritocco.schedules import build
from ritocco_bench.environment import Environment, environment
from ritocco_bench.folder import make_folder
from ritocco_bench.processes import BenchError
from ritocco_bench.rows import append, held

PLAIN = FastPath(kernels=False, packed=False, graphs=False, search=False)
RUNGS: tuple[tuple[str, dict[str, bool]], ...] = (
    ("plain", {}),
    ("search", {"search": True}),
    ("packed", {"packed": True}),
    ("kernels", {"kernels": True}),
    ("graphs", {"graphs": True}),
    ("compiled", {"compiled": True}),
)
UNASKED = tuple(name for name, flags in RUNGS if "compiled" not in flags)
STEPS = 25
CHECKED_STEPS = 3
# Full size, 64 x 64 cells, guided, every layer for both prompts: as peers count, and 2 to 3 % more than is
# computed here, where the layers before the first cross-attention are shared.
TFLOP_PER_IMAGE_STEP = 1.609


def make_lanes(checkpoint: Checkpoint, size: LatentSize, count: int, steps: int) -> list[Lane]:
    """Guided lanes of random contents that share table, contexts and condition, as one request's do."""
    width = int(checkpoint.unet["cross_attention_dim"])
    cells = (size.height, size.width)
    contexts, condition = normal(7, 1, (2, 77, width)), normal(7, 2, (5, *cells))
    table = build("DPMSolverMultistep", steps, checkpoint.scheduler)
    return [
        Lane(
            table=table,
            seed=seed,
            guidance=7.5,
            latents=np.float32(table.start_noise[0]) * normal(seed, 0, (4, *cells)),
            context=contexts[0],
            unconditional=contexts[1],
            condition=condition,
        )
        for seed in range(count)
    ]


def joined(runtime: TorchRuntime, size: LatentSize, lanes: list[Lane]) -> TorchBatch:
    """A batch that holds the lanes, in slots from 0 on."""
    batch = runtime.open(size, len(lanes))
    for slot, lane in enumerate(lanes):
        batch.join(slot, lane)
    return batch


def walk(batch: TorchBatch, lanes: list[Lane], rows: range) -> None:
    """All lanes by these rows of their table."""
    for index in rows:
        batch.step(dict.fromkeys(range(len(lanes)), index))


def final_latents(runtime: TorchRuntime, size: LatentSize, lanes: list[Lane]) -> np.ndarray[Any, Any]:
    """Every lane to the end of its table: [N,4,h,w]. Raises BenchError where one is not finite."""
    batch = joined(runtime, size, lanes)
    walk(batch, lanes, range(len(lanes[0].table)))
    states = [batch.leave(slot) for slot in range(len(lanes))]
    if any(state.broken_row is not None for state in states):
        raise BenchError("latents are not finite: no time is reported")
    return np.stack([state.latents for state in states]).astype(np.float64)


def timed(runtime: TorchRuntime, size: LatentSize, lanes: list[Lane], repeats: int) -> list[float]:
    """Milliseconds for each step, the mean of a schedule, once for each repeat; from fresh latents each time.

    Raises BenchError where they end up not finite.
    """
    rows = range(len(lanes[0].table))
    final_latents(runtime, size, lanes)
    taken = []
    for _ in range(repeats):
        batch = joined(runtime, size, lanes)
        batch.step(dict.fromkeys(range(len(lanes)), 0))  # what is made at the first step of a batch
        begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        walk(batch, lanes, rows[1:])
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / (len(rows) - 1))
        if any(batch.leave(slot).broken_row is not None for slot in range(len(lanes))):
            raise BenchError("latents are not finite: no time is reported")
    return taken


def profile(runtime: TorchRuntime, size: LatentSize, lanes: list[Lane]) -> str:
    """The kernels of one step, by the time they take."""
    batch, steps = joined(runtime, size, lanes), 10
    walk(batch, lanes, range(3))
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        walk(batch, lanes, range(3, 3 + steps))
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda one: -one.device_time_total)
    lines = [f"{'us/step':>9} {'calls':>6}  kernel"]
    lines += [f"{e.device_time_total / steps:9.1f} {e.count / steps:6.1f}  {e.key[:110]}" for e in events]
    return "\n".join([*lines, f"{sum(e.device_time_total for e in events) / steps:9.1f} in all", ""])


def main() -> int:
    """Measure, append rows, print the table."""
    arguments = _parser().parse_args()
    device = choose("cuda").device
    model = arguments.model or make_folder(Path(".cache/bench/full"))
    checkpoint = open_checkpoint(model)
    size = LatentSize(height=arguments.size // 8, width=arguments.size // 8)
    counts = [int(count) for count in arguments.lanes.split(",")]
    rungs = arguments.rungs.split(",")
    env = environment(str(device))
    there = left_out(arguments.out, env, model.name, arguments.dtype) if arguments.resume else set()
    todo = {name: [n for n in counts if (_case(arguments.size, n), name) not in there] for name in rungs}
    profiles = _profiles(arguments.profile)
    if arguments.resume and all(file.is_file() for file in profiles.values()):
        profiles = profiles if todo[rungs[-1]] else {}
    if not (any(todo.values()) or profiles):
        print("every rung is there", flush=True)
        return 0
    checked = make_lanes(checkpoint, size, max(counts), CHECKED_STEPS)
    path = PLAIN
    runtime = _runtime(checkpoint, device, torch.float32, path)
    truth = final_latents(runtime, size, checked)
    del runtime
    dtype = getattr(torch, arguments.dtype)
    runtime = _runtime(checkpoint, device, dtype, path)
    least = {count: _rms(runtime, size, checked[:count], truth) for count in counts}
    del runtime
    for name, flags in RUNGS:
        path = replace(path, **flags)
        profiled = profiles if name == rungs[-1] else {}
        if not (todo.get(name) or profiled):
            continue
        runtime = _runtime(checkpoint, device, dtype, path)
        for count in todo[name]:
            base = least[count]
            error = _rms(runtime, size, checked[:count], truth)
            if not error <= 2 * base:
                print(f"{name}: {error:.2e} from float32, plain {base:.2e}: no time is reported")
                return 1
            torch.cuda.reset_peak_memory_stats()
            taken = timed(runtime, size, make_lanes(checkpoint, size, count, STEPS), arguments.repeats)
            p50 = statistics.median(taken)
            row = {
                "case": _case(arguments.size, count),
                "model": model.name,
                "rung": name,
                "path": asdict(path),
                "dtype": arguments.dtype,
                "each_ms": taken,
                "p50_ms": p50,
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
                "rms_error": error,
            }
            append(arguments.out, row, env=env)
            rate = f"{TFLOP_PER_IMAGE_STEP * count / p50 * 1000:.0f} TFLOP/s, " * (arguments.size == 512)
            print(
                f"{name:16} {count} lanes: {p50:7.3f} ms a step ({min(taken):.3f} to {max(taken):.3f}), "
                f"{p50 / count:6.3f} an image, {rate}"
                f"peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB, error {error:.2e}",
                flush=True,
            )
        for count, file in profiled.items():
            text = profile(runtime, size, make_lanes(checkpoint, size, count, STEPS))
            file.write_text(text, encoding="utf-8")
        del runtime
        torch.cuda.empty_cache()
    return 0


def left_out(out: Path, env: Environment, model: str, dtype: str) -> set[tuple[str, str]]:
    """(case, rung) that a file holds of a model in a dtype, from the same sources on such a machine."""
    rows = [row for row in held(out, env) if (row.get("model"), row.get("dtype")) == (model, dtype)]
    return {(row["case"], row["rung"]) for row in rows if "rung" in row}


def _case(size: int, count: int) -> str:
    return f"ladder-{size}x{size}-{count}x"


def _profiles(file: Path | None) -> dict[int, Path]:
    """Pictures at a time -> file of their step's kernels."""
    return {} if file is None else {n: file.with_name(f"{file.stem}-{n}x.txt") for n in (1, 4)}


def _runtime(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, path: FastPath
) -> TorchRuntime:
    """A fresh one; what the last one held is given back before."""
    torch.cuda.empty_cache()
    return TorchRuntime(checkpoint, device=device, dtype=dtype, path=path)


def _rms(runtime: TorchRuntime, size: LatentSize, lanes: list[Lane], truth: np.ndarray[Any, Any]) -> float:
    found = final_latents(runtime, size, lanes)
    return float(np.sqrt(np.mean((found - truth[: len(lanes)]) ** 2)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ritocco_bench.ladder", description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the full-size random folder")
    parser.add_argument("--size", type=int, default=512, help="pixels per side")
    parser.add_argument("--lanes", default="1,2,4,8", help="pictures at a time, one measurement each")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is measured")
    parser.add_argument(
        "--rungs", default=",".join(UNASKED), help="separated by commas; default: %(default)s"
    )
    parser.add_argument("--dtype", default="float16", help="of weights and arithmetic; default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/ladder.jsonl"),
        help="JSONL file that rows are added to",
    )
    parser.add_argument("--profile", type=Path, help="file for the kernels of one step on the last rung")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the file has from these sources and machine"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
