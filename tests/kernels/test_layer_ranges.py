"""float16 ends at 65504: layers whose result is in range, and whose sums, squares and scores are not.

The truth is ours in float64, and stands beside a naive computation, to show that the range was left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accelerator import DEVICE, GPU
from naive_float16 import (
    EPS,
    LARGEST,
    WRONG,
    drawn,
    naive_attention,
    naive_conv,
    naive_gelu,
    naive_groupnorm,
    naive_layernorm,
    naive_linear,
    naive_quick_gelu,
    off,
)
from ritocco.nets.blocks import Attention
from ritocco.nets.clip import activate
from ritocco_kernels.add_bias import ADD_BIAS
from ritocco_kernels.add_layernorm import ADD_LAYERNORM
from ritocco_kernels.geglu import GEGLU
from ritocco_kernels.groupnorm_silu import GROUPNORM, GROUPNORM_SILU, SHIFTED_GROUPNORM_SILU
from ritocco_kernels.ops import REFERENCE, Ops

Given = Callable[[], tuple[Tensor, ...]]


def attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One head of our attention; its projections hand on what they are given."""
    layer = Attention(queries.shape[-1], 1).to(queries.dtype).requires_grad_(False)
    for one in (layer.to_q, layer.to_out[0]):
        one.weight.copy_(torch.eye(queries.shape[-1]))  # type: ignore[operator]
    layer.to_out[0].bias.zero_()  # type: ignore[operator]
    out: Tensor = layer(queries, (keys[:, None], values[:, None]))
    return out


def cancelling(*shape: int, seed: int, scale: float) -> tuple[Tensor, Tensor]:
    """Inputs and weights whose products, side by side, grow past float16, and whose whole sum does not."""
    x, weight = drawn(*shape, seed=seed, scale=scale), drawn(5, *shape[1:2], seed=seed + 1, scale=scale).abs()
    x = torch.cat([x.abs(), x.abs() + drawn(*shape, seed=seed + 2)], dim=1)
    return x, torch.cat([weight, -weight], dim=1)


def conv_case() -> tuple[Tensor, ...]:
    x, weight = cancelling(1, 16, 4, 6, seed=3, scale=100.0)
    return x, weight[:, :, None, None].expand(-1, -1, 3, 3).contiguous()


def attention_case() -> tuple[Tensor, ...]:
    """Scores of 64 * 50^2 = 160,000 that differ by a few from key to key."""
    sign = drawn(1, 1, 64, seed=6).sign()
    queries, keys = ((50 * sign + drawn(1, n, 64, seed=n, scale=0.05)).half() for n in (5, 9))
    return queries, keys, drawn(1, 9, 64, seed=7)


def norm_case(*shape: int, most: float = 60000.0) -> tuple[Tensor, ...]:
    channels = shape[1] if len(shape) == 4 else shape[-1]
    x = drawn(*shape, seed=8, scale=most / 4, most=most)
    return x, drawn(channels, seed=9), drawn(channels, seed=10)


def summed_case(*shape: int, most: float = 30000.0) -> tuple[Tensor, ...]:
    x, weight, bias = norm_case(*shape, most=most)
    other = shape[:2] if len(shape) == 4 else shape
    return x, drawn(*other, seed=11, scale=most / 4, most=most), weight, bias


def gated_case() -> tuple[Tensor, ...]:
    """Products of 30,000: of a large gate and a half, and of a large value and a gate of a half. And one of
    200, on the way to which value times gate is 150,000.
    """
    values = torch.tensor([0.5, -0.5, 60000.0, 50000.0])
    gates = torch.tensor([60000.0, 50000.0, 0.5, -3.0])
    return (torch.cat([values, gates]).half()[None],)


