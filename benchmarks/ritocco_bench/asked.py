"""What every variant is asked: the same pictures, prompt, first latents and scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
"""Of a request, from pixels and tokens on the host to bytes of pixels on the host."""
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
