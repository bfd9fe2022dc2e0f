"""The Triton kernels against formulas in float64: with the interpreter on a CPU, in full on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from accelerator import DEVICE, GPU
from ritocco.noise import normal as philox_normal
from ritocco.pixels import from_model, masked_to_model, pasted
from ritocco_kernels.add_bias import ADD_BIAS
from ritocco_kernels.add_layernorm import ADD_LAYERNORM, LAYERNORM
from ritocco_kernels.geglu import GEGLU
from ritocco_kernels.groupnorm_silu import (
    GROUPNORM,
    GROUPNORM_SILU,
    JOINED_GROUPNORM_SILU,
    SHIFTED_GROUPNORM_SILU,
)
from ritocco_kernels.guided_step import NUMBERS, guided_step_reference
from ritocco_kernels.model_pixels import from_model_pixels_reference, to_model_pixels_reference
from ritocco_kernels.ops import REFERENCE, Ops

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu] if GPU else list[pytest.MarkDecorator]()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPNORM_DTYPES = DTYPES if GPU else [torch.float32, torch.float16]
SMALL = [
    pytest.param(2, 64, 8, 8, 32, id="whole"),
    pytest.param(3, 96, 31, 9, 16, id="odd"),
    pytest.param(2, 320, 20, 20, 32, id="two-passes"),
    pytest.param(1, 112, 61, 13, 16, id="two-passes-odd"),
    pytest.param(1, 32, 1, 1, 4, id="one-cell"),
    pytest.param(16, 64, 20, 15, 1, id="many", marks=[] if GPU else pytest.mark.slow),
]
NETWORK = [
    pytest.param(n, c, side, side, 32, id=f"{n}x{c}x{side}")
    for n in (1, 2, 8)
    for c, side in ((320, 64), (640, 64), (960, 64), (640, 32), (1920, 32), (1280, 16), (2560, 8), (512, 64))
] + [pytest.param(1, 128, 512, 512, 32, id="decoder")]
GROUPNORM_SHAPES = SMALL + (NETWORK if GPU else [])
GUIDED_TOLERANCE = 4e-6  # float32, relative to the largest value; a GPU's logarithm and cosine are in it


@pytest.fixture(scope="module")
def fused() -> Ops:
    from ritocco_kernels.fused.table import FUSED

    return FUSED


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What kernels write to is full of NaN before."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(device=DEVICE, dtype=dtype)


def nhwc(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def error_in_eps(result: Tensor, truth: Tensor) -> float:
    assert not result.isnan().any()
    scale = torch.finfo(result.dtype).eps * truth.abs().max()
    return float((result.double() - truth).abs().max() / scale)


@pytest.mark.parametrize("dtype", GROUPNORM_DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c", "h", "w", "groups"), GROUPNORM_SHAPES)
def test_groupnorm(fused: Ops, n: int, c: int, h: int, w: int, groups: int, dtype: torch.dtype) -> None:
    x = nhwc((40 * drawn(n, c, h, w, seed=0) + 100).to(dtype))
    weight, bias = drawn(c, seed=1, dtype=dtype), drawn(c, seed=2, dtype=dtype)
    shift = drawn(n, 2 * c, seed=3, dtype=dtype)[:, :c]  # rows apart, as slices of all time vectors are
    affine = (weight.double(), bias.double(), groups, 1e-5)
    before = x.clone()
    for op, function, truth in (
        (GROUPNORM, fused.groupnorm, REFERENCE.groupnorm(x.double(), *affine)),
        (GROUPNORM_SILU, fused.groupnorm_silu, REFERENCE.groupnorm_silu(x.double(), *affine)),
    ):
        result = function(x, weight, bias, groups, 1e-5)
        assert (result.shape, result.dtype) == (x.shape, dtype)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert error_in_eps(result, truth) <= op.tolerance[dtype], op.name
    truth = REFERENCE.shifted_groupnorm_silu(x.double(), shift.double(), *affine)
    result = fused.shifted_groupnorm_silu(x, shift, weight, bias, groups, 1e-5)
    assert error_in_eps(result, truth) <= SHIFTED_GROUPNORM_SILU.tolerance[dtype]
    assert torch.equal(x, before)


JOINED = [
    pytest.param(2, 40, 24, 5, 7, 16, id="few-cells"),
    pytest.param(3, 640, 320, 9, 11, 32, id="a-group-of-both"),
    pytest.param(1, 40, 72, 61, 13, 16, id="odd"),
    pytest.param(1, 3, 9, 1, 1, 4, id="one-cell"),
] + (
    [
        pytest.param(n, c, d, side, side, 32, id=f"{n}x{c}+{d}x{side}")
        for n in (2, 16)
        for c, d, side in ((320, 320, 64), (640, 320, 64), (1280, 640, 32), (1280, 1280, 16), (1280, 1280, 8))
    ]
    if GPU
    else []
)


@pytest.mark.parametrize("dtype", GROUPNORM_DTYPES, ids=str)
@pytest.mark.parametrize(("n", "c", "d", "h", "w", "groups"), JOINED)
def test_joined_groupnorm_silu(
    fused: Ops, n: int, c: int, d: int, h: int, w: int, groups: int, dtype: torch.dtype
) -> None:
    x = nhwc((40 * drawn(n, c, h, w, seed=20) + 100).to(dtype))
    skip = nhwc((30 * drawn(n, d, h, w, seed=21) - 50).to(dtype))
    weight, bias = drawn(c + d, seed=22, dtype=dtype), drawn(c + d, seed=23, dtype=dtype)
    normed, joined = fused.joined_groupnorm_silu(x, skip, weight, bias, groups, 1e-5)
    assert torch.equal(joined, torch.cat([x, skip], dim=1))
    affine = (weight.double(), bias.double(), groups, 1e-5)
    truth, _ = REFERENCE.joined_groupnorm_silu(x.double(), skip.double(), *affine)
    assert normed.is_contiguous(memory_format=torch.channels_last)
    assert joined.is_contiguous(memory_format=torch.channels_last)
    assert error_in_eps(normed, truth) <= JOINED_GROUPNORM_SILU.tolerance[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 7, 20), (2, 5, 2570), *([(2, 4096, 2560), (16, 64, 10240)] if GPU else [])]
)
def test_geglu(fused: Ops, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    projected = 3 * drawn(*shape, seed=4, dtype=dtype)
    result = fused.geglu(projected)
    assert (result.shape, result.dtype) == ((*shape[:-1], shape[-1] // 2), dtype)
    assert error_in_eps(result, REFERENCE.geglu(projected.double())) <= GEGLU.tolerance[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 9, 40), (1, 3, 2500), *([(2, 4096, 320), (16, 64, 1280)] if GPU else [])]
)
def test_add_layernorm(fused: Ops, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = drawn(*shape, seed=5, dtype=dtype), 5 * drawn(*shape, seed=6, dtype=dtype) + 20
    weight, bias = drawn(shape[-1], seed=7, dtype=dtype), drawn(shape[-1], seed=8, dtype=dtype)
    total, normed = fused.add_layernorm(x, residual, weight, bias, 1e-5)
    # Rounded to the nearest; the interpreter cuts bfloat16 off.
    summed = x.double() + residual.double()
    assert error_in_eps(total, summed) <= (0.5 if GPU or dtype != torch.bfloat16 else 1.0)
    zero = torch.zeros_like(total, dtype=torch.float64)
    _, truth = REFERENCE.add_layernorm(zero, total.double(), weight.double(), bias.double(), 1e-5)
    assert error_in_eps(normed, truth) <= ADD_LAYERNORM.tolerance[dtype]
    alone = fused.layernorm(total, weight, bias, 1e-5)
    assert error_in_eps(alone, truth) <= LAYERNORM.tolerance[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 12, 5, 3), (1, 300, 1, 9), (1, 3, 40, 41), *([(8, 640, 32, 32)] if GPU else [])]
)
def test_upsample(fused: Ops, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = nhwc(drawn(*shape, seed=24, dtype=dtype))
    result = fused.upsample(x)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, REFERENCE.upsample(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 5, 3), (1, 3, 40, 41), *([(8, 320, 64, 64)] if GPU else [])])
def test_add_bias(fused: Ops, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = (nhwc(drawn(*shape, seed=seed, dtype=dtype)) for seed in (9, 10))
    bias = drawn(shape[1], seed=11, dtype=dtype)
    result = fused.add_bias(x, bias, residual)
    truth = REFERENCE.add_bias(x.double(), bias.double(), residual.double())
    assert error_in_eps(result, truth) <= ADD_BIAS.tolerance[dtype]


def guided_inputs(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Three lanes, the first and the last guided, the second without noise; and the noise."""
    seeds, rows, shape = (5, 6, 2**64 - 1), (0, 3, 2), (4, 6, 9)
    numbers = drawn(3, len(NUMBERS), seed=12)
    numbers[1, NUMBERS.index("c")] = 0
    numbers[:, NUMBERS.index("push")] = torch.tensor([1.0, 0.0, 1.0])
    integers = np.array([(seed, row) for seed, row in zip(seeds, rows, strict=True)], dtype=np.uint64)
    noise = np.stack([philox_normal(seed, row + 1, shape) for seed, row in zip(seeds, rows, strict=True)])
    tensors = {
        "output": drawn(5, *shape, seed=13, dtype=dtype),
        "latents": drawn(3, *shape, seed=14),
        "history": drawn(3, 3, *shape, seed=15),
        "following": nhwc(torch.empty(3, *shape, dtype=dtype, device=DEVICE)),
        "numbers": numbers,
        "integers": torch.from_numpy(integers.view(np.int64)).to(DEVICE),
        "unconditional": torch.tensor([0, 2, 3], device=DEVICE),
        "conditional": torch.tensor([1, 2, 4], device=DEVICE),
        "broken": torch.full((3,), -1, device=DEVICE),
    }
    return tensors, torch.from_numpy(noise).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [nhwc, Tensor.contiguous], ids=["nhwc", "nchw"])
