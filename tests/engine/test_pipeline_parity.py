"""The engine against diffusers' StableDiffusionInpaintPipeline: same weights and noise, decoded floats.

diffusers samples the posterior of the image's latents; ours is its mean. So the reference gets the mean as
`masked_image_latents`, or has its own sampling replaced by the mode where it encodes the image itself.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from torch import Tensor

import ritocco
from ritocco import Engine
from ritocco.backends.runtime import Floats
from ritocco.noise import normal
from ritocco.schedules import SCHEDULERS
from ritocco_bench.asked import DIFFUSERS_CLASSES

# Decoded floats, about [-1, 1], float32 on both sides. Measured on the tiny model: at most 1e-5.
TOLERANCE = 1e-4
SEED = 7
NEGATIVE = "a park bench"
Ask = Callable[..., dict[str, Any]]


def open_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' pipeline of a folder, silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline: Any = diffusers.StableDiffusionInpaintPipeline
        pipe = pipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> Any:
    return open_pipeline(tiny_checkpoint)


def noise_of(given: dict[str, Any], draw: int) -> Floats:
    """[N,4,h,w]: what the outputs of a request draw."""
    shape = (4, given["height"] // 8, given["width"] // 8)
    return np.stack([normal(given["seed"] + i, draw, shape) for i in range(given.get("num_outputs", 1))])


def mean_latents(output: Any, generator: Any = None) -> Tensor:
    """In place of the pipeline's `retrieve_latents`, which samples."""
    mode: Tensor = output.latent_dist.mode()
    return mode


def masked_latents(pipe: Any, given: dict[str, Any]) -> Tensor:
    """The posterior mean of the image without its white part, by diffusers' own parts."""
    size = {"height": given["height"], "width": given["width"]}
    image = pipe.image_processor.preprocess(given["image"], **size)
    mask = pipe.mask_processor.preprocess(given["mask"], **size)
    masked = (image * (mask < 0.5)).to(pipe.vae.dtype)
    with torch.no_grad():
        latents: Tensor = mean_latents(pipe.vae.encode(masked)) * pipe.vae.config.scaling_factor
    return latents


def theirs(pipe: Any, given: dict[str, Any], scheduler: str, *, strength: float = 1.0) -> Floats:
    """Decoded floats of diffusers' pipeline, before clamping: [N,3,H,W]."""
    decoded: list[Tensor] = []
    draws = iter(range(given["num_inference_steps"] + 2))
    next(draws)

    def decode(*args: Any, **options: Any) -> Any:
        result = type(pipe.vae).decode(pipe.vae, *args, **options)
        decoded.append(result[0])
        return result

    def draw(shape: Any, **options: Any) -> Tensor:
        return torch.from_numpy(noise_of(given, next(draws))).to(options["dtype"]).reshape(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vae, "decode", decode)
        patch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", draw)
        start: dict[str, Any] = {}
        if strength == 1.0:
            start = {"latents": torch.from_numpy(noise_of(given, 0)).to(pipe.unet.dtype)}
            start |= {"masked_image_latents": masked_latents(pipe, given)}
        else:
            first = torch.from_numpy(noise_of(given, 0))
            module = pipeline_stable_diffusion_inpaint
            patch.setattr(module, "randn_tensor", lambda *args, **options: first.to(options["dtype"]))
            patch.setattr(module, "retrieve_latents", mean_latents)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The pipeline's constructor switches clipping off, which a scheduler set later would still do.
            fixed = {"clip_sample": False} if scheduler == "DDIM" else {}
            made = getattr(diffusers, DIFFUSERS_CLASSES[scheduler]).from_config(
                pipe.scheduler.config, **fixed
            )
            patch.setattr(pipe, "scheduler", made)
            pipe(
                prompt=given["prompt"],
                negative_prompt=given.get("negative_prompt"),
                image=given["image"],
                mask_image=given["mask"],
                height=given["height"],
                width=given["width"],
                strength=strength,
                num_inference_steps=given["num_inference_steps"],
                guidance_scale=given["guidance_scale"],
                num_images_per_prompt=given.get("num_outputs", 1),
                output_type="pt",
                **start,
            )
    return torch.cat(decoded).float().numpy()


def ours(engine: Engine, given: dict[str, Any], scheduler: str, **options: Any) -> Floats:
    """Decoded floats of the engine: [N,3,H,W]."""
    decoded: list[Floats] = []
    original = engine.runtime.decode

    def decode(latents: Floats) -> Floats:
        decoded.append(original(latents))
        return decoded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runtime, "decode", decode)
        prediction = engine.predict(given | {"scheduler": scheduler}, **options)
    assert prediction.status == "succeeded"
    return decoded[0]


def assert_parity(result: Floats, reference: Floats) -> None:
    assert result.shape == reference.shape
    assert float(np.abs(result - reference).max()) <= TOLERANCE
    assert reference.std() > 0.1


@pytest.mark.parametrize("size", [(64, 64), (128, 64)], ids=["square", "wide"])
@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_parity(
    tiny_engine: Engine, pipe: Any, ask: Ask, scheduler: str, guidance: float, size: tuple[int, int]
) -> None:
    given = ask(size=size, guidance_scale=guidance, num_inference_steps=4, negative_prompt=NEGATIVE)
    assert_parity(ours(tiny_engine, given, scheduler), theirs(pipe, given, scheduler))


