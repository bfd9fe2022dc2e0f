"""`python -m ritocco_bench.kernel_floors`: each fused operation against the time its bytes need.

The floor is the bytes that have to move (each input read once, each output written once) over the bandwidth
of a large copy on the same device in the same run. Buffers rotate, inputs and results, so that no cache holds
them from call to call. Beside it stands the reference in the same layout, with whose result each kernel's is
compared before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ritocco.device import choose
from ritocco_bench.environment import environment
from ritocco_kernels.model_pixels import from_model_pixels_reference, to_model_pixels_reference
from ritocco_kernels.ops import REFERENCE, Ops

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
LARGEST_DISTANCE = 4e-3  # four units of float16 in the last place
_ROTATED_BYTES = 256 << 20


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


def make_call(ops: Ops, name: str, tensors: list[tuple[Tensor, ...]]) -> Callable[[int], Any]:
    """One call of an operation on one set of buffers."""
    if name.endswith("_pixels"):
        return _pixels_call(ops, name, tensors)

    wide = [vector.repeat(2) for vector in tensors[0][2:4]]

    def call(index: int) -> Any:
        x, other, weight, bias, *_ = tensors[index]
        match name:
            case "groupnorm_silu":
                return ops.groupnorm_silu(x, weight, bias, 32, 1e-5)
            case "joined_groupnorm_silu":
                return ops.joined_groupnorm_silu(x, other, wide[0], wide[1], 32, 1e-5)
            case "layernorm":
                return ops.layernorm(x, weight, bias, 1e-5)
            case "add_layernorm":
                return ops.add_layernorm(x, other, weight, bias, 1e-5)
            case "upsample":
                return ops.upsample(x)
            case "geglu":
                return ops.geglu(x)
            case _:
                return ops.add_bias(x, bias, other)

    return call


def _pixels_call(ops: Ops, name: str, tensors: list[tuple[Tensor, ...]]) -> Callable[[int], Any]:
    from ritocco_kernels.fused import model_pixels

    fused = ops is not REFERENCE
    to_model = model_pixels.to_model_pixels if fused else to_model_pixels_reference
    from_model = model_pixels.from_model_pixels if fused else from_model_pixels_reference

    def call(index: int) -> Any:
        x, *_, pixels, mask = tensors[index]
        if name == "to_model_pixels":
            return to_model(pixels[None], mask[None], x.dtype)
        return from_model(x, pixels, mask)[0]

    return call


def distance(name: str, tensors: tuple[Tensor, ...]) -> float:
    """Largest difference between kernel and float64 reference, over the largest value."""
    from ritocco_kernels.fused.table import FUSED

    exact = [tuple(one.double() if one.is_floating_point() else one for one in tensors)]
    found, wanted = make_call(FUSED, name, [tensors])(0), make_call(REFERENCE, name, exact)(0)
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def main() -> int:
    """Measure, append rows, print the table."""
    arguments = _parser().parse_args()
    from ritocco_kernels.fused.table import FUSED

    device = choose("cuda").device
    env, bandwidth, rate = asdict(environment(str(device))), copy_bandwidth(), matmul_rate()
    print(f"copy {bandwidth / 1e12:.2f} TB/s; float16 product {rate / 1e12:.0f} TFLOP/s", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), arguments.out.open("a", encoding="utf-8") as stream:
        for name, shape in CASES:
            size = torch.Size(shape).numel() * 2
            sets = max(2, _ROTATED_BYTES // size)
            image = len(shape) == 4
            width = shape[1] if image else shape[-1]

            def made(shape: tuple[int, ...] = shape, image: bool = image) -> Tensor:
                x = torch.randn(shape, device=device, dtype=torch.float16)
                return x.to(memory_format=torch.channels_last) if image else x

            vectors = [torch.randn(width, device=device, dtype=torch.float16) for _ in range(2)]
            picture = torch.randint(0, 256, (*shape[-2:], 3), device=device, dtype=torch.uint8)
            tensors = [(made(), made(), *vectors, picture, picture[..., 0] > 99) for _ in range(sets)]
            moved = size * MOVED[name]
            floor = moved / bandwidth * 1000
            if (apart := distance(name, tensors[0])) > LARGEST_DISTANCE:
                print(f"{name} {shape}: {apart:.1e} from its reference: no time is reported")
                return 1
            ours = milliseconds(make_call(FUSED, name, tensors), sets)
            theirs = milliseconds(make_call(REFERENCE, name, tensors), sets)
            row: dict[str, Any] = {"op": name, "shape": shape, "dtype": "float16", "bytes": moved}
            row |= {"copy_bytes_per_s": bandwidth, "matmul_flop_per_s": rate, "floor_ms": floor}
            row |= {"each_ms": ours, "reference_each_ms": theirs, "environment": env}
            stream.write(json.dumps(row) + "\n")
            p50, reference = statistics.median(ours), statistics.median(theirs)
            print(
                f"{name:15} {'x'.join(map(str, shape)):15} {1000 * p50:8.2f} us, floor {1000 * floor:7.2f} "
                f"({floor / p50:4.0%}), reference {1000 * reference:8.2f} ({reference / p50:.1f} x)",
                flush=True,
            )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ritocco_bench.kernel_floors", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/kernels.jsonl"),
        help="JSONL file that rows are added to",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
