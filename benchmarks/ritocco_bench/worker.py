"""One variant in one process: `python -m ritocco_bench.worker JOB`, with the job as JSON.

Both variants get the same pictures, prompt, first latents and scheduler, and both take the posterior's mean
for the masked image. Imports are inside the functions: what a variant imports is part of what is measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PHASES = ("text", "encode", "denoise", "decode")
SCHEDULER = "DPMSolverMultistep"
PROMPT = "a yellow cat on a park bench, high resolution"
GUIDANCE = 7.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one process does. until: `first_step` of a fresh process, or `end`, `runs` times after a warm-up.

    size: height and width in pixels. decoded: where the last run's decoded floats go, as .npy; or empty.
    """

    variant: str
    model: str
    device: str
    dtype: str
    size: int
    steps: int
    outputs: int = 1
    runs: int = 1
    until: str = "end"
    seed: int = 0
    decoded: str = ""


@dataclass(kw_only=True, slots=True)
class Result:
    """What a process reports. loaded, stepped: `time.time()`. seconds: a dict of phases for each run."""

    loaded: float
    stepped: float = 0.0
    seconds: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int | None = None


class _Reached(Exception):  # noqa: N818 - no error
    """The first step is done."""


class _Inputs:
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
        self.latents = np.random.default_rng(job.seed).standard_normal(shape, dtype=np.float32)


class _Ritocco:
    def __init__(self, job: Job) -> None:
        import ritocco

        self._job = job
        self._engine = ritocco.load(job.model, device=job.device, dtype=job.dtype)
        self.decoded: npt.NDArray[np.float32] | None = None

    def run(self, steps: int, on_step: Callable[[], None]) -> dict[str, float]:
        given = _Inputs(self._job)
        runtime: Any = self._engine.runtime
        decode = type(runtime).decode

        def keep(latents: Any) -> Any:
            self.decoded = decode(runtime, latents)
            return self.decoded

        runtime.decode = keep
        request = {"image": given.image, "mask": given.mask, "prompt": PROMPT, "scheduler": SCHEDULER}
        request |= {"width": self._job.size, "height": self._job.size, "guidance_scale": GUIDANCE}
        request |= {"num_outputs": self._job.outputs, "num_inference_steps": steps, "seed": self._job.seed}
        request |= {"disable_safety_checker": True}
        made = self._engine.predict(
            request, latents=given.latents, paste_back=False, on_step=lambda done, total: on_step()
        )
        return {phase: made.metrics[phase] for phase in PHASES}


class _Diffusers:
    def __init__(self, job: Job) -> None:
        import torch
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionInpaintPipeline

        read: Any = StableDiffusionInpaintPipeline.from_pretrained
        pipe = read(job.model, torch_dtype=getattr(torch, job.dtype), local_files_only=True).to(job.device)
        scheduler: Any = DPMSolverMultistepScheduler
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        pipe.safety_checker = None  # loaded like ritocco's, and like it not run
        pipe.set_progress_bar_config(disable=True)
        self._job, self._pipe = job, pipe
        self._seconds: dict[str, float] = {}
        self._denoising = 0.0
        self.decoded: npt.NDArray[np.float32] | None = None
        pipe.encode_prompt = self._timed("text", pipe.encode_prompt)
        pipe._encode_vae_image = self._timed("encode", self._mean)
        pipe.vae.decode = self._timed("decode", self._keep(pipe.vae.decode))
        pipe.unet.register_forward_pre_hook(self._begin)

    def run(self, steps: int, on_step: Callable[[], None]) -> dict[str, float]:
        import torch

        given = _Inputs(self._job)
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


VARIANTS: dict[str, Any] = {"ritocco": _Ritocco, "diffusers": _Diffusers}


def perform(job: Job) -> Result:
    """Do a job in this process. Raises ValueError for a variant that is not one of `VARIANTS`."""
    if job.variant not in VARIANTS:
        raise ValueError(f"variant is {job.variant!r}; it must be one of {', '.join(VARIANTS)}")
    side = VARIANTS[job.variant](job)
    result = Result(loaded=time.time())
    if job.until == "first_step":

        def reached() -> None:
            synchronize(job.device)
            result.stepped = time.time()
            raise _Reached

        try:
            side.run(job.steps, reached)
        except _Reached:
            return result
    side.run(1, lambda: None)
    result.seconds = [side.run(job.steps, lambda: None) for _ in range(job.runs)]
    result.peak_bytes = peak_bytes(job.device)
    if job.decoded:
        import numpy as np

        np.save(job.decoded, side.decoded)
    return result


def synchronize(device: str) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def peak_bytes(device: str) -> int | None:
    """Most memory of this process so far: allocated on a GPU, else resident; None where unknown (Windows)."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # `ru_maxrss` of a child begins with its parent's
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return None
