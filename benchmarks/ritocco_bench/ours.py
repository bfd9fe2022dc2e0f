"""ritocco, as one of the variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ritocco_bench.asked import GUIDANCE, PHASES, PROMPT, SCHEDULER, Inputs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ritocco_bench.peaks import Peaks
    from ritocco_bench.worker import Job


# Method of the runtime -> the phase that begins with it.
_BEGINS = {"encode_text": "text", "encode_pixels": "encode", "open": "denoise", "decode_pixels": "decode"}


class Ritocco:
    """As `ritocco.load` has it."""

    def __init__(self, job: Job) -> None:
        import ritocco

        self._job = job
        self._engine = ritocco.load(job.model, device=job.device, dtype=job.dtype, backend=job.backend)
        self.decoded: npt.NDArray[np.float32] | None = None
        self.pictures: npt.NDArray[np.uint8] | None = None
        self.peaks: Peaks | None = None
        self._latents: Any = None
        for method, phase in _BEGINS.items():
            self._listen(method, phase)

    def run(self, steps: int, on_step: Callable[[], None], scheduler: str = SCHEDULER) -> dict[str, float]:
        import numpy as np

        given = Inputs(self._job)
        request = {"image": given.image, "mask": given.mask, "prompt": PROMPT, "scheduler": scheduler}
        request |= {"width": self._job.size, "height": self._job.size, "guidance_scale": GUIDANCE}
        request |= {"num_outputs": self._job.outputs, "num_inference_steps": steps, "seed": self._job.seed}
        request |= {"disable_safety_checker": True}
        made = self._engine.predict(
            request, latents=given.latents, paste_back=False, on_step=lambda done, total: on_step()
        )
        if self.peaks is not None:
            self.peaks.end()
        if self._job.painted:
            self.decoded = self._engine.runtime.decode(self._latents)
            self.pictures = np.stack([np.asarray(picture) for picture in made.images])
        png = made.metrics["outputs"]
        return {
            **{phase: made.metrics[phase] for phase in PHASES},
            "png": png,
            "whole": made.metrics["predict_time"] - png,
        }

    def _listen(self, method: str, phase: str) -> None:
        """Hear of each call of the runtime's method, with which a phase begins."""
        runtime: Any = self._engine.runtime
        original = getattr(runtime, method)

        def heard(*arguments: Any) -> Any:
            if phase == "decode":
                self._latents = arguments[0]
            if self.peaks is not None:
                self.peaks.begin(phase)
            return original(*arguments)

        setattr(runtime, method, heard)
