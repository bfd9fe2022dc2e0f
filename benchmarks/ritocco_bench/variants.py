"""The two that are compared, each with the same pictures, prompt, first latents and scheduler.

Both take the posterior's mean for the masked image. Imports are inside the functions: what a variant imports
is part of what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ritocco_bench.worker import Job

DIFFUSERS_CLASSES = {
    "DDIM": "DDIMScheduler",
    "K_EULER": "EulerDiscreteScheduler",
    "DPMSolverMultistep": "DPMSolverMultistepScheduler",
    "K_EULER_ANCESTRAL": "EulerAncestralDiscreteScheduler",
    "PNDM": "PNDMScheduler",
    "KLMS": "LMSDiscreteScheduler",
}
"""Our schedulers, and diffusers' class of the same steps."""

PHASES = ("text", "encode", "denoise", "decode")
SCHEDULER = "DPMSolverMultistep"
PROMPT = "a yellow cat on a park bench, high resolution"
GUIDANCE = 7.5


class Inputs:
    """The request's pictures and latents, from the job's size and seed."""

    def __init__(self, job: Job) -> None:
        import numpy as np
        from PIL import Image

        rows, columns = np.mgrid[0 : job.size, 0 : job.size] / job.size
        waves = [np.sin(k * rows + (7 - k) * columns) for k in (2, 3, 5)]
        self.image = Image.fromarray((127.5 * (np.stack(waves, axis=-1) + 1)).astype(np.uint8))
        quarter = job.size // 4
        mask = np.zeros((job.size, job.size), np.uint8)
        mask[quarter : 3 * quarter, quarter : 3 * quarter] = 255
        self.mask = Image.fromarray(mask)
        shape = (job.outputs, 4, job.size // 8, job.size // 8)
        latents = np.random.default_rng(job.seed).standard_normal(shape, dtype=np.float32)
        # Numbers that bfloat16 holds exactly: diffusers keeps latents in the network's dtype.
        self.latents = (latents.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


class Ritocco:
    def __init__(self, job: Job) -> None:
        import ritocco

        self._job = job
        self._engine = ritocco.load(job.model, device=job.device, dtype=job.dtype, backend=job.backend)
        self.decoded: npt.NDArray[np.float32] | None = None

    def run(self, steps: int, on_step: Callable[[], None], scheduler: str = SCHEDULER) -> dict[str, float]:
        given = Inputs(self._job)
        runtime: Any = self._engine.runtime
        decode = type(runtime).decode_pixels
        last: list[Any] = []

        def keep(latents: Any, kept: Any) -> Any:
            last[:] = [latents]
            return decode(runtime, latents, kept)

        runtime.decode_pixels = keep
        request = {"image": given.image, "mask": given.mask, "prompt": PROMPT, "scheduler": scheduler}
        request |= {"width": self._job.size, "height": self._job.size, "guidance_scale": GUIDANCE}
        request |= {"num_outputs": self._job.outputs, "num_inference_steps": steps, "seed": self._job.seed}
        request |= {"disable_safety_checker": True}
        made = self._engine.predict(
            request, latents=given.latents, paste_back=False, on_step=lambda done, total: on_step()
        )
        if self._job.decoded:
            self.decoded = runtime.decode(*last)
        return {phase: made.metrics[phase] for phase in PHASES}


class Diffusers:
    """The pipeline as its documentation has it."""

    def __init__(self, job: Job) -> None:
        import torch
        from diffusers import StableDiffusionInpaintPipeline

        read: Any = StableDiffusionInpaintPipeline.from_pretrained
        pipe = read(job.model, torch_dtype=getattr(torch, job.dtype), local_files_only=True).to(job.device)
        pipe.safety_checker = None  # loaded like ritocco's, and like it not run
        pipe.set_progress_bar_config(disable=True)
        torch.backends.cudnn.benchmark = job.device.startswith("cuda")  # as ritocco has it
        self._job, self._pipe = job, pipe
        self._config = pipe.scheduler.config
        self._seconds: dict[str, float] = {}
        self._denoising = 0.0
        self.decoded: npt.NDArray[np.float32] | None = None
        pipe.encode_prompt = self._timed("text", pipe.encode_prompt)
        pipe._encode_vae_image = self._timed("encode", self._mean)
        pipe.vae.decode = self._timed("decode", self._keep(pipe.vae.decode))
        self._prepare(pipe)
        pipe.unet.register_forward_pre_hook(self._begin)

    def run(self, steps: int, on_step: Callable[[], None], scheduler: str = SCHEDULER) -> dict[str, float]:
        import diffusers
        import torch

        # What the pipeline's constructor sets in the scheduler that it is given, and not in one set later.
        fixed = {"DDIM": {"clip_sample": False}, "PNDM": {"skip_prk_steps": True}}.get(scheduler, {})
        made: Any = getattr(diffusers, DIFFUSERS_CLASSES[scheduler])
        self._pipe.scheduler = made.from_config(self._config, **fixed)
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

        self._pipe(
            prompt=PROMPT,
            image=given.image,
            mask_image=given.mask,
            height=self._job.size,
            width=self._job.size,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            num_images_per_prompt=self._job.outputs,
            latents=torch.from_numpy(given.latents).to(getattr(torch, self._job.dtype)),
            callback_on_step_end=after,
        )
        return {phase: self._seconds[phase] for phase in PHASES}

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
        def kept(*args: Any, **kwargs: Any) -> Any:
            out = decode(*args, **kwargs)
            self.decoded = out[0].float().cpu().numpy()
            return out

        return kept

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = function(*args, **kwargs)
            synchronize(self._job.device)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            return out

        return timed

    def _begin(self, *_: Any) -> None:
        if not self._denoising:
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


VARIANTS: dict[str, Any] = {
    "ritocco": Ritocco,
    "diffusers": Diffusers,
    "diffusers-compiled": CompiledDiffusers,
    "diffusers-autotuned": AutotunedDiffusers,
}
PAIR = ("ritocco", "diffusers")


def synchronize(device: str) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def exact_float32(device: str) -> None:
    """Convolutions on a GPU in float32 itself, not TF32, which is torch's default there."""
    if device.startswith("cuda"):
        import torch

        torch.backends.cudnn.allow_tf32 = False
