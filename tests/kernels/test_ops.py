"""The plain-PyTorch references against formulas written out in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ritocco_kernels.contract import Op
from ritocco_kernels.geglu import GEGLU
from ritocco_kernels.groupnorm_silu import GROUPNORM, GROUPNORM_SILU
from ritocco_kernels.ops import REFERENCE

GROUPNORM_SHAPES = [
    pytest.param(2, 320, 16, 16, 32, id="unet-16x16"),
    pytest.param(1, 128, 64, 64, 32, id="vae-64x64"),
    pytest.param(3, 96, 61, 7, 16, id="odd"),
    pytest.param(1, 32, 1, 1, 4, id="one-cell"),
]
GEGLU_SHAPES = [pytest.param((2, 256, 1280), id="unet-16x16"), pytest.param((3, 7, 10), id="odd")]
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error_in_eps(result: Tensor, truth: Tensor) -> float:
    scale = torch.finfo(result.dtype).eps * truth.abs().max()
    return float((result.double() - truth).abs().max() / scale)


def groupnorm_truth(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    grouped = x.double().reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(dim=2, keepdim=True)
    variance = centred.square().mean(dim=2, keepdim=True)
    normed = (centred / (variance + eps).sqrt()).reshape(x.shape)
    return normed * weight.double()[:, None, None] + bias.double()[:, None, None]


def geglu_truth(projected: Tensor) -> Tensor:
    half = projected.shape[-1] // 2
    values, gates = projected.double()[..., :half], projected.double()[..., half:]
    return values * gates * 0.5 * (1 + torch.erf(gates / 2**0.5))


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c", "h", "w", "groups"), GROUPNORM_SHAPES)
def test_groupnorm_is_within_its_tolerance(
    n: int, c: int, h: int, w: int, groups: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    # A mean far from zero and large values: sums of squares in the input's dtype would show.
    x = (40 * normal(n, c, h, w, seed=0, dtype=torch.float32) + 100).to(dtype).to(memory_format=memory_format)
    weight, bias = normal(c, seed=1, dtype=dtype), normal(c, seed=2, dtype=dtype)
    before = x.clone()
    truth = groupnorm_truth(x, weight, bias, groups, 1e-5)
    plain = REFERENCE.groupnorm(x, weight, bias, groups, 1e-5)
    assert (plain.shape, plain.dtype) == (x.shape, dtype)
    assert error_in_eps(plain, truth) <= GROUPNORM.tolerance[dtype]
    activated = REFERENCE.groupnorm_silu(x, weight, bias, groups, 1e-5)
    assert (activated.shape, activated.dtype) == (x.shape, dtype)
    assert error_in_eps(activated, truth / (1 + torch.exp(-truth))) <= GROUPNORM_SILU.tolerance[dtype]
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GEGLU_SHAPES)
def test_geglu_is_within_its_tolerance(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    projected = 3 * normal(*shape, seed=3, dtype=dtype)
    before = projected.clone()
    result = REFERENCE.geglu(projected)
    assert (result.shape, result.dtype) == ((*shape[:-1], shape[-1] // 2), dtype)
    assert error_in_eps(result, geglu_truth(projected)) <= GEGLU.tolerance[dtype]
    assert torch.equal(projected, before)


def test_tables_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        REFERENCE.geglu = torch.neg  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        GEGLU.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("op", [GROUPNORM, GROUPNORM_SILU, GEGLU], ids=lambda op: str(op.name))
def test_every_dtype_that_ships_has_a_tolerance(op: Op[...]) -> None:
    assert set(op.tolerance) == {torch.float32, torch.bfloat16, torch.float16}
