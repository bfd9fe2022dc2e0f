"""Fused operations beside their references on the same buffers: no time before they agree.

What is made of numbers may lie LARGEST_DISTANCE from the reference in float64; what is bytes has to be the
reference's, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ritocco_bench.parity import ParityError
from ritocco_kernels.model_pixels import from_model_pixels_reference, to_model_pixels_reference
from ritocco_kernels.ops import REFERENCE, Ops

Buffers: TypeAlias = tuple[Tensor, ...]

LARGEST_DISTANCE = 4e-3  # four units of float16 in the last place


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """ops: what networks call. to_model_pixels, from_model_pixels: what stands before and behind them."""

    ops: Ops
    to_model_pixels: Callable[..., Tensor]
    from_model_pixels: Callable[..., tuple[Tensor, Tensor]]


PLAIN = Kernels(
    ops=REFERENCE,
    to_model_pixels=to_model_pixels_reference,
    from_model_pixels=from_model_pixels_reference,
)


def fused() -> Kernels:
    """Those of Triton."""
    from ritocco_kernels.fused.model_pixels import from_model_pixels, to_model_pixels
    from ritocco_kernels.fused.table import FUSED

    return Kernels(ops=FUSED, to_model_pixels=to_model_pixels, from_model_pixels=from_model_pixels)


def buffers(shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype = torch.float16) -> Buffers:
    """What a call of any operation takes: two random tensors of the shape, channels_last where it is
    [N,C,H,W], weight and bias [C], a picture uint8 [H,W,3] of its last two sides, and its mask, bool [H,W].
    """
    image = len(shape) == 4
    width = shape[1] if image else shape[-1]

    def made() -> Tensor:
        x = torch.randn(shape, device=device, dtype=dtype)
        return x.to(memory_format=torch.channels_last) if image else x

    vectors = [torch.randn(width, device=device, dtype=dtype) for _ in range(2)]
    picture = torch.randint(0, 256, (*shape[-2:], 3), device=device, dtype=torch.uint8)
    return (made(), made(), *vectors, picture, picture[..., 0] > 99)


def make_call(kernels: Kernels, name: str, sets: list[Buffers]) -> Callable[[int], Any]:
    """One call of an operation on one set of buffers."""
    ops = kernels.ops
    wide = [vector.repeat(2) for vector in sets[0][2:4]]

    def call(index: int) -> Any:
        x, other, weight, bias, pixels, mask = sets[index]
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
            case "add_bias":
                return ops.add_bias(x, bias, other)
            case "to_model_pixels":
                return kernels.to_model_pixels(pixels[None], mask[None], x.dtype)
            case "from_model_pixels":
                return kernels.from_model_pixels(x, pixels, mask)[0]
            case _:
                raise ValueError(f"operation is {name!r}; it must be one that a Kernels has")

    return call


def refuse_apart(kernels: Kernels, name: str, held: Buffers) -> float:
    """Call an operation and its reference in float64. Returns how far apart their results are at most, over
    the largest number; of bytes, in bytes. Raises ParityError where that is too far.
    """
    farthest = 0.0
    exact = tuple(one.double() if one.is_floating_point() else one for one in held)
    found, wanted = make_call(kernels, name, [held])(0), make_call(PLAIN, name, [exact])(0)
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            rule = f"its reference's is {tuple(theirs.shape)}"
            raise ParityError(f"{name} {tuple(held[0].shape)}: the result is {tuple(ours.shape)}; {rule}")
        if theirs.dtype == torch.uint8:
            apart, most = float((ours.double() - theirs.double()).abs().max()), 0.0
        else:
            apart, most = float((ours.double() - theirs).abs().max() / theirs.abs().max()), LARGEST_DISTANCE
        if not apart <= most:
            rule = f"at most {most:.0e} is allowed"
            raise ParityError(f"{name} {tuple(held[0].shape)}: {apart:.1e} from its reference; {rule}")
        farthest = max(farthest, apart)
    return farthest
