"""float16 ends at 65504: networks whose activations grow towards it paint the same picture; past it an error
names the network or the step.

`ritocco.load` refuses float16 on a CPU, for its speed; here the runtime is made by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accelerator import DEVICE, GPU
from naive_float16 import EPS, LARGEST, WRONG, drawn, naive_groupnorm, naive_layernorm, off
from random_lanes import random_lane
from ritocco.backends.runtime import Lane, LatentSize
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import load_tokenizer, open_checkpoint
from ritocco.engine import Engine
from ritocco.errors import NonFiniteError
from ritocco.nets.specs import UNetSpec, VAESpec
from ritocco.nets.unet import _sinusoid
from ritocco.pixels import from_model, to_model
from ritocco_kernels.guided_step import NUMBERS, guided_step_reference

Ask = Callable[..., dict[str, Any]]
Load = Callable[[torch.dtype], TorchRuntime]


VAE_STREAM = r"conv_in\.|conv2\.|to_out\.0\.|(shortcut|samplers\.0\.conv)\.bias"
STREAMS = {
    "text_encoder": r"embedding\.|out_proj\.|fc2\.",
    "encoder": VAE_STREAM,
    "unet": VAE_STREAM + r"|proj_in\.|ff\.net\.2\.|proj_out\.bias",
    "decoder": VAE_STREAM,
}
"""The parameters behind what enters a network's residual stream; norms stand before all that leaves it."""

IN_RANGE, BEYOND = 2.0**12, 2.0**16  # of tiny networks, whose streams reach 3 to 12
# Of the largest value: float16 rounds after every layer. Measured 0.001 to 0.002, at any scale in range.
NETWORK_TOLERANCE = 0.005
PICTURE_TOLERANCE = 3  # levels of 255, after three guided steps


def network(runtime: TorchRuntime, name: str) -> Any:
    """A module that holds the network."""
    return getattr(runtime, "vae" if name in ("encoder", "decoder") else name)


def scale_stream(runtime: TorchRuntime, name: str, factor: float) -> None:
    """Activations times `factor`: the network's meaning stays, but for its norms' eps, and all weights stay
    in float16's range.
    """
    held = network(runtime, name)
    for key, parameter in getattr(held, name, held).named_parameters():
        if re.search(STREAMS[name], key):
            parameter.data = parameter.data * factor
        assert parameter.abs().max() <= LARGEST


@torch.inference_mode()
def call(runtime: TorchRuntime, name: str, dtype: torch.dtype) -> Tensor:
    """The network's output for seeded inputs, after a change of dtype."""
    held = network(runtime, name).to(dtype)
    given: dict[str, Callable[[], Any]] = {
        "text_encoder": lambda: held(torch.arange(2 * 77).reshape(2, 77)),
        "encoder": lambda: held.encode_mean(drawn(1, 3, 32, 64, seed=23, most=1).to(dtype)),
        "unet": lambda: held(
            drawn(2, 9, 4, 8, seed=21).to(dtype),
            torch.tensor([900.0, 20.0]),
            drawn(2, 77, 32, seed=22).to(dtype),
        ),
        "decoder": lambda: held.decode(drawn(1, 4, 4, 8, seed=24).to(dtype)),
    }
    out: Tensor = given[name]()
    return out


@pytest.fixture
def load(tiny_checkpoint: Path) -> Load:
    """Makes networks of a test's own."""

    def make(dtype: torch.dtype) -> TorchRuntime:
        runtime = TorchRuntime(open_checkpoint(tiny_checkpoint), device=torch.device("cpu"), dtype=dtype)
        runtime.decode(np.zeros((1, 4, 2, 2), np.float32))  # the decoder's weights come with the first use
        return runtime

    return make


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Callable[[TorchRuntime], Engine]:
    opened = open_checkpoint(tiny_checkpoint)
    return lambda runtime: Engine(runtime, load_tokenizer(opened), opened.scheduler)


