"""Compiles the kernels for an NVIDIA GPU, which takes none: a process of its own, in which Triton does not
interpret. Each operation is called as networks call it, and every launch ends behind its compilation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)


class Absent:
    """The driver of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def drawn(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def nhwc(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return drawn(*shape, dtype=dtype).to(memory_format=torch.channels_last)


def calls() -> dict[str, Callable[[], Any]]:
    """Of every operation: shapes of networks, and such of which a number is one."""
    from ritocco_kernels.fused.guided_step import guided_step
    from ritocco_kernels.fused.model_pixels import from_model_pixels, to_model_pixels
    from ritocco_kernels.fused.table import FUSED
    from ritocco_kernels.guided_step import NUMBERS

    made: dict[str, Callable[[], Any]] = {}
    for n, c, side in ((2, 320, 64), (16, 320, 64), (1, 2560, 1)):
        x, vector = nhwc(n, c, side, side), drawn(c)
        name = f"{n}x{c}x{side}"
        affine = (vector, vector, 32, 1e-5)
        made[f"groupnorm {name}"] = partial(FUSED.groupnorm, x, *affine)
        made[f"shifted {name}"] = partial(FUSED.shifted_groupnorm_silu, x, vector.expand(len(x), -1), *affine)
        wide = vector.repeat(2)
        made[f"joined {name}"] = partial(FUSED.joined_groupnorm_silu, x, x, wide, wide, 32, 1e-5)
        made[f"upsample {name}"] = partial(FUSED.upsample, x)
        made[f"add_bias {name}"] = partial(FUSED.add_bias, x, vector, x)
    for tokens, width in ((4096, 320), (1, 1280), (7, 1)):
        x, vector = drawn(1, tokens, width), drawn(width)
        made[f"layernorm {width}"] = partial(FUSED.layernorm, x, vector, vector, 1e-5)
        made[f"add_layernorm {width}"] = partial(FUSED.add_layernorm, x, x, vector, vector, 1e-5)
        made[f"geglu {width}"] = partial(FUSED.geglu, torch.cat([x, x], dim=-1))
    for n in (1, 2):
        lanes = drawn(n, 4, 8, 8, dtype=torch.float32)
        arguments = (
            nhwc(2 * n, 4, 8, 8), lanes, drawn(3, n, 4, 8, 8, dtype=torch.float32), nhwc(n, 4, 8, 8),
            drawn(n, len(NUMBERS), dtype=torch.float32), torch.zeros(n, 2, dtype=torch.int64),
            torch.arange(n), torch.arange(n), torch.zeros(n, dtype=torch.int64),
        )  # fmt: skip
        made[f"guided_step {n}"] = partial(guided_step, *arguments)
    pixels, mask = torch.zeros(1, 64, 64, 3, dtype=torch.uint8), torch.zeros(1, 64, 64, dtype=torch.bool)
    decoded = nhwc(1, 3, 64, 64)
    made["to_model_pixels masked"] = partial(to_model_pixels, pixels, mask, torch.float16)
    made["to_model_pixels whole"] = partial(to_model_pixels, pixels, None, torch.float16)
    made["from_model_pixels masked"] = partial(from_model_pixels, decoded, pixels[0], mask[0])
    made["from_model_pixels whole"] = partial(from_model_pixels, decoded, None, None)
    return made


def main() -> None:
    """A line for each call whose kernels were compiled."""
    triton.runtime.driver.set_active(Absent())
    original = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return original(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compiled
    for name, call in calls().items():
        call()
        sys.stdout.write(name + "\n")


if __name__ == "__main__":
    main()
