"""`python -m ritocco_bench.kernel_floors`: each fused operation against the time its bytes need.

The floor is the bytes that have to move (each input read once, each output written once) over the bandwidth
of a large copy on the same device in the same run. Buffers rotate, inputs and results, so that no cache holds
them from call to call. Beside it stands the reference in the same layout, with whose result each kernel's is
compared before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ritocco.device import choose
from ritocco_bench.ceilings import Ceilings
from ritocco_bench.environment import Environment, environment
from ritocco_bench.kernel_gate import PLAIN, Kernels, buffers, fused, make_call, refuse_apart
from ritocco_bench.parity import ParityError
from ritocco_bench.rows import add_options, append, held

CASES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("groupnorm_silu", (2, 320, 64, 64)),
    ("groupnorm_silu", (2, 960, 64, 64)),
    ("groupnorm_silu", (2, 640, 32, 32)),
    ("groupnorm_silu", (2, 1280, 16, 16)),
    ("groupnorm_silu", (2, 1280, 8, 8)),
    ("groupnorm_silu", (16, 320, 64, 64)),
    ("groupnorm_silu", (1, 128, 512, 512)),
    ("joined_groupnorm_silu", (2, 320, 64, 64)),
    ("joined_groupnorm_silu", (2, 1280, 16, 16)),
    ("joined_groupnorm_silu", (16, 320, 64, 64)),
    ("layernorm", (2, 4096, 320)),
    ("layernorm", (2, 256, 1280)),
    ("add_layernorm", (2, 4096, 320)),
    ("add_layernorm", (2, 256, 1280)),
    ("add_layernorm", (16, 4096, 320)),
    ("geglu", (2, 4096, 2560)),
    ("geglu", (2, 256, 10240)),
    ("geglu", (16, 4096, 2560)),
    ("add_bias", (2, 320, 64, 64)),
    ("add_bias", (16, 320, 64, 64)),
    ("upsample", (2, 640, 32, 32)),
    ("upsample", (1, 256, 256, 256)),
    ("to_model_pixels", (1, 3, 512, 512)),
    ("from_model_pixels", (1, 3, 512, 512)),
)
MOVED = {
    "groupnorm_silu": 2.0,
    "joined_groupnorm_silu": 6.0,  # two of that size in, two of twice that size out
    "layernorm": 2.0,
    "add_layernorm": 4.0,
    "geglu": 1.5,
    "add_bias": 3.0,
    "upsample": 5.0,
    "to_model_pixels": 1.5 + 1 / 6,  # a byte and a third of one for each number of two
    "from_model_pixels": 2.0 + 1 / 6,  # kept pixels as well
}
"""Bytes that have to move, over those of the float16 tensor that a case names."""
_ROTATED_BYTES = 256 << 20

Clock = Callable[[Callable[[int], object], int], list[float]]


def milliseconds(call: Callable[[int], object], sets: int, repeats: int = 5) -> list[float]:
    """Of one call, from graphs that hold one call on each set of buffers."""
    for index in range(sets):
        call(index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(index) for index in range(sets)]  # kept, so that each has memory of its own
    taken = []
    for _ in range(repeats + 1):
        begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(5):
            graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / (5 * sets))
    del results
    return taken[1:]


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the device, reads and writes counted.

    By a kernel: a captured `copy_` becomes a copy node, which is a third slower than what kernels reach.
    """
    x = torch.randn(1 << 29, device="cuda")
    y = torch.empty_like(x)
    taken = milliseconds(lambda _: torch.mul(x, 1.0, out=y), 1)
    return 2 * x.numel() * 4 / (statistics.median(taken) / 1000)


def matmul_rate() -> float:
    """FLOP per second of a large float16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    taken = milliseconds(lambda _: a @ b, 1)
    return float(2 * 8192**3 / (statistics.median(taken) / 1000))


def measure(
    cases: Sequence[tuple[str, tuple[int, ...]]],
    kernels: Kernels,
    out: Path,
    env: Environment,
    *,
    device: torch.device,
    machine: Ceilings,
    clock: Clock = milliseconds,
    rotated: int = _ROTATED_BYTES,
) -> None:
    """Hold each operation beside its reference, then time both: a row at once, and a line.

    rotated: bytes of inputs at least. Raises ParityError where a kernel is another operation, before its time
    is taken.
    """
    for name, shape in cases:
        size = torch.Size(shape).numel() * 2
        sets = max(2, rotated // size)
        tensors = [buffers(shape, device=device) for _ in range(sets)]
        refuse_apart(kernels, name, tensors[0])
        ours = clock(make_call(kernels, name, tensors), sets)
        theirs = clock(make_call(PLAIN, name, tensors), sets)
        moved = size * MOVED[name]
        floor = moved / machine.copy_bytes_per_s * 1000
        row: dict[str, Any] = {"op": name, "shape": shape, "dtype": "float16", "bytes": moved}
        row |= {"copy_bytes_per_s": machine.copy_bytes_per_s}
        row |= {"matmul_flop_per_s": machine.matmul_flop_per_s, "floor_ms": floor}
        append(out, row | {"each_ms": ours, "reference_each_ms": theirs}, env=env)
        p50, reference = statistics.median(ours), statistics.median(theirs)
        print(
            f"{name:15} {'x'.join(map(str, shape)):15} {1000 * p50:8.2f} us, floor {1000 * floor:7.2f} "
            f"({floor / p50:4.0%}), reference {1000 * reference:8.2f} ({reference / p50:.1f} x)",
            flush=True,
        )


def left(out: Path, env: Environment) -> list[tuple[str, tuple[int, ...]]]:
    """The cases that a file has no row of from the same sources on such a machine."""
    there = {(row.get("op"), tuple(row.get("shape", ()))) for row in held(out, env)}
    return [case for case in CASES if case not in there]


def main() -> int:
    """Measure, append rows, print the table."""
    arguments = _parser().parse_args()
    device = choose("cuda").device
    env = environment(str(device))
    cases = left(arguments.out, env) if arguments.resume else list(CASES)
    if arguments.resume:
        print(f"{len(CASES) - len(cases)} of {len(CASES)} operations are there", flush=True)
    if not cases:
        return 0
    machine = Ceilings(matmul_flop_per_s=matmul_rate(), copy_bytes_per_s=copy_bandwidth())
    print(
        f"copy {machine.copy_bytes_per_s / 1e12:.2f} TB/s; "
        f"float16 product {machine.matmul_flop_per_s / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    with torch.inference_mode():
        try:
            measure(cases, fused(), arguments.out, env, device=device, machine=machine)
        except ParityError as error:
            print(f"{error}: no time is reported")
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ritocco_bench.kernel_floors", description=__doc__)
    add_options(parser, "kernels.jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