@pytest.mark.parametrize("name", STREAMS)
def test_a_network_computes_in_range_and_shows_what_is_beyond(
    load: Load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runtime = load(torch.float16)
    scale_stream(runtime, name, IN_RANGE)
    result = call(runtime, name, torch.float16)
    with monkeypatch.context() as patch:
        patch.setattr(F, "group_norm", naive_groupnorm)
        patch.setattr(F, "layer_norm", naive_layernorm)
        naive = call(runtime, name, torch.float16)
    truth = call(runtime, name, torch.float64)
    assert off(result, truth) <= NETWORK_TOLERANCE
    assert off(naive, truth) > WRONG

    scale_stream(runtime, name, BEYOND / IN_RANGE)
    assert not call(runtime, name, torch.float16).isfinite().all()
    # bfloat16 has eight times float16's rounding error, and float32's range.
    assert off(call(runtime, name, torch.bfloat16), truth) <= 8 * NETWORK_TOLERANCE


def test_a_picture_of_large_activations_is_that_of_float32(
    load: Load, engine: Callable[[TorchRuntime], Engine], ask: Ask
) -> None:
    painted = []
    for dtype in (torch.float16, torch.float32):
        runtime = load(dtype)
        for name in STREAMS:
            # Latents at the end are larger than `call`'s.
            scale_stream(runtime, name, IN_RANGE / 8 if name == "decoder" else IN_RANGE)
        painted.append(np.asarray(engine(runtime).predict(ask()).images[0], np.int64))
    assert np.abs(painted[0] - painted[1]).max() <= PICTURE_TOLERANCE


SAID = {
    "text_encoder": "the text encoder gave NaN or infinity before the first step",
    "encoder": "the autoencoder's encoder gave NaN or infinity before the first step",
    "unet": r"step 3 of 5 \(DDIM, timestep 401\) gave NaN or infinity: most often float16 overflowing",
    "decoder": "the decoded image holds NaN or infinity",
}


@pytest.mark.parametrize("name", SAID)
def test_activations_beyond_float16_are_an_error_and_no_picture(
    load: Load, engine: Callable[[TorchRuntime], Engine], ask: Ask, name: str
) -> None:
    """And float32, which the error asks for, paints."""

    def predict(dtype: torch.dtype) -> Any:
        runtime = load(dtype)
        grow = partial(scale_stream, runtime, name, BEYOND)
        if name != "unet":
            grow()
        # The UNet's activations grow after the second step.
        return engine(runtime).predict(
            ask(num_inference_steps=5, scheduler="DDIM", guidance_scale=1),
            on_step=lambda done, total: grow() if name == "unet" and done == 2 else None,
        )

    with pytest.raises(NonFiniteError, match=SAID[name]) as caught:
        predict(torch.float16)
    assert "bfloat16" in str(caught.value)
    assert caught.value.step == (2 if name == "unet" else -1)
    assert predict(torch.float32).status == "succeeded"


GUIDANCE = 20.0
# Of the largest value, float32: a few roundings of numbers as large as the result.
STEP_TOLERANCE = 1e-6


def step_case() -> tuple[Tensor, Lane, Tensor, tuple[Tensor, ...]]:
    """Outputs of 4,000 under guidance 20 and latents of 50,000, neither of which float16 holds: both, the
    row's numbers, and the next latents, history and input in float64.
    """
    output = drawn(2, 4, 4, 8, seed=30, scale=4000.0)
    lane = random_lane("K_EULER", 50, 5, GUIDANCE, cells=(4, 8), width=32)
    lane = replace(lane, latents=np.float32(50000) * lane.latents)
    row, following = lane.table.row(0), lane.table.row(1)
    numbers = torch.tensor([[row.p, row.q, row.a, *row.b, row.c, row.push, GUIDANCE, following.in_scale]])
    assert numbers.shape == (1, len(NUMBERS))
    truth = guided_step_reference(
        output.double(),
        torch.from_numpy(lane.latents)[None].double(),
        torch.zeros(3, 1, 4, 4, 8, dtype=torch.float64),
        numbers.double(),
        torch.zeros(1, 4, 4, 8, dtype=torch.float64),
        *(torch.tensor([index]) for index in (0, 1)),
    )
    assert not (output[:1] + GUIDANCE * (output[1:] - output[:1])).isfinite().all()
    assert not torch.from_numpy(lane.latents).half().isfinite().all()
    assert truth[0].abs().max() > LARGEST
    return output, lane, numbers, truth


def test_guidance_and_the_step_go_past_65504(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    output, lane, _, (latents, history, _) = step_case()
    runtime = load(torch.float16)
    taken: list[Tensor] = []

    def step(scaled: Tensor, *hoisted: object) -> Tensor:
        taken.append(scaled)
        return output

    monkeypatch.setattr(runtime.unet, "step", step)
    batch = runtime.open(LatentSize(height=4, width=8), 1)
    batch.join(0, lane)
    batch.step({0: 0})
    state = batch.leave(0)
    assert off(torch.from_numpy(state.latents), latents[0]) <= STEP_TOLERANCE
    assert off(torch.from_numpy(state.history), history[:, 0]) <= STEP_TOLERANCE
    # Scaled before they are rounded.
    assert taken[0].dtype == torch.float16
    assert off(taken[0][0], lane.table.row(0).in_scale * torch.from_numpy(lane.latents).double()) <= EPS


@pytest.mark.parametrize("device", [pytest.param(DEVICE, marks=[pytest.mark.gpu] if GPU else [])], ids=str)
def test_the_kernel_of_the_step_goes_past_65504(device: torch.device) -> None:
    pytest.importorskip("triton")
    from ritocco_kernels.fused.guided_step import guided_step

    output, lane, numbers, truth = step_case()
    latents = torch.from_numpy(lane.latents)[None].to(device)
    history = torch.zeros(3, 1, 4, 4, 8, device=device)
    following = torch.empty(1, 4, 4, 8, dtype=torch.float16, device=device)
    given = (output, latents, history, following, numbers)
    # Seed and row, the output's two rows, and no row broken.
    integers = (torch.tensor(one, device=device) for one in ([[5, 0]], [0], [1], [-1]))
    guided_step(*(one.to(device) for one in given), *integers)
    for result, exact in zip((latents, history), truth, strict=False):
        assert off(result.cpu(), exact) <= STEP_TOLERANCE
    assert off(following.cpu(), truth[2]) <= EPS


def test_latents_beyond_float16_are_an_error(
    load: Load, engine: Callable[[TorchRuntime], Engine], ask: Ask
) -> None:
    with pytest.raises(NonFiniteError, match="step 1 of 3") as caught:
        engine(load(torch.float16)).predict(ask(), latents=np.full((1, 4, 8, 8), 1e6, np.float32))
    assert caught.value.step == 0


def test_the_time_embedding_begins_in_float32(tiny_checkpoint: Path) -> None:
    """Angles of 999 have steps of a half in float16."""
    spec = UNetSpec.from_config(
        {"block_out_channels": [32] * 4, "norm_num_groups": 8, "attention_head_dim": 4}
    )
    timesteps = torch.tensor([999.0, 613.25])
    frequencies = 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
    angles = timesteps[:, None].double() * frequencies
    truth = torch.cat([angles.cos(), angles.sin()], dim=1)
    # A step of float32 at 999 is 6e-5, and a frequency is off by as much of itself.
    assert off(_sinusoid(timesteps, spec), truth) <= 2e-4
    rounded = timesteps[:, None].half() * frequencies.half()
    assert off(torch.cat([rounded.cos(), rounded.sin()], dim=1), truth) > WRONG


def test_pixels_are_converted_in_float32() -> None:
    decoded = torch.cat([drawn(1, 3, 16, 16, seed=40, scale=scale) for scale in (0.5, 600.0)])
    truth = ((decoded.double() / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    np.testing.assert_array_equal(from_model(decoded.numpy()), truth.numpy())
    assert not ((decoded * 0.5 + 0.5) * 255).isfinite().all()
    every = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)
    model = to_model(every)
    exact = every.astype(np.float64).transpose(2, 0, 1)[None] / 127.5 - 1
    assert np.abs(model - exact).max() <= 2 * np.finfo(np.float32).eps  # two roundings of numbers up to 2
    np.testing.assert_array_equal(from_model(model.astype(np.float16)), every[None])


@pytest.mark.parametrize("asked", [True, False])
def test_the_keys_that_ask_for_float32_change_nothing(asked: bool) -> None:
    """`upcast_attention`: scores are float32 in any case. `force_upcast`: stands in every autoencoder's
    config of diffusers, whose Stable Diffusion XL pipelines alone look at it.
    """
    unet = {"in_channels": 9, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
    vae = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    assert UNetSpec.from_config({**unet, "upcast_attention": asked}) == UNetSpec.from_config(unet)
    assert VAESpec.from_config({**vae, "force_upcast": asked}) == VAESpec.from_config(vae)
