"""The lean autoencoder against diffusers' AutoencoderKL."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from random_networks import randomise, relative_error
from ritocco.device import onednn_bfloat16
from ritocco.errors import CheckpointError
from ritocco.nets.io import vae_decoder_io, vae_encoder_io
from ritocco.nets.vae import VAE, VAESpec

SD: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd": {**SD, "block_out_channels": [16, 24, 32, 32], "norm_num_groups": 8},
    "plain": {
        **SD,
        "block_out_channels": [16, 16, 32, 48],
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.7,
    },
    "two-levels": {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 8,
        "norm_num_groups": 8,
    },
}


def reference_vae(config: dict[str, Any]) -> Any:
    make: Any = diffusers.AutoencoderKL
    vae = make(**config).eval().requires_grad_(False)
    randomise(vae, 0)
    return vae


def sharing_vae(reference: Any) -> VAE:
    """Our network on the same tensors, built empty as the checkpoint loader does."""
    with torch.device("meta"):
        vae = VAE(VAESpec.from_config(dict(reference.config)))
    vae.load_state_dict(reference.state_dict(), assign=True)
    return vae


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def encoded(reference: Any, pixels: Tensor) -> Tensor:
    mean: Tensor = reference.encode(pixels).latent_dist.mean * reference.config.scaling_factor
    return mean


def decoded(reference: Any, latents: Tensor) -> Tensor:
    pixels: Tensor = reference.decode(latents / reference.config.scaling_factor, return_dict=False)[0]
    return pixels


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest) -> tuple[Any, VAE]:
    reference = reference_vae(CONFIGS[request.param])
    return reference, sharing_vae(reference)


def test_names_are_those_of_the_checkpoints(pair: tuple[Any, VAE]) -> None:
    reference, vae = pair
    ours = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert not any(parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (24, 56)])
def test_float32_parity(pair: tuple[Any, VAE], height: int, width: int) -> None:
    reference, vae = pair
    pixels = noise(2, 3, height, width).clamp(-1, 1)
    latents = vae.encode_mean(pixels)
    assert relative_error(latents, encoded(reference, pixels)) <= 1e-5
    assert relative_error(vae.decode(latents), decoded(reference, latents)) <= 1e-5


def test_bfloat16_is_no_worse_than_twice_diffusers() -> None:
    reference = reference_vae(CONFIGS["sd"])
    for parameter in reference.parameters():
        parameter.copy_(parameter.bfloat16())
    pixels, latents = noise(1, 3, 64, 48).clamp(-1, 1).bfloat16(), noise(1, 4, 8, 6).bfloat16()
    true_latents, true_pixels = encoded(reference, pixels.float()), decoded(reference, latents.float())
    reference.bfloat16()
    vae = sharing_vae(reference)
    their_latents, their_pixels = encoded(reference, pixels), decoded(reference, latents)
    ours = vae.encode_mean(pixels)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, true_latents) <= 2 * relative_error(their_latents, true_latents)
    assert relative_error(vae.decode(latents), true_pixels) <= 2 * relative_error(their_pixels, true_pixels)


def test_io_describes_the_network(pair: tuple[Any, VAE]) -> None:
    _, vae = pair
    sizes = {"N": 2, "H": 5, "W": 3}
    encoder, decoder = vae_encoder_io(vae.spec, dtype="float32"), vae_decoder_io(vae.spec, dtype="float32")
    pixels, latents = encoder.inputs[0].resolve(sizes), decoder.inputs[0].resolve(sizes)
    assert pixels == (2, 3, 5 * vae.spec.factor, 3 * vae.spec.factor)
    assert tuple(vae.encode_mean(torch.zeros(pixels)).shape) == encoder.outputs[0].resolve(sizes)
    assert tuple(vae.decode(torch.zeros(latents)).shape) == decoder.outputs[0].resolve(sizes)
    assert (encoder.inputs[0].name, encoder.outputs[0].name) == ("pixels", "latents")
    assert (decoder.inputs[0].name, decoder.outputs[0].name) == ("latents", "pixels")


def test_specs() -> None:
    real = VAESpec.from_config(SD)
    assert (real.factor, real.scaling_factor, real.mid_attention) == (8, 0.18215, True)
    neutral = {"shift_factor": None, "latents_mean": None, "sample_size": 256, "nobody_knows": 1}
    assert VAESpec.from_config({**SD, **neutral}) == real
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in VAE(real).parameters()) == 83_653_863


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shift_factor", 0.1),
        ("latents_mean", [0.0, 0.0, 0.0, 0.0]),
        ("latents_std", [1.0]),
        ("act_fn", "relu"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        ("up_block_types", ["UpDecoderBlock2D"] * 3),
        ("layers_per_block", [2, 2, 2, 2]),
        ("layers_per_block", 10**6),
        ("scaling_factor", 0.0),
        ("scaling_factor", float("inf")),
        ("norm_num_groups", 24),
        ("latent_channels", None),
        ("block_out_channels", 128),
    ],
)
def test_unsupported_configs_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"^vae config: {key}"):
        VAESpec.from_config({**SD, key: value})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("height", "width"), [(256, 256), (512, 384)])
def test_full_size_parity(height: int, width: int) -> None:
    reference = reference_vae(SD)
    vae = sharing_vae(reference)
    pixels = noise(1, 3, height, width).clamp(-1, 1)
    latents = vae.encode_mean(pixels)
    assert relative_error(latents, encoded(reference, pixels)) <= 1e-5
    assert relative_error(vae.decode(latents), decoded(reference, latents)) <= 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_full_size_bfloat16() -> None:
    reference = reference_vae(SD)
    # Where oneDNN does not compute bfloat16, torch's convolutions take a quarter of an hour for 256 pixels.
    side = 256 if onednn_bfloat16() else 64
    pixels, latents = noise(1, 3, side, side).clamp(-1, 1), noise(1, 4, side // 8, side // 8)
    true_latents, true_pixels = encoded(reference, pixels), decoded(reference, latents)
    reference.bfloat16()
    vae = sharing_vae(reference)
    pixels, latents = pixels.bfloat16(), latents.bfloat16()
    theirs = relative_error(encoded(reference, pixels), true_latents)
    assert relative_error(vae.encode_mean(pixels), true_latents) <= 2 * theirs
    theirs = relative_error(decoded(reference, latents), true_pixels)
    assert relative_error(vae.decode(latents), true_pixels) <= 2 * theirs
