"""diffusers' pipeline, as variants: as its documentation has it, and compiled after its guide to speed.

It takes the posterior's mean for the masked image, as ritocco does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ritocco_bench.asked import (
    DIFFUSERS_CLASSES,
    GUIDANCE,
    PHASES,
    PROMPT,
    SCHEDULER,
    Inputs,
    synchronize,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ritocco_bench.peaks import Peaks
    from ritocco_bench.worker import Job


_PLAIN = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


def variant_of(model: Path, dtype: torch.dtype) -> str | None:
    """Which of a folder's files diffusers has to be told to read: those that ritocco reads, where plain ones
    are missing; None where it finds its own. Raises CheckpointError where ritocco reads none.
    """
    if all((model / f"{name}.safetensors").is_file() for name in _PLAIN):
        return None  # without a look into files: a start is timed
    from ritocco.checkpoint import open_checkpoint
    from ritocco.parameters import choose_variant

    networks = open_checkpoint(model).weights.values()
    names = [choose_variant(held, None, dtype)[0] for held in networks if "" not in held]
    return names[0] if names else None


class Diffusers:
    """The pipeline as its documentation has it. held: what its weights are read as, where not the job's."""

    held = ""

    def __init__(self, job: Job) -> None:
        import torch
        from diffusers import StableDiffusionInpaintPipeline

        read: Any = StableDiffusionInpaintPipeline.from_pretrained
        self._dtype = getattr(torch, self.held or job.dtype)
        options = {"torch_dtype": self._dtype, "variant": variant_of(Path(job.model), self._dtype)}
        pipe = read(job.model, local_files_only=True, **options).to(job.device)
        pipe.safety_checker = None  # loaded like ritocco's, and like it not run
        pipe.set_progress_bar_config(disable=True)
        torch.backends.cudnn.benchmark = job.device.startswith("cuda")  # as ritocco has it
        self._job, self._pipe = job, pipe
        self._config = pipe.scheduler.config
        self._seconds: dict[str, float] = {}
        self._denoising = 0.0
        self.decoded: npt.NDArray[np.float32] | None = None
        self.pictures: npt.NDArray[np.uint8] | None = None
        self._kept: Any = None
        self.peaks: Peaks | None = None
        pipe.encode_prompt = self._timed("text", pipe.encode_prompt)
        pipe._encode_vae_image = self._timed("encode", self._mean)
        pipe.vae.decode = self._timed("decode", self._keep(pipe.vae.decode))
        # From and to bytes, as ritocco's phases have it.
        pipe.image_processor.preprocess = self._timed("encode", pipe.image_processor.preprocess)
        pipe.image_processor.postprocess = self._timed("decode", pipe.image_processor.postprocess)
        self._prepare(pipe)
        pipe.unet.register_forward_pre_hook(self._begin)

    def run(self, steps: int, on_step: Callable[[], None], scheduler: str = SCHEDULER) -> dict[str, float]:
        import diffusers
        import numpy as np
        import torch

        from ritocco.images import encode

        # What the pipeline's constructor sets in the scheduler that it is given, and not in one set later.
        fixed = {"DDIM": {"clip_sample": False}, "PNDM": {"skip_prk_steps": True}}.get(scheduler, {})
        kind: Any = getattr(diffusers, DIFFUSERS_CLASSES[scheduler])
        self._pipe.scheduler = kind.from_config(self._config, **fixed)
        if scheduler == "K_EULER_ANCESTRAL":
            self._draw_our_noise()
        given = Inputs(self._job)
        self._seconds, self._denoising = {}, 0.0

        def after(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if index == steps - 1:
                synchronize(self._job.device)
                self._seconds["denoise"] = time.perf_counter() - self._denoising
            on_step()
            return tensors

        start = time.perf_counter()
        made = self._pipe(
            prompt=PROMPT,
            image=given.image,
            mask_image=given.mask,
            height=self._job.size,
            width=self._job.size,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            num_images_per_prompt=self._job.outputs,
            latents=torch.from_numpy(given.latents).to(self._dtype),
            callback_on_step_end=after,
        )
        self._seconds["whole"] = time.perf_counter() - start
        if self.peaks is not None:
            self.peaks.end()
        pictures = [np.asarray(picture) for picture in made.images]
        if self._job.painted:
            self.decoded, self.pictures = self._kept.float().cpu().numpy(), np.stack(pictures)
        self._kept = None
        start = time.perf_counter()
        for picture in pictures:
            encode(picture)
        self._seconds["png"] = time.perf_counter() - start
        return {phase: self._seconds[phase] for phase in (*PHASES, "png", "whole")}

    def _prepare(self, pipe: Any) -> None:
        """Make it faster, where the variant does."""

    def _draw_our_noise(self) -> None:
        """A scheduler that adds noise adds what ritocco adds: a function of seed and draw."""
        import itertools

        import torch
        from diffusers.schedulers import scheduling_euler_ancestral_discrete

        from ritocco.noise import normal

        draws = itertools.count(1)
        shape = (4, self._job.size // 8, self._job.size // 8)

        def draw(wanted: Any, **options: Any) -> Any:
            number = next(draws)
            each = [torch.from_numpy(normal(self._job.seed + i, number, shape)) for i in range(wanted[0])]
            return torch.stack(each).to(options["device"], options["dtype"])

        module: Any = scheduling_euler_ancestral_discrete
        module.randn_tensor = draw

    def _mean(self, image: Any, generator: Any) -> Any:
        posterior = self._pipe.vae.encode(image).latent_dist
        return self._pipe.vae.config.scaling_factor * posterior.mode()

    def _keep(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """As it is: what copies it would be timed with the phase."""

        def kept(*args: Any, **kwargs: Any) -> Any:
            out = decode(*args, **kwargs)
            self._kept = out[0]
            return out

        return kept

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.peaks is not None:
                self.peaks.begin(phase)
            start = time.perf_counter()
            out = function(*args, **kwargs)
            synchronize(self._job.device)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            return out

        return timed

    def _begin(self, *_: Any) -> None:
        if not self._denoising:
            if self.peaks is not None:
                self.peaks.begin("denoise")
            self._denoising = time.perf_counter()


class CompiledDiffusers(Diffusers):
    """The pipeline after the advice of diffusers' guide to speed: channels_last, fused projections, compiled
    UNet and decoder.
    """

    mode = "default"

    def _prepare(self, pipe: Any) -> None:
        import torch

        pipe.fuse_qkv_projections()
        for network in (pipe.unet, pipe.vae):
            network.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, mode=self.mode, fullgraph=True)
        # `decode` is timed already; what it calls is compiled.
        pipe.vae.decoder = torch.compile(pipe.vae.decoder, mode=self.mode, fullgraph=True)


class AutotunedDiffusers(CompiledDiffusers):
    mode = "max-autotune"
