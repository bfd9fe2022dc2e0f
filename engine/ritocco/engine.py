"""The engine: a checkpoint on a device, and `predict`, which takes a request through every stage.

Read this file first. Each stage is a function; what does not depend on the noisy latents happens before the
loop, once for all outputs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ritocco.backends.host_memory import give_back_freed_memory
from ritocco.backends.runtime import Floats, Lane, LatentSize, Runtime
from ritocco.denoise import denoise
from ritocco.errors import BackendError, NonFiniteError
from ritocco.fetch import Fetcher
from ritocco.images import data_uri, encode, paste_back
from ritocco.noise import normal
from ritocco.pixels import Pixels, mask_to_latent
from ritocco.plans import asked_without_pictures, mib
from ritocco.prediction import MODEL, Prediction, timestamp
from ritocco.progress import Log
from ritocco.request import Request, prepare
from ritocco.safety import NSFW_ERROR, SafetyChecker
from ritocco.schema import Options, PredictionInput, parse_input
from ritocco.shown import plain

if TYPE_CHECKING:
    from ritocco.plans import MemoryPlan, Planner
    from ritocco.prompt import Tokenizer

OnStep = Callable[[int, int], bool | None]
"""Called after every step with the steps done and the steps in all; returning False cancels the run."""


class Engine:
    """One checkpoint on one device. Safe to call from several threads; the device takes one at a time."""

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        scheduler: Mapping[str, Any],
        *,
        safety: SafetyChecker | None = None,
        version: str = "",
        notes: Sequence[str] = (),
        fetcher: Fetcher | None = None,
        planner: Planner | None = None,
    ) -> None:
        """Put the parts together; `load` and `from_diffusers` do it for you.

        scheduler: the checkpoint's scheduler config. version: of the predictions. notes: for every log.
        planner: knows what a request takes, and makes the runtime keep to a budget of memory.
        """
        self.runtime = runtime
        self.traits = runtime.traits
        self.version = version
        self._tokenizer = tokenizer
        self._scheduler = dict(scheduler)
        self._safety = safety
        self._notes = tuple(notes)
        self._fetcher = fetcher
        self._planner = planner
        self._device = threading.Lock()
        self._holder: int | None = None  # the thread that has the device
        self._closed = False

    def predict(
        self,
        input: Mapping[str, Any] | PredictionInput,
        *,
        on_step: OnStep | None = None,
        output_format: str | None = None,
        mask_feather: float | None = None,
        paste_back: bool | None = None,
        strength: float | None = None,
        latents: npt.NDArray[np.floating[Any]] | None = None,
        allow_local: bool = True,
    ) -> Prediction:
        """Repaint the white part of the mask.

        input: the twelve fields of `PredictionInput`; image and mask may also be paths, PIL images, arrays,
        bytes and open files where `allow_local`. on_step: see `OnStep`. output_format: png, jpg or webp.
        mask_feather: width in pixels of the soft seam. paste_back: false gives the raw decode. strength: over
        0 up to 1, a later start from the image. latents: float [N,4,height/8,width/8], unit variance (or one
        [4,...] for all outputs), in place of the noise that the seed gives.
        Returns a Prediction: `succeeded`, `canceled` by on_step, or `failed` where every picture was flagged.
        Raises RequestError and FetchError before anything is computed, NonFiniteError after.
        """
        self._refuse_closed()
        if isinstance(input, PredictionInput):
            # Not `model_dump`, which writes pictures as their names.
            input = {name: getattr(input, name) for name in input.model_fields_set}
        prediction = Prediction(model=MODEL, version=self.version, status="processing")
        prediction.started_at = prediction.created_at
        begun = time.perf_counter()
        log = Log()
        fields, options, ignored = parse_input(input, allow_local=allow_local)
        options = (options or Options()).override(
            output_format=output_format,
            mask_feather=mask_feather,
            paste_back=paste_back,
            strength=strength,
            latents=latents,
        )
        prediction.input = {key: value for key, value in input.items() if str(key) not in ignored}
        request = prepare(
            fields,
            options,
            log,
            tokenizer=self._tokenizer,
            scheduler=self._scheduler,
            traits=self.traits,
            safety=self._safety,
            fetcher=self._fetcher,
            allow_local=allow_local,
        )
        log.note(*self._notes)
        if ignored:
            log.note(f"Ignored unknown input: {_listed(ignored)}")
        planner = self._planner
        if planner is not None and planner.budget is not None:
            plan = planner.plan(fields)
            log.note(f"Memory: {plan.strategy}, at most {mib(plan.least)} of {mib(planner.budget)}")
        with self._on_device():
            self._refuse_closed()
            if planner is not None:
                planner.follow(fields)
            painted = self._paint(request, on_step)
        if painted is None:
            prediction.status = "canceled"
        else:
            self._finish(prediction, request, painted)
        prediction.completed_at = timestamp()
        request.seconds["predict_time"] = time.perf_counter() - begun
        prediction.metrics = {name: round(seconds, 4) for name, seconds in request.seconds.items()}
        prediction.logs = log.text()
        return prediction

    def plan(self, **input: Any) -> MemoryPlan:
        """What a request will take, and how it will be computed; nothing is loaded or computed.

        input: fields of `PredictionInput`; picture and mask may be left out. The first plan of a size takes
        seconds, those after it none. Raises RequestError for bad fields and where `memory_budget` does not
        hold the request, and BackendError where the engine runs exported graphs; `ritocco plan` tells what
        those take.
        """
        planner = self._planner
        self._refuse_closed()
        if planner is None:
            raise BackendError("this engine has no plans: they are of checkpoints on torch")
        return planner.explained(asked_without_pictures(input))

    def close(self) -> None:
        """Let go of the networks' memory. Waits for a running prediction; later ones raise BackendError."""
        with self._on_device():
            self._closed = True
            self.__dict__.pop("runtime", None)
            self._safety = self._planner = None
            give_back_freed_memory()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """The device is this thread's. Raises BackendError instead of waiting for itself."""
        if self._holder == threading.get_ident():
            raise BackendError("on_step called the engine that is painting; return False to cancel instead")
        with self._device:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def _refuse_closed(self) -> None:
        if self._closed:
            raise BackendError("this engine is closed; load another")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _paint(self, request: Request, on_step: OnStep | None) -> Pixels | None:
        """Text, condition, loop, decode: uint8 [N,H,W,3], or None where `on_step` cancelled."""
        with request.timed("text"):
            context, unconditional = self._contexts(request)
            _refuse_non_finite("text encoder", context, unconditional)
        with request.timed("encode"):
            condition = self._condition(request)
            starts = self._starts(request)
            _refuse_non_finite("autoencoder's encoder", condition, *starts)
        lanes = [
            Lane(
                table=request.table,
                seed=request.seed_of(i),
                guidance=request.fields.guidance_scale,
                latents=start,
                context=context,
                unconditional=unconditional,
                condition=condition,
            )
            for i, start in enumerate(starts)
        ]
        with request.timed("denoise"):
            latents = self._loop(request, lanes, on_step)
        if latents is None:
            return None
        with request.timed("decode"):
            whole = request.options.paste_back and not request.options.mask_feather
            kept = (request.inputs.pixels, request.inputs.mask) if whole else None
            return self.runtime.decode_pixels(latents, kept)

    def _contexts(self, request: Request) -> tuple[Floats, Floats | None]:
        """[77,D] of the prompt, and of the negative prompt where guidance is over 1."""
        encoded = self.runtime.encode_text(request.tokens)
        return encoded[0], encoded[1] if len(encoded) == 2 else None

    def _condition(self, request: Request) -> Floats:
        """[5,h,w]: the mask, then the latents of the image without the part to repaint."""
        inputs = request.inputs
        masked = self.runtime.encode_pixels(inputs.pixels, inputs.mask)[0]
        return np.concatenate([mask_to_latent(inputs.mask)[0], masked])

    def _starts(self, request: Request) -> list[Floats]:
        """The latents [4,h,w] that each output starts from, in the scheduler's space."""
        table, fields = request.table, request.fields
        noise = request.noise
        if noise is None:
            shape = (4, fields.height // 8, fields.width // 8)
            noise = [normal(request.seed_of(i), 0, shape) for i in range(fields.num_outputs)]
        signal, scale = np.float32(table.start_signal[0]), np.float32(table.start_noise[0])
        if not signal:
            return [scale * one for one in noise]
        image = self.runtime.encode_pixels(request.inputs.pixels, None)[0]
        return [signal * image + scale * one for one in noise]

    def _loop(self, request: Request, lanes: Sequence[Lane], on_step: OnStep | None) -> Floats | None:
        total = len(request.table)
        size = LatentSize(height=lanes[0].latents.shape[1], width=lanes[0].latents.shape[2])
        run = denoise(self.runtime.open(size, len(lanes)), lanes)
        request.log.start()
        while True:
            try:
                done = next(run)
            except StopIteration as end:
                return np.stack([state.latents for state in end.value])
            request.log.progress(done, total)
            if on_step is not None and on_step(done, total) is False:
                run.close()
                request.log.note(f"Canceled after {done} of {total} steps")
                return None

    def _finish(self, prediction: Prediction, request: Request, pixels: Pixels) -> None:
        """Soft seams, safety, files."""
        options, inputs = request.options, request.inputs
        with request.timed("outputs"):
            if options.paste_back and options.mask_feather:
                pixels = paste_back(pixels, inputs.pixels, inputs.mask, options.mask_feather)
            kept = self._checked(request, pixels)
            prediction.images = [Image.fromarray(pixels[i]) for i in kept]
            uris = [data_uri(encode(pixels[i], options.output_format), options.output_format) for i in kept]
        if not kept:
            prediction.status, prediction.error = "failed", NSFW_ERROR
        else:
            prediction.status, prediction.output = "succeeded", uris

    def _checked(self, request: Request, pixels: Pixels) -> list[int]:
        """Indices of the pictures that the safety checker lets through."""
        everything = list(range(len(pixels)))
        if request.safety is None:
            return everything
        with self._on_device():
            flagged = request.safety.flag(pixels)
        if any(flagged):
            request.log.note(f"NSFW content detected in {sum(flagged)} of {len(pixels)} outputs; dropped")
        return [i for i in everything if not flagged[i]]


def _refuse_non_finite(network: str, *outputs: Floats | None) -> None:
    if not all(np.isfinite(output).all() for output in outputs if output is not None):
        message = f"the {network} gave NaN or infinity before the first step; try dtype float32 or bfloat16"
        raise NonFiniteError(message, step=-1)


def _listed(keys: Sequence[str]) -> str:
    """Somebody's keys for the log: plain, on one line, not endless."""
    shown = [plain(key, 40) for key in sorted(keys)]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")
