"""The engine: a checkpoint on a device, and `predict`, which takes a request through every stage.

Read this file first. Each stage is a function; what does not depend on the noisy latents happens before the
loop, once for all outputs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ritocco.artefacts import Artefacts, cache_root, is_artefacts, open_artefacts
from ritocco.backends import SESSION_BACKENDS
from ritocco.backends.host_memory import give_back_freed_memory
from ritocco.backends.runtime import Floats, Lane, LatentSize, Runtime
from ritocco.denoise import denoise
from ritocco.errors import BackendError, CheckpointError, NonFiniteError
from ritocco.fetch import Fetcher
from ritocco.images import (
    data_uri,
    encode,
    from_model,
    mask_to_latent,
    masked_to_model,
    paste_back,
    to_model,
)
from ritocco.noise import normal
from ritocco.prediction import MODEL, Prediction, timestamp
from ritocco.progress import Log
from ritocco.request import Request, prepare
from ritocco.safety import NSFW_ERROR, SafetyChecker
from ritocco.schema import Options, PredictionInput, parse_input
from ritocco.shown import plain

if TYPE_CHECKING:
    from ritocco.checkpoint import Checkpoint
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
    ) -> None:
        """Put the parts together; `load` and `from_diffusers` do it for you.

        scheduler: the checkpoint's scheduler config. version: of the predictions. notes: for every log.
        """
        self.runtime = runtime
        self.traits = runtime.traits
        self.version = version
        self._tokenizer = tokenizer
        self._scheduler = dict(scheduler)
        self._safety = safety
        self._notes = tuple(notes)
        self._fetcher = fetcher
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
        with self._on_device():
            self._refuse_closed()
            decoded = self._paint(request, on_step)
        if decoded is None:
            prediction.status = "canceled"
        else:
            self._finish(prediction, request, decoded)
        prediction.completed_at = timestamp()
        request.seconds["predict_time"] = time.perf_counter() - begun
        prediction.metrics = {name: round(seconds, 4) for name, seconds in request.seconds.items()}
        prediction.logs = log.text()
        return prediction

    def close(self) -> None:
        """Let go of the networks' memory. Waits for a running prediction; later ones raise BackendError."""
        with self._on_device():
            self._closed = True
            self.__dict__.pop("runtime", None)
            self._safety = None
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

    def _paint(self, request: Request, on_step: OnStep | None) -> Floats | None:
        """Text, condition, loop, decode: float32 [N,3,H,W], or None where `on_step` cancelled."""
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
            return self.runtime.decode(latents)

    def _contexts(self, request: Request) -> tuple[Floats, Floats | None]:
        """[77,D] of the prompt, and of the negative prompt where guidance is over 1."""
        encoded = self.runtime.encode_text(request.tokens)
        return encoded[0], encoded[1] if len(encoded) == 2 else None

    def _condition(self, request: Request) -> Floats:
        """[5,h,w]: the mask, then the latents of the image without the part to repaint."""
        inputs = request.inputs
        masked = self.runtime.encode_image(masked_to_model(inputs.pixels, inputs.mask))
        return np.concatenate([mask_to_latent(inputs.mask)[0], masked[0]])

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
        image = self.runtime.encode_image(to_model(request.inputs.pixels))[0]
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

    def _finish(self, prediction: Prediction, request: Request, decoded: Floats) -> None:
        """Pixels, paste-back, safety, files."""
        options, inputs = request.options, request.inputs
        with request.timed("outputs"):
            pixels = from_model(decoded)
            if options.paste_back:
                pixels = paste_back(pixels, inputs.pixels, inputs.mask, options.mask_feather)
            kept = self._checked(request, pixels)
            prediction.images = [Image.fromarray(pixels[i]) for i in kept]
            uris = [data_uri(encode(pixels[i], options.output_format), options.output_format) for i in kept]
        if not kept:
            prediction.status, prediction.error = "failed", NSFW_ERROR
        else:
            prediction.status, prediction.output = "succeeded", uris

    def _checked(self, request: Request, pixels: npt.NDArray[np.uint8]) -> list[int]:
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


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    fetcher: Fetcher | None = None,
) -> Engine:
    """Load a checkpoint.

    model: a diffusers folder, a single `.safetensors` file, or a folder of exported graphs; None takes
    RITOCCO_MODEL from the environment, else the embedded pocket model. device, dtype: see `device.choose`.
    backend: `auto`, `torch`, `onnxruntime` or `openvino`; the last two export a checkpoint once, into the
    cache. variant: `fp16` and such, where a folder holds several. tokenizer: folder of vocab.json and
    merges.txt, for single files.
    fetcher: opens the URLs of requests; None makes one from the environment.
    Raises CheckpointError, BackendError, and RequestError where RITOCCO_ALLOW_NETWORKS can't be read.
    """
    path = model_path(model)
    if is_artefacts(path):
        if variant is not None or tokenizer is not None:
            raise CheckpointError(f"{path}: exported graphs; variant and tokenizer are for checkpoints")
        return _from_artefacts(open_artefacts(path), device, dtype, backend, fetcher)
    from ritocco.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path, variant=variant, tokenizer=tokenizer)
    if backend in SESSION_BACKENDS:
        return _from_artefacts(_exported(checkpoint), device, dtype, backend, fetcher)
    return _engine(checkpoint, device, dtype, backend, fetcher)


