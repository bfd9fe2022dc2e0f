"""The engine: a checkpoint on a device, and `predict`, which takes a request through every stage.

Read this file first. Each stage is a function of `stages.py`; what does not depend on the noisy latents
happens before the loop, once for all outputs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ritocco import stages
from ritocco.backends.host_memory import give_back_freed_memory
from ritocco.backends.host_threads import let_go_of_workers
from ritocco.backends.runtime import Floats, Lane, Runtime
from ritocco.byte_sizes import mib_down, mib_up
from ritocco.denoise import denoise
from ritocco.device import give_back_memory, held_memory, responds
from ritocco.errors import BackendError
from ritocco.fetch import Fetcher
from ritocco.pixels import Pixels
from ritocco.plans import asked_without_pictures
from ritocco.prediction import MODEL, Prediction
from ritocco.progress import Log
from ritocco.request import Request, prepare
from ritocco.safety import SafetyChecker
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
        let_go_of_workers()  # of what was computed while loading

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
        job = self.check(
            input,
            output_format=output_format,
            mask_feather=mask_feather,
            paste_back=paste_back,
            strength=strength,
            latents=latents,
            allow_local=allow_local,
        )
        job.prediction.status, job.prediction.started_at = "processing", job.prediction.created_at
        try:
            with self.on_device(job.request.fields):
                pixels = self._painted(job, on_step)
            if pixels is None:
                stages.conclude(job, "canceled")
            else:
                with job.request.timed("outputs"):
                    status = stages.publish(job, *self._judged(job.request, pixels))
                stages.conclude(job, status)
        finally:
            let_go_of_workers()
        return job.prediction

    def check(
        self,
        input: Mapping[str, Any] | PredictionInput,
        *,
        output_format: str | None = None,
        mask_feather: float | None = None,
        paste_back: bool | None = None,
        strength: float | None = None,
        latents: npt.NDArray[np.floating[Any]] | None = None,
        allow_local: bool = True,
    ) -> stages.Job:
        """Everything that needs no network, for `predict`, whose arguments these are, and for a batcher.

        Raises what `predict` raises before anything is computed.
        """
        self.refuse_closed()
        if isinstance(input, PredictionInput):
            # Not `model_dump`, which writes pictures as their names.
            input = {name: getattr(input, name) for name in input.model_fields_set}
        prediction = Prediction(model=MODEL, version=self.version)
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
            log.note(f"Memory: {plan.strategy}, at most {mib_up(plan.least)} of {mib_down(planner.budget)}")
        return stages.Job(prediction, request, begun)

    def plan(self, **input: Any) -> MemoryPlan:
        """What a request will take, and how it will be computed; nothing is loaded or computed.

        input: fields of `PredictionInput`; picture and mask may be left out. The first plan of a size takes
        seconds, later ones almost nothing. Raises RequestError for bad fields and where `memory_budget` does
        not hold the request, and BackendError where the engine runs exported graphs; `ritocco plan` tells
        what those take.
        """
        planner = self._planner
        self.refuse_closed()
        if planner is None:
            raise BackendError("this engine has no plans: they are of checkpoints on torch")
        return planner.explained(asked_without_pictures(input))

    def close(self) -> None:
        """Let go of the networks' memory. Waits for a running prediction; later ones raise BackendError."""
        with self.holding():
            self._closed = True
            self.__dict__.pop("runtime", None)
            self._safety = self._planner = None
            give_back_freed_memory()
            give_back_memory(self.traits.device)

    @contextmanager
    def on_device(self, *requests: PredictionInput) -> Iterator[Runtime]:
        """The runtime, for this thread alone, ready for a request, or for several that share their steps.

        Raises BackendError where the engine is closed, or where this thread has the device already.
        """
        with self.holding():
            self.refuse_closed()
            if self._planner is not None:
                self._planner.follow(*requests)
            yield self.runtime

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def responds(self) -> bool:
        """Whether its device still computes; see `device.responds`. Waits for a running prediction."""
        if self._holder == threading.get_ident():
            return responds(self.traits.device)
        with self.holding():
            return responds(self.traits.device)

    @property
    def budgeted(self) -> bool:
        """Whether requests have to keep to a budget of memory."""
        return self._planner is not None and self._planner.budget is not None

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes: `budget`, where requests keep to one, and of a CUDA device what `held_memory` tells."""
        planner = self._planner
        budget = None if planner is None else planner.budget
        return held_memory(self.traits.device) | ({} if budget is None else {"budget": budget})

    def together(self, fields: PredictionInput, capacity: int) -> int:
        """How many lanes may share a step with those of a request; see `Planner.together`."""
        planner = self._planner
        return capacity if planner is None else planner.together(fields, capacity)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """The device is this thread's, closed or not. Raises BackendError instead of waiting for itself."""
        if self._holder == threading.get_ident():
            raise BackendError("on_step called the engine that is painting; return False to cancel instead")
        with self._device:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def refuse_closed(self) -> None:
        """Raises BackendError where `close` was called."""
        if self._closed:
            raise BackendError("this engine is closed; load another")

    def _repr_html_(self) -> str:
        from ritocco.notebook import engine_html

        runs = {"closed": True} if self._closed else {"runtime": type(self.runtime).__name__}
        told = {"device": self.traits.device, "dtype": self.traits.dtype, "version": self.version}
        return engine_html(told | runs)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _painted(self, job: stages.Job, on_step: OnStep | None) -> Pixels | None:
        """Text, condition, loop, decode: uint8 [N,H,W,3], or None where `on_step` cancelled."""
        request = job.request
        lanes = stages.lanes(self.runtime, request)
        with request.timed("denoise"):
            latents = self._loop(job, lanes, on_step)
        return None if latents is None else stages.decoded(self.runtime, request, latents)

    def _loop(self, job: stages.Job, lanes: Sequence[Lane], on_step: OnStep | None) -> list[Floats] | None:
        log, total = job.request.log, len(job.request.table)
        run = denoise(self.runtime.open(job.size, len(lanes)), lanes)
        log.start()
        while True:
            try:
                done = next(run)
            except StopIteration as end:
                return [state.latents for state in end.value]
            log.progress(done, total)
            if on_step is not None and on_step(done, total) is False:
                run.close()
                log.note(f"Canceled after {done} of {total} steps")
                return None

    def _judged(self, request: Request, pixels: Pixels) -> tuple[Pixels, list[int]]:
        """The pictures with their seams, and the indices of those that may be shown."""
        pixels = stages.seamed(request, pixels)
        if request.safety is None:
            return pixels, stages.allowed(request, pixels)
        with self.holding():
            return pixels, stages.allowed(request, pixels)


def _listed(keys: Sequence[str]) -> str:
    """Somebody's keys for the log: plain, on one line, not endless."""
    shown = [plain(key, 40) for key in sorted(keys)]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")
