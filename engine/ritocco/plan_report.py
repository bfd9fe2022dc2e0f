"""`ritocco plan`: what a request will take, said before anything is loaded, and held against a run."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ritocco.artefacts import is_artefacts
from ritocco.checkpoint import open_checkpoint
from ritocco.device import choose, onednn_bfloat16
from ritocco.errors import BackendError, RequestError
from ritocco.memory import Usage, usage
from ritocco.schema import PredictionInput, parse_input
from ritocco.shown import shown

NOT_COUNTED = (
    "Not counted: Python and its libraries, pictures on the host, a safety checker, and what the C library "
    "keeps of freed memory."
)
_BEGINS = {"encode_text": "text", "encode_pixels": "encode", "open": "denoise", "decode_pixels": "decode"}


def planned(
    model: Path, given: Mapping[str, Any], *, dtype: str, variant: str | None, tokenizer: Path | None
) -> tuple[PredictionInput, str, Usage]:
    """The request's inputs, the dtype it would run in, and what it takes on the torch runtime on a CPU.

    given: inputs of the schema but picture and mask. Raises RequestError for bad ones and for exported
    graphs, CheckpointError, BackendError.
    """
    grey = Image.fromarray(np.full((64, 64), 255, np.uint8))
    fields = parse_input({"image": grey, "mask": grey, **given}, allow_local=True)[0]
    if is_artefacts(model):
        rule = "plans are of checkpoints so far"
        raise RequestError(f"--model is {shown(str(model))}, exported graphs; {rule}", field="--model")
    checkpoint = open_checkpoint(model, variant=variant, tokenizer=tokenizer)
    held = choose("cpu", dtype).dtype
    if held == torch.bfloat16 and not onednn_bfloat16():
        rule = "plans of it are of processors on which oneDNN computes it (x86 with AVX-512, Arm with BF16)"
        raise BackendError(f"dtype is {shown(dtype)}; {rule}, and this is none: use float32")
    found = usage(
        checkpoint,
        dtype=held,
        height=fields.height,
        width=fields.width,
        num_outputs=fields.num_outputs,
        guided=fields.guidance_scale > 1,
        num_inference_steps=fields.num_inference_steps,
        scheduler=fields.scheduler,
    )
    return fields, str(held).removeprefix("torch."), found


def measured(model: Path, fields: PredictionInput, *, dtype: str, **where: Any) -> dict[str, int]:
    """Most bytes that torch's allocator held in each phase, by running the whole request.

    where: variant and tokenizer, as for `load`.
    """
    from ritocco.loading import load
    from ritocco.track import Tracker

    given = fields.model_dump(exclude={"image", "mask"})
    given |= {"image": fields.image, "mask": fields.mask, "disable_safety_checker": True, "seed": 0}
    gc.collect()  # what went away in the middle would be missing from a later phase
    with Tracker() as tracker:
        tracker.begin("load")
        with load(model, device="cpu", dtype=dtype, backend="torch", **where) as engine:
            runtime: Any = engine.runtime
            for method, phase in _BEGINS.items():
                setattr(runtime, method, _heard(tracker, phase, getattr(runtime, method)))
            engine.predict(given)
    return tracker.most


def _heard(tracker: Any, phase: str, original: Any) -> Any:
    def heard(*arguments: Any) -> Any:
        tracker.begin(phase)
        return original(*arguments)

    return heard


def as_json(
    fields: PredictionInput, dtype: str, found: Usage, taken: Mapping[str, int] | None
) -> dict[str, Any]:
    """For programs; bytes. taken: of `measured`, where it was run."""
    phase, peak = found.peak
    return {
        "device": "cpu",
        "backend": "torch",
        "dtype": dtype,
        "width": fields.width,
        "height": fields.height,
        "num_outputs": fields.num_outputs,
        "weights": dict(found.weights),
        "phases": {
            name: {"bytes": one.most, "moment": one.moment}
            | ({} if taken is None else {"measured_bytes": taken[name]})
            for name, one in found.phases.items()
        },
        "peak_bytes": peak.most,
        "peak_phase": phase,
    }


def as_text(fields: PredictionInput, dtype: str, found: Usage, taken: Mapping[str, int] | None) -> str:
    """For people."""
    count = fields.num_outputs
    what = f"{count} picture{'s' if count > 1 else ''} of {fields.width} x {fields.height}"
    weights = ", ".join(f"{name} {_mib(size)}" for name, size in found.weights.items())
    heads = ("phase", "most at once", *(["measured"] if taken is not None else []), "in")
    rows = [
        (name, _mib(one.most), *([_mib(taken[name])] if taken is not None else []), one.moment)
        for name, one in found.phases.items()
    ]
    table = [
        "  ".join([row[0].ljust(8), *(cell.rjust(14) for cell in row[1:-1]), row[-1]])
        for row in (heads, *rows)
    ]
    lines = [f"{what} on torch, cpu, {dtype}", f"weights: {weights}", "", *table]
    phase, peak = found.peak
    return "\n".join([*lines, "", f"peak: {_mib(peak.most)}, {phase}, in {peak.moment}", NOT_COUNTED])


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