def model_path(model: str | Path | None) -> Path:
    """Where a model lies: the one named, else RITOCCO_MODEL, else the embedded one.

    Raises CheckpointError for an empty name.
    """
    if model is None:
        model = os.environ.get("RITOCCO_MODEL") or pocket_model()
    elif not str(model):
        raise CheckpointError("model is ''; it must name a folder or a .safetensors file")
    return Path(model)


def from_diffusers(
    pipe: Any, *, device: str | None = None, dtype: str | None = None, fetcher: Fetcher | None = None
) -> Engine:
    """An engine from a diffusers `StableDiffusionInpaintPipeline` in memory, sharing its tensors.

    device, dtype: None takes those of the pipeline's UNet; tensors that have them are not copied. fetcher: as
    for `load`.
    Raises CheckpointError where the pipeline is not one for inpainting, and BackendError.
    """
    from ritocco.checkpoint import from_diffusers as checkpoint_of

    checkpoint = checkpoint_of(pipe)
    weight = next(pipe.unet.parameters())
    return _engine(
        checkpoint,
        device or str(weight.device),
        dtype or str(weight.dtype).removeprefix("torch."),
        "torch",
        fetcher,
    )


def pocket_model() -> Path:
    """Folder of the embedded model."""
    return Path(str(files("ritocco"))) / "models" / "pocket"


def _engine(checkpoint: Checkpoint, device: str, dtype: str, backend: str, fetcher: Fetcher | None) -> Engine:
    from ritocco.backends.torch_ import TorchRuntime
    from ritocco.checkpoint import fingerprint, load_tokenizer
    from ritocco.device import choose
    from ritocco.scheduler_config import check_scheduler, from_pipeline

    choice = choose(device, dtype, backend)
    # An operator's mistake shows here, not in the first request that holds a URL.
    fetcher = fetcher or Fetcher.from_environment()
    scheduler = from_pipeline(checkpoint.scheduler)
    warnings = [f"Warning: {problem}" for problem in check_scheduler(scheduler)]
    safety = None
    # The tokenizer's tables are read while torch converts weights, which needs no Python.
    with ThreadPoolExecutor(1, thread_name_prefix="ritocco-tokenizer") as pool:
        tokenizer = pool.submit(load_tokenizer, checkpoint)
        runtime = TorchRuntime(checkpoint, device=choice.device, dtype=choice.dtype)
        if checkpoint.safety_checker is not None:
            safety = SafetyChecker.load(checkpoint, device=choice.device, dtype=choice.dtype)
    return Engine(
        runtime,
        tokenizer.result(),
        scheduler,
        safety=safety,
        version=fingerprint(checkpoint),
        notes=(*checkpoint.notes, *warnings, f"Running {'; '.join(choice.reasons)}"),
        fetcher=fetcher,
    )


def _from_artefacts(
    artefacts: Artefacts, device: str, dtype: str, backend: str, fetcher: Fetcher | None
) -> Engine:
    """An engine on exported graphs; imports no torch."""
    from ritocco.backends import open_sessions
    from ritocco.prompt import Tokenizer
    from ritocco.scheduler_config import check_scheduler, from_pipeline

    fetcher = fetcher or Fetcher.from_environment()
    scheduler = from_pipeline(artefacts.scheduler)
    warnings = [f"Warning: {problem}" for problem in check_scheduler(scheduler)]
    runtime, reasons = open_sessions(artefacts, backend=backend, device=device, dtype=dtype)
    return Engine(
        runtime,
        Tokenizer.from_folder(artefacts.path / "tokenizer"),
        scheduler,
        version=artefacts.version,
        notes=(
            *warnings,
            f"{artefacts.path.name}: exported graphs carry no safety checker, so none is run",
            f"Running {'; '.join(reasons)}",
        ),
        fetcher=fetcher,
    )


def _exported(checkpoint: Checkpoint) -> Artefacts:
    """The checkpoint's graphs from the cache, exported into it where they are not there.

    Raises BackendError where the cache can't be written.
    """
    from ritocco.checkpoint import fingerprint
    from ritocco.plugins import exporter

    version = fingerprint(checkpoint)
    folder = cache_root() / "graphs" / version[:32]
    with _export_lock:
        try:
            return open_artefacts(folder, version=version)
        except CheckpointError:
            pass
        try:
            exporter().export(checkpoint, folder, dtype="float32")
        except OSError as error:
            raise BackendError(
                f"{cache_root()}: the graphs can't be kept there ({error}). Set RITOCCO_CACHE to another "
                "folder, or export with `ritocco export --out` and name that folder as the model"
            ) from error
        return open_artefacts(folder, version=version)


_export_lock = threading.Lock()
_default: Engine | None = None
_default_lock = threading.Lock()


def predict(input: Mapping[str, Any] | PredictionInput, **options: Any) -> Prediction:
    """`Engine.predict` on one lazily made engine: the checkpoint in RITOCCO_MODEL, else the pocket model."""
    global _default
    with _default_lock:
        if _default is None:
            _default = load()
    return _default.predict(input, **options)