def test_all_that_is_asked_for_reaches_the_decoded_floats(tiny_engine: Engine, ask: Ask) -> None:
    """So that parity has something to say about it."""
    given = ask(guidance_scale=7.5, num_inference_steps=4, negative_prompt=NEGATIVE)
    changes: list[dict[str, Any]] = [
        {"prompt": "a dog"},
        {"negative_prompt": None},
        {"guidance_scale": 7.0},
        {"seed": 8},
        {"image": given["image"].rotate(90)},
        {"mask": given["mask"].rotate(90)},
        {"num_inference_steps": 5},
    ]
    plain = ours(tiny_engine, given, "DDIM")
    for change in changes:
        assert np.abs(ours(tiny_engine, given | change, "DDIM") - plain).max() > 20 * TOLERANCE, change


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_two_outputs_agree(tiny_engine: Engine, pipe: Any, ask: Ask, scheduler: str) -> None:
    given = ask(size=(64, 128), guidance_scale=5.0, num_outputs=2, num_inference_steps=4)
    given["image"] = given["image"].resize((91, 150))  # both sides resize it, alike
    result = ours(tiny_engine, given, scheduler)
    assert_parity(result, theirs(pipe, given, scheduler))
    assert np.abs(result[0] - result[1]).max() > 0.1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_later_start_agrees(tiny_engine: Engine, pipe: Any, ask: Ask, scheduler: str) -> None:
    given = ask(guidance_scale=7.5, num_inference_steps=5, num_outputs=2)
    result = ours(tiny_engine, given, scheduler, strength=0.6)
    assert_parity(result, theirs(pipe, given, scheduler, strength=0.6))
    assert np.abs(result - ours(tiny_engine, given, scheduler)).max() > 0.1


def test_given_latents_agree(pipe: Any, ask: Ask) -> None:
    """Through an engine that shares the pipeline's tensors, with noise from elsewhere."""
    given = ask(guidance_scale=7.5, num_inference_steps=4)
    latents = np.random.default_rng(3).standard_normal((1, 4, 8, 8)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "noise_of", lambda given, draw: latents)
        reference = theirs(pipe, given, "K_EULER")
    result = ours(ritocco.from_diffusers(pipe), given, "K_EULER", latents=latents)
    assert_parity(result, reference)


def test_bfloat16_is_no_worse_than_twice_diffusers(
    tiny_engine: Engine, tiny_checkpoint: Path, ask: Ask
) -> None:
    low = ritocco.load(tiny_checkpoint, device="cpu", dtype="bfloat16")
    reference = open_pipeline(tiny_checkpoint, torch.bfloat16)
    for seed, scheduler in enumerate(("DDIM", "K_EULER", "DPMSolverMultistep")):
        given = ask(guidance_scale=7.5, num_inference_steps=5, seed=seed)
        truth = ours(tiny_engine, given, scheduler)
        distances = [
            float(np.sqrt(np.square(result - truth).mean()))
            for result in (ours(low, given, scheduler), theirs(reference, given, scheduler))
        ]
        assert 0 < distances[0] <= 2 * distances[1], (scheduler, distances)


SD2_UNET: dict[str, Any] = {
    "in_channels": 9,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 64,
}
SD2_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
SD2_TEXT: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}


@pytest.fixture(scope="module")
def full_pipe(tiny_checkpoint: Path) -> Iterator[Any]:
    """Stable Diffusion 2's inpainting networks at full size, seeded; the tiny tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    small = open_pipeline(tiny_checkpoint)
    ids = {name: getattr(small.text_encoder.config, name) for name in ("bos_token_id", "eos_token_id")}
    text: dict[str, Any] = SD2_TEXT | ids | {"vocab_size": small.text_encoder.config.vocab_size}
    make_unet: Any = diffusers.UNet2DConditionModel
    make_vae: Any = diffusers.AutoencoderKL
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(22)
        pipeline: Any = diffusers.StableDiffusionInpaintPipeline
        made = pipeline(
            unet=make_unet(**SD2_UNET),
            vae=make_vae(**SD2_VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
            tokenizer=small.tokenizer,
            scheduler=small.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for network in (made.unet, made.vae, made.text_encoder):
        network.eval().requires_grad_(False)
    made.set_progress_bar_config(disable=True)
    yield made
    del made
    gc.collect()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("size", "guidance", "scheduler"),
    [
        ((512, 512), 7.5, "DPMSolverMultistep"),
        ((256, 128), 1.0, "K_EULER"),
        ((128, 192), 7.5, "PNDM"),
        ((128, 64), 7.5, "DDIM"),
        ((64, 128), 7.5, "KLMS"),
        ((128, 128), 7.5, "K_EULER_ANCESTRAL"),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_full_size_parity(
    full_pipe: Any, ask: Ask, size: tuple[int, int], guidance: float, scheduler: str
) -> None:
    given = ask(size=size, guidance_scale=guidance, num_inference_steps=4, negative_prompt=NEGATIVE)
    engine = ritocco.from_diffusers(full_pipe)
    mine = {parameter.data_ptr() for parameter in engine.runtime.unet.parameters()}  # type: ignore[attr-defined]
    assert mine <= {parameter.data_ptr() for parameter in full_pipe.unet.parameters()}
    assert_parity(ours(engine, given, scheduler), theirs(full_pipe, given, scheduler))