def test_guided_step(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    from ritocco_kernels.fused.guided_step import guided_step

    given, noise = guided_inputs(dtype)
    given["output"] = layout(given["output"])
    output, latents, history, numbers = (
        given[name].double() for name in ("output", "latents", "history", "numbers")
    )
    rows = given["unconditional"], given["conditional"]
    truths = guided_step_reference(output, latents, history, numbers, noise.double(), *rows)
    guided_step(**given)
    for name, truth in zip(("latents", "history"), truths, strict=False):
        assert not given[name].isnan().any(), name
        error = (given[name].double() - truth).abs().max() / truth.abs().max()
        assert float(error) <= GUIDED_TOLERANCE, name
    assert error_in_eps(given["following"], truths[2]) <= (64 if dtype == torch.float32 else 1)
    assert given["broken"].tolist() == [-1, -1, -1]


PICTURES = [(1, 5, 7), (2, 24, 48), *([(1, 512, 512), (4, 1024, 768)] if GPU else [])]


def pictures(n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """uint8 [N,H,W,3] and bool [N,H,W]."""
    held = torch.randint(0, 256, (n, height, width, 4), generator=torch.Generator().manual_seed(16))
    return held[..., :3].to(DEVICE, torch.uint8).contiguous(), held[..., 3].to(DEVICE) > 99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PICTURES, ids=str)
def test_to_model_pixels(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    from ritocco_kernels.fused.model_pixels import to_model_pixels

    pixels, mask = pictures(*shape)
    for hidden in (None, mask):
        result = to_model_pixels(pixels, hidden, dtype)
        assert result.is_contiguous(memory_format=torch.channels_last)
        # On the host: torch multiplies by the reciprocal on a GPU.
        seen = None if hidden is None else hidden.cpu()
        wanted = to_model_pixels_reference(pixels.cpu(), seen, torch.float32)
        host = np.stack([
            masked_to_model(one.cpu().numpy(), None if hidden is None else mask[i].cpu().numpy())[0]
            for i, one in enumerate(pixels)
        ])  # fmt: skip
        np.testing.assert_array_equal(wanted.numpy(), host)
        result = result.cpu()
        if dtype == torch.bfloat16 and not GPU:  # the interpreter cuts bfloat16 off
            assert (result.float() - wanted).abs().max() <= torch.finfo(dtype).eps
        else:
            assert torch.equal(result, wanted.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PICTURES, ids=str)
def test_from_model_pixels(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Bit for bit what the host makes: kept pixels, halves and what is out of range too."""
    from ritocco_kernels.fused.model_pixels import from_model_pixels

    n, height, width = shape
    decoded = 1.3 * drawn(n, 3, height, width, seed=17)
    decoded.view(-1)[:9] = torch.tensor(
        [(2 * k + 1) / 255 - 1 for k in (0, 1, 2, 126, 127, 128, 253, 254, -1)]
    )
    decoded = nhwc(decoded.to(dtype))
    (pixels, *_), (mask, *_) = pictures(*shape)
    for kept in ((None, None), (pixels, mask)):
        made, broken = from_model_pixels(decoded, *kept)
        wanted, finite = from_model_pixels_reference(decoded, *kept)
        assert torch.equal(made, wanted)
        assert bool(finite)
        assert broken.tolist() == [0]
        host = None if kept[0] is None else (pixels.cpu().numpy(), mask.cpu().numpy())
        np.testing.assert_array_equal(
            made.cpu().numpy(), pasted(from_model(decoded.float().cpu().numpy()), host)
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_from_model_pixels_sees_what_is_not_finite(bad: float) -> None:
    from ritocco_kernels.fused.model_pixels import from_model_pixels

    decoded = nhwc(drawn(2, 3, 24, 48, seed=18, dtype=torch.float16))
    decoded[1, 2, 23, 47] = bad
    assert from_model_pixels(decoded, None, None)[1].tolist() == [1]
    assert not bool(from_model_pixels_reference(decoded, None, None)[1])


@pytest.mark.parametrize("index", range(6))
def test_pictures_of_other_kinds_are_refused(index: int) -> None:
    from ritocco_kernels.fused.model_pixels import from_model_pixels, to_model_pixels

    pixels, mask = pictures(2, 4, 6)
    decoded = nhwc(drawn(2, 3, 4, 6, seed=19))
    cases: list[tuple[str, Callable[[], object]]] = [
        ("pixels is torch.float32", lambda: to_model_pixels(pixels.float(), None, torch.float16)),
        ("pixels is torch.uint8", lambda: to_model_pixels(pixels.transpose(1, 2), None, torch.float16)),
        ("mask is torch.bool", lambda: to_model_pixels(pixels, mask[:1], torch.float16)),
        ("decoded of shape", lambda: from_model_pixels(decoded.contiguous(), None, None)),
        ("pixels and mask go together", lambda: from_model_pixels(decoded, pixels[0], None)),
        ("mask is torch.uint8", lambda: from_model_pixels(decoded, pixels[0], mask[0].to(torch.uint8))),
    ]  # fmt: skip
    words, call = cases[index]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_guided_step_records_the_first_broken_row(bad: float) -> None:
    from ritocco_kernels.fused.guided_step import guided_step

    given, _ = guided_inputs(torch.float32)
    given["output"][4, 3, 5, 8] = bad  # the last element of the last lane's prompt
    guided_step(**given)
    assert given["broken"].tolist() == [-1, -1, 2]
    given["integers"][:, 1] += 1
    guided_step(**given)
    assert given["broken"].tolist() == [-1, -1, 2]


def refusals(fused: Ops) -> list[tuple[str, Callable[[], Any]]]:
    image, vector, tokens = drawn(2, 8, 4, 5, seed=1), drawn(8, seed=2), drawn(2, 6, 8, seed=3)
    long, short = drawn(16, seed=7), r"is \(7,\); it must be \(8,\)"
    wide, narrow = nhwc(image), nhwc(drawn(2, 8, 4, 4, seed=4))
    other = drawn(2, 8, 6, seed=6).mT
    return [
        (r"x of shape \(2, 8, 4, 5\) is laid out", lambda: fused.groupnorm(image, vector, vector, 4, 1e-5)),
        ("must be a multiple of groups, which is 3", lambda: fused.groupnorm(wide, vector, vector, 3, 1e-5)),
        ("x is torch.float64", lambda: fused.groupnorm_silu(wide.double(), vector, vector, 4, 1e-5)),
        (
            r"shift is torch.float32 \(2, 4\)",
            lambda: fused.shifted_groupnorm_silu(wide, drawn(2, 4, seed=5), vector, vector, 4, 1e-5),
        ),
        ("its last side must be even", lambda: fused.geglu(tokens[..., :7].contiguous())),
        ("projected of shape", lambda: fused.geglu(tokens.transpose(0, 1))),
        ("residual of shape", lambda: fused.add_layernorm(tokens, other, vector, vector, 1e-5)),
        ("they must be alike", lambda: fused.add_layernorm(tokens, tokens[:1], vector, vector, 1e-5)),
        ("they must be alike", lambda: fused.add_bias(wide, vector, narrow)),
        ("x of shape", lambda: fused.upsample(image)),
        ("x of shape", lambda: fused.layernorm(tokens.transpose(0, 1), vector, vector, 1e-5)),
        ("skip of shape", lambda: fused.joined_groupnorm_silu(wide, image, vector, vector, 4, 1e-5)),
        ("their channels alone", lambda: fused.joined_groupnorm_silu(wide, narrow, vector, vector, 4, 1e-5)),
        ("a multiple of 3 groups", lambda: fused.joined_groupnorm_silu(wide, wide, vector, vector, 3, 1e-5)),
        ("which is 0", lambda: fused.groupnorm(wide, vector, vector, 0, 1e-5)),
        (f"weight {short}", lambda: fused.groupnorm(wide, vector[:7], vector, 4, 1e-5)),
        (f"bias {short}", lambda: fused.groupnorm_silu(wide, vector, vector[:7], 4, 1e-5)),
        (
            r"weight is \(8, 1\)",
            lambda: fused.shifted_groupnorm_silu(wide, tokens[:, 0], vector[:, None], vector, 4, 1e-5),
        ),
        (
            r"weight is \(8,\); it must be \(16,\)",
            lambda: fused.joined_groupnorm_silu(wide, wide, vector, long, 4, 1e-5),
        ),
        (
            r"bias is \(8,\); it must be \(16,\)",
            lambda: fused.joined_groupnorm_silu(wide, wide, long, vector, 4, 1e-5),
        ),
        (f"weight {short}", lambda: fused.layernorm(tokens, vector[:7], vector, 1e-5)),
        (f"bias {short}", lambda: fused.layernorm(tokens, vector, vector[:7], 1e-5)),
        (f"weight {short}", lambda: fused.add_layernorm(tokens, tokens, vector[:7], vector, 1e-5)),
        (f"bias {short}", lambda: fused.add_layernorm(tokens, tokens, vector, vector[:7], 1e-5)),
        (f"bias {short}", lambda: fused.add_bias(wide, vector[:7], wide)),
        ("bias of shape", lambda: fused.add_bias(wide, long[::2], wide)),
    ]  # fmt: skip


REFUSALS = 26


def test_all_refusals_are_looked_at(fused: Ops) -> None:
    assert len(refusals(fused)) == REFUSALS


@pytest.mark.parametrize("index", range(REFUSALS))
def test_other_layouts_dtypes_and_shapes_are_refused(fused: Ops, index: int) -> None:
    words, call = refusals(fused)[index]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("words", "name", "change"),
    [
        ("output is torch.float64", "output", Tensor.double),
        ("output of shape", "output", lambda x: x.repeat(1, 1, 1, 2)[..., ::2]),
        ("output is .* four sides", "output", lambda x: x[0]),
        (r"latents is \(3, 4, 6, 9\); it must be \(3, 4, 6, 8\)", "output", lambda x: x[..., :8]),
        (r"latents is \(3, 3, 6, 9\)", "latents", lambda x: x[:, :3]),
        ("latents is torch.float16", "latents", Tensor.half),
        ("latents of shape", "latents", nhwc),
        (r"history is \(2, 3, 4, 6, 9\); it must be \(3, 3, 4, 6, 9\)", "history", lambda x: x[:2]),
        (r"history is \(3, 2, 4, 6, 9\)", "history", lambda x: x[:, :2]),
        (r"following is \(2, 4, 6, 9\)", "following", lambda x: x[:2]),
        ("following is torch.int32", "following", Tensor.int),
        (r"numbers is \(3, 10\); it must be \(3, 11\)", "numbers", lambda x: x[:, :10]),
        (r"integers is \(2, 2\); it must be \(3, 2\)", "integers", lambda x: x[:2]),
        ("integers is torch.int32", "integers", Tensor.int),
        ("integers of shape", "integers", lambda x: x.T.contiguous().T),
        (r"unconditional is \(2,\)", "unconditional", lambda x: x[:2]),
        ("unconditional is torch.int32", "unconditional", Tensor.int),
        (r"conditional is \(4,\)", "conditional", lambda x: x.repeat(2)[:4]),
        ("conditional of shape", "conditional", lambda x: x.repeat(2)[::2]),
        (r"broken is \(1,\)", "broken", lambda x: x[:1]),
        ("broken is torch.float32", "broken", Tensor.float),
        ("broken of shape", "broken", lambda x: x.repeat(2)[::2]),
    ],
)
def test_a_guided_step_of_other_tensors_is_refused(
    words: str, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    from ritocco_kernels.fused.guided_step import guided_step

    given, _ = guided_inputs(torch.float32)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=f"^{words}"):
        guided_step(**given)


HALF = torch.float16


def assert_twice_as_far_at_most(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """By the largest error, to one eps of the largest value; and on the whole, where that hides nothing."""
    assert ours.dtype == plain.dtype == HALF
    assert error_in_eps(ours, truth) <= 2 * error_in_eps(plain, truth) + 1
    whole, theirs = ((one.double() - truth).square().mean().sqrt() for one in (ours, plain))
    assert float(whole) <= 2 * float(theirs)


def half_cases() -> dict[str, tuple[Tensor, ...]]:
    """float16, as networks have them: means far from zero, long tails; small, and odd where that matters."""
    whole, passes = (2, 16, 5, 7), (1, 68, 27, 19)  # the group norm's two ways
    cases: dict[str, tuple[Tensor, ...]] = {
        "geglu": (3 * drawn(3, 7, 20, seed=30, dtype=HALF),),
        "layernorm": (5 * drawn(2, 9, 40, seed=31, dtype=HALF) + 20, *affine_of(40)),
        "add_layernorm": (*(5 * drawn(2, 9, 40, seed=s, dtype=HALF) + 20 for s in (32, 33)), *affine_of(40)),
        "add_bias": (
            *(nhwc(drawn(2, 12, 5, 3, seed=34, dtype=HALF)), drawn(12, seed=35, dtype=HALF)),
            nhwc(drawn(2, 12, 5, 3, seed=36, dtype=HALF)),
        ),
        "upsample": (nhwc(drawn(2, 12, 5, 3, seed=37, dtype=HALF)),),
    }
    for label, shape in (("", whole), (" in two passes", passes)):
        x = nhwc((40 * drawn(*shape, seed=38) + 100).to(HALF))
        shift, affine = drawn(*shape[:2], seed=39, dtype=HALF), affine_of(shape[1])
        cases[f"groupnorm{label}"] = cases[f"groupnorm_silu{label}"] = (x, *affine)
        cases[f"shifted_groupnorm_silu{label}"] = (x, shift, *affine)
        cases[f"joined_groupnorm_silu{label}"] = (x, nhwc(x.flip(2)), *affine_of(2 * shape[1]))
    return cases


def affine_of(channels: int) -> tuple[Tensor, Tensor]:
    return drawn(channels, seed=40, dtype=HALF), drawn(channels, seed=41, dtype=HALF)


def results(ops: Ops, name: str, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The reference of `add_layernorm` overwrites what it is given."""
    operation = name.split()[0]
    rest: tuple[Any, ...] = (4, 1e-5) if "group" in name else (1e-5,) if "layernorm" in name else ()
    made = getattr(ops, operation)(*(one.clone() for one in given), *rest)
    return made if isinstance(made, tuple) else (made,)


GROUPNORMS = [name for name in REFERENCE.__slots__ if "groupnorm" in name]
HALVES = ["geglu", "layernorm", "add_layernorm", "add_bias", "upsample"] + [
    name + passes for name in GROUPNORMS for passes in ("", " in two passes")
]


def test_every_operation_is_compared_in_float16() -> None:
    assert set(HALVES) == set(half_cases())
    assert {name.split()[0] for name in HALVES} | {"late"} == set(REFERENCE.__slots__)


@pytest.mark.parametrize("name", HALVES)
def test_float16_is_at_most_twice_as_far_from_the_truth_as_plain_float16(fused: Ops, name: str) -> None:
    given = half_cases()[name]
    truths = results(REFERENCE, name, tuple(one.double() for one in given))
    for ours, plain, truth in zip(
        results(fused, name, given), results(REFERENCE, name, given), truths, strict=True
    ):
        assert_twice_as_far_at_most(ours, plain, truth)


def test_the_next_input_in_float16_is_at_most_twice_as_far_from_the_truth_as_the_reference() -> None:
    from ritocco_kernels.fused.guided_step import guided_step

    given, noise = guided_inputs(HALF)
    rows = {name: given[name] for name in ("unconditional", "conditional")}
    state = {name: given[name] for name in ("output", "latents", "history", "numbers")} | {"noise": noise}
    truth = guided_step_reference(**{name: one.double() for name, one in state.items()}, **rows)[2]
    plain = guided_step_reference(**state, **rows)[2].to(HALF)
    guided_step(**given)
    assert_twice_as_far_at_most(given["following"], plain, truth)


@pytest.fixture
def nothing_runs_on_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter launch nothing on fake tensors, as compiled kernels do."""
    if GPU:
        return
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.run

    def run(self: Any, *args: Any, **options: Any) -> None:
        if not any(isinstance(one, FakeTensor) for one in args):
            original(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", run)


@pytest.mark.usefixtures("nothing_runs_on_fakes")
def test_operations_are_registered_as_torch_takes_them(fused: Ops) -> None:
    from ritocco_kernels.fused.add_bias import add_bias
    from ritocco_kernels.fused.add_layernorm import add_layernorm, layernorm
    from ritocco_kernels.fused.geglu import geglu
    from ritocco_kernels.fused.groupnorm_silu import groupnorm_op, joined_groupnorm_silu
    from ritocco_kernels.fused.guided_step import guided_step
    from ritocco_kernels.fused.model_pixels import from_model_pixels, to_model_pixels
    from ritocco_kernels.fused.upsample import upsample

    pixels, mask = pictures(2, 4, 6)
    decoded = nhwc(drawn(2, 3, 4, 6, seed=4))
    image, vector, tokens = nhwc(drawn(2, 8, 4, 5, seed=1)), drawn(8, seed=2), drawn(2, 6, 8, seed=3)
    torch.use_deterministic_algorithms(False)
    for op, arguments in (
        (groupnorm_op, (image, None, vector, vector, 4, 1e-5, True)),
        (groupnorm_op, (image, drawn(2, 8, seed=4), vector, vector, 4, 1e-5, True)),
        (joined_groupnorm_silu, (image, image.clone(), drawn(16, seed=5), drawn(16, seed=6), 4, 1e-5)),
        (geglu, (tokens,)),
        (upsample, (image,)),
        (layernorm, (tokens, vector, vector, 1e-5)),
        (add_layernorm, (tokens, tokens.clone(), vector, vector, 1e-5)),
        (add_bias, (image, vector, image.clone())),
        (guided_step, tuple(guided_inputs(torch.float32)[0].values())),
        (to_model_pixels, (pixels, mask, torch.float16)),
        (to_model_pixels, (pixels, None, torch.float32)),
        (from_model_pixels, (decoded, pixels[0], mask[0])),
        (from_model_pixels, (decoded, None, None)),
    ):
        done = torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(done.values()) == {"SUCCESS"}
