"""One prediction's stages, in order. An engine takes them one after the other; a batcher takes many requests
through them side by side.

What does not depend on the noisy latents is computed by `lanes`, once for all outputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ritocco.backends.runtime import Floats, Lane, LatentSize, Runtime
from ritocco.errors import NonFiniteError
from ritocco.images import data_uri, encode, paste_back
from ritocco.noise import normal
from ritocco.pixels import Pixels, mask_to_latent
from ritocco.prediction import Prediction, Status, timestamp
from ritocco.request import CELL, Request
from ritocco.safety import NSFW_ERROR


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A checked request and the answer that is being made of it. begun: seconds of `time.perf_counter`."""

    prediction: Prediction
    request: Request
    begun: float

    @property
    def size(self) -> LatentSize:
        """Of its latents."""
        fields = self.request.fields
        return LatentSize(height=fields.height // CELL, width=fields.width // CELL)


def lanes(runtime: Runtime, request: Request) -> list[Lane]:
    """Text and condition, encoded; one lane for each output. Raises NonFiniteError."""
    with request.timed("text"):
        context, unconditional = contexts(runtime, request)
        _refuse_non_finite("text encoder", context, unconditional)
    with request.timed("encode"):
        known = condition(runtime, request)
        first = starts(runtime, request)
        _refuse_non_finite("autoencoder's encoder", known, *first)
    return [
        Lane(
            table=request.table,
            seed=request.seed_of(i),
            guidance=request.fields.guidance_scale,
            latents=start,
            context=context,
            unconditional=unconditional,
            condition=known,
        )
        for i, start in enumerate(first)
    ]


def contexts(runtime: Runtime, request: Request) -> tuple[Floats, Floats | None]:
    """[77,D] of the prompt, and of the negative prompt where guidance is over 1."""
    encoded = runtime.encode_text(request.tokens)
    return encoded[0], encoded[1] if len(encoded) == 2 else None


def condition(runtime: Runtime, request: Request) -> Floats:
    """[5,h,w]: the mask, then the latents of the image without the part to repaint."""
    inputs = request.inputs
    masked = runtime.encode_pixels(inputs.pixels, inputs.mask)[0]
    return np.concatenate([mask_to_latent(inputs.mask)[0], masked])


def starts(runtime: Runtime, request: Request) -> list[Floats]:
    """The latents [4,h,w] that each output starts from, in the scheduler's space."""
    table, fields = request.table, request.fields
    noise = request.noise
    if noise is None:
        shape = (4, fields.height // CELL, fields.width // CELL)
        noise = [normal(request.seed_of(i), 0, shape) for i in range(fields.num_outputs)]
    signal, scale = np.float32(table.start_signal[0]), np.float32(table.start_noise[0])
    if not signal:
        return [scale * one for one in noise]
    image = runtime.encode_pixels(request.inputs.pixels, None)[0]
    return [signal * image + scale * one for one in noise]


def decoded(runtime: Runtime, request: Request, latents: Sequence[Floats]) -> Pixels:
    """The outputs' pictures, uint8 [N,H,W,3]; kept pixels are in their place unless a seam is asked for.

    latents: [4,h,w] of each output. Raises NonFiniteError.
    """
    with request.timed("decode"):
        whole = request.options.paste_back and not request.options.mask_feather
        kept = (request.inputs.pixels, request.inputs.mask) if whole else None
        return runtime.decode_pixels(np.stack(latents), kept)


def seamed(request: Request, pixels: Pixels) -> Pixels:
    """With the soft seam that was asked for."""
    options, inputs = request.options, request.inputs
    if options.paste_back and options.mask_feather:
        return paste_back(pixels, inputs.pixels, inputs.mask, options.mask_feather)
    return pixels


def allowed(request: Request, pixels: Pixels) -> list[int]:
    """Indices of the pictures that the safety checker lets through."""
    everything = list(range(len(pixels)))
    if request.safety is None:
        return everything
    flagged = request.safety.flag(pixels)
    if any(flagged):
        request.log.note(f"NSFW content detected in {sum(flagged)} of {len(pixels)} outputs; dropped")
    return [i for i in everything if not flagged[i]]


def publish(job: Job, pixels: Pixels, kept: Sequence[int]) -> Status:
    """Files of the pictures that are let through; the status that the prediction ends with."""
    options = job.request.options
    if not kept:
        job.prediction.error = NSFW_ERROR
        return "failed"
    job.prediction.images = [Image.fromarray(pixels[i]) for i in kept]
    job.prediction.output = [
        data_uri(encode(pixels[i], options.output_format), options.output_format) for i in kept
    ]
    return "succeeded"


def conclude(job: Job, status: Status) -> None:
    """Logs, times, and last the status: who sees it sees all of the answer."""
    prediction, seconds = job.prediction, job.request.seconds
    prediction.completed_at = timestamp()
    seconds["predict_time"] = time.perf_counter() - job.begun
    prediction.metrics = measured(seconds)
    prediction.logs = job.request.log.text()
    prediction.before = Image.fromarray(job.request.inputs.pixels)
    prediction.mask = Image.fromarray(job.request.inputs.mask)
    prediction.status = status


def measured(seconds: Mapping[str, float]) -> dict[str, float]:
    """Phases' seconds as a prediction's metrics have them."""
    return {name: round(spent, 4) for name, spent in seconds.items()}


def _refuse_non_finite(network: str, *outputs: Floats | None) -> None:
    if not all(np.isfinite(output).all() for output in outputs if output is not None):
        raise NonFiniteError(
            f"the {network} gave NaN or infinity before the first step: float16 overflowed (try float32 or "
            "bfloat16), or weights are damaged",
            step=-1,
        )