def of_table(ops: Ops, name: str, *given: Tensor) -> Tensor:
    """One operation; images are channels_last, as kernels take them. `add_layernorm` may overwrite."""
    args: list[Any] = [
        one.contiguous(memory_format=torch.channels_last) if one.ndim == 4 else one.clone() for one in given
    ]
    args += {"geglu": [], "add_bias": [], "layernorm": [1e-5], "add_layernorm": [1e-5]}.get(name, [4, 1e-5])
    made = getattr(ops, name)(*args)
    out: Tensor = made[name == "add_layernorm"] if isinstance(made, tuple) else made
    return out


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of layer. given: float16. ours: in float64 it is the truth. tolerance: times EPS, of the
    largest value.
    """

    given: Given
    ours: Callable[..., Tensor]
    naive: Callable[..., Tensor]
    tolerance: float


KINDS = {
    # The sum is rounded once; float32 loses a 2**-24th of sums a hundred times the result.
    "convolution": Kind(given=conv_case, ours=partial(F.conv2d, padding=1), naive=naive_conv, tolerance=1),
    "linear": Kind(
        given=partial(cancelling, 5, 64, seed=0, scale=100.0), ours=F.linear, naive=naive_linear, tolerance=1
    ),
    # A score of 160,000 has steps of 2**-6 in float32, and an eighth of that behind the scale.
    "attention": Kind(given=attention_case, ours=attended, naive=naive_attention, tolerance=4),
    "gelu": Kind(
        given=lambda: (drawn(99, seed=12, scale=30000.0),),
        ours=partial(activate, activation="gelu"),
        naive=naive_gelu,
        tolerance=1,
    ),
    # Its factor and the product are rounded.
    "quick_gelu": Kind(
        given=lambda: (drawn(99, seed=12, scale=30000.0),),
        ours=partial(activate, activation="quick_gelu"),
        naive=naive_quick_gelu,
        tolerance=2,
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_goes_past_65504_on_the_way(name: str) -> None:
    kind = KINDS[name]
    given = kind.given()
    truth = kind.ours(*(one.double() for one in given))
    assert truth.abs().max() < LARGEST, "the result itself is no number too large"
    assert off(kind.naive(*given), truth) > WRONG
    result = kind.ours(*given)
    assert result.dtype == torch.float16
    assert off(result, truth) <= kind.tolerance * EPS


def naive_shifted(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(naive_groupnorm(x + shift[:, :, None, None], 4, weight, bias))


# The tolerances are the operations' own.
OPS: dict[str, tuple[Given, Callable[..., Tensor], float]] = {
    # So large that its kernel reads the input twice; that of the others reads it once.
    "groupnorm": (
        partial(norm_case, 1, 68, 27, 19),
        lambda x, *affine: naive_groupnorm(x, 4, *affine),
        GROUPNORM.tolerance[torch.float16],
    ),
    "groupnorm_silu": (
        partial(norm_case, 2, 32, 6, 8),
        lambda x, *affine: F.silu(naive_groupnorm(x, 4, *affine)),
        GROUPNORM_SILU.tolerance[torch.float16],
    ),
    "shifted_groupnorm_silu": (
        partial(summed_case, 2, 32, 6, 8),
        naive_shifted,
        SHIFTED_GROUPNORM_SILU.tolerance[torch.float16],
    ),
    "joined_groupnorm_silu": (
        lambda: (*summed_case(2, 32, 6, 8)[:1], *norm_case(2, 32, 6, 8)[:1], *norm_case(1, 64, 1, 1)[1:]),
        lambda x, skip, *affine: F.silu(naive_groupnorm(torch.cat([x, skip], dim=1), 4, *affine)),
        GROUPNORM_SILU.tolerance[torch.float16],
    ),
    "layernorm": (
        partial(norm_case, 7, 40),
        lambda x, *affine: naive_layernorm(x, (), *affine),
        ADD_LAYERNORM.tolerance[torch.float16],
    ),
    "add_layernorm": (
        partial(summed_case, 7, 40),
        lambda x, residual, *affine: naive_layernorm(x + residual, (), *affine),
        # And a half for the sum, which is kept, and rounded before; a weight can double it.
        ADD_LAYERNORM.tolerance[torch.float16] + 1,
    ),
    "geglu": (
        gated_case,
        lambda projected: naive_gelu(projected[:, 4:]) * projected[:, :4],
        GEGLU.tolerance[torch.float16],
    ),
}
# Sums that end in range, of parts that do not: kernels keep them in float32. Plain PyTorch, which has its
# convolutions add the bias, never computes them.
FUSED_ALONE: dict[str, Given] = {
    "shifted_groupnorm_silu": partial(summed_case, 2, 32, 6, 8, most=60000.0),
    "add_bias": lambda: (
        drawn(1, 8, 4, 6, seed=13).abs() + 60000,
        torch.full((8,), 30000.0).half(),
        drawn(1, 8, 4, 6, seed=14, scale=100.0) - 50000,
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_plain_operations_go_past_65504_on_the_way(name: str) -> None:
    make, naive, tolerance = OPS[name]
    given = make()
    truth = of_table(REFERENCE, name, *(one.double() for one in given))
    assert off(naive(*given), truth) > WRONG
    assert off(of_table(REFERENCE, name, *given), truth) <= tolerance * EPS


FUSED_CASES = [
    pytest.param(name, alone, id=f"{name}-alone" if alone else name, marks=[pytest.mark.gpu] if GPU else [])
    for names, alone in ((OPS, False), (FUSED_ALONE, True))
    for name in names
]


@pytest.mark.parametrize(("name", "alone"), FUSED_CASES)
def test_kernels_go_past_65504_on_the_way(name: str, alone: bool) -> None:
    pytest.importorskip("triton")
    from ritocco_kernels.fused.table import FUSED

    given = (FUSED_ALONE[name] if alone else OPS[name][0])()
    tolerance = OPS[name][2] if name in OPS else ADD_BIAS.tolerance[torch.float16]
    truth = of_table(REFERENCE, name, *(one.double() for one in given))
    result = of_table(FUSED, name, *(one.to(DEVICE) for one in given)).cpu()
    assert off(result, truth) <= tolerance * EPS
    if alone:
        assert off(of_table(REFERENCE, name, *given), truth) > WRONG
