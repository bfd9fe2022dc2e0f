"""`ritocco plan`: what a request will take, said before anything is loaded, and held against a run."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ritocco.artefacts import is_artefacts
from ritocco.checkpoint import open_checkpoint
from ritocco.device import choose, refuse_unplanned
from ritocco.errors import RequestError
from ritocco.memory import Rehearsal
from ritocco.plans import MemoryPlan, Planner, asked_without_pictures, mib, parse_budget
from ritocco.schema import PredictionInput
from ritocco.shown import shown

NOT_COUNTED = (
    "Not counted: Python and its libraries, pictures on the host, a safety checker, and what the C library "
    "keeps of freed memory."
)
_BEGINS = {
    "follow": "load",
    "encode_text": "text",
    "encode_pixels": "encode",
    "open": "denoise",
    "decode_pixels": "decode",
}


def planned(
    model: Path,
    given: Mapping[str, Any],
    *,
    dtype: str,
    variant: str | None,
    tokenizer: Path | None,
    device: str = "cpu",
    budget: int | str | None = None,
) -> tuple[PredictionInput, MemoryPlan]:
    """The request's inputs, and what it takes on the torch runtime.

    given: inputs of the schema but picture and mask. device: `cpu`, or `cuda`, of which this machine need not
    have one. Raises RequestError for bad ones and for exported graphs, CheckpointError, BackendError.
    """
    fields = asked_without_pictures(given)
    if device not in ("cpu", "cuda"):
        raise RequestError(f"--device is {shown(device)}; it must be cpu or cuda", field="--device")
    kept = None if budget is None else parse_budget(budget)
    if is_artefacts(model):
        rule = "plans are of checkpoints so far"
        raise RequestError(f"--model is {shown(str(model))}, exported graphs; {rule}", field="--model")
    checkpoint = open_checkpoint(model, variant=variant, tokenizer=tokenizer)
    if device == "cuda":
        held = getattr(torch, "float16" if dtype == "auto" else dtype)
    else:
        held = choose("cpu", dtype).dtype
    refuse_unplanned(torch.device(device), held)
    planner = Planner(
        lambda: Rehearsal(checkpoint, dtype=held, device=device, movable=kept is not None),
        device=device,
        dtype=str(held).removeprefix("torch."),
        budget=kept,
    )
    return fields, planner.plan(fields)


def measured(model: Path, fields: PredictionInput, *, dtype: str, **where: Any) -> dict[str, int]:
    """Most bytes that torch's allocator held in each phase on the CPU, by running the whole request.

    where: variant, tokenizer and memory_budget, as for `load`.
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
    def heard(*arguments: Any, **options: Any) -> Any:
        tracker.begin(phase)
        return original(*arguments, **options)

    return heard


def as_json(plan: MemoryPlan, taken: Mapping[str, int] | None) -> dict[str, Any]:
    """For programs; bytes. taken: of `measured`, where it was run."""
    found, (phase, peak) = plan.usage, plan.usage.peak
    return {
        "device": plan.device,
        "backend": "torch",
        "dtype": plan.dtype,
        "width": plan.width,
        "height": plan.height,
        "num_outputs": plan.num_outputs,
        "budget_bytes": plan.budget,
        "strategy": {"at_once": plan.strategy.at_once, "alone": plan.strategy.alone},
        "read_again_bytes": plan.read_again,
        "next_larger_budget": None
        if plan.more is None
        else {"bytes": plan.more[0], "at_once": plan.more[1].at_once, "alone": plan.more[1].alone},
        "weights": dict(found.weights),
        "phases": {
            name: {"bytes": one.most, "moment": one.moment}
            | ({} if taken is None else {"measured_bytes": taken[name]})
            for name, one in found.phases.items()
        },
        "peak_bytes": peak.most,
        "peak_phase": phase,
    }


def as_text(plan: MemoryPlan, taken: Mapping[str, int] | None) -> str:
    """For people."""
    count, found = plan.num_outputs, plan.usage
    what = f"{count} picture{'s' if count > 1 else ''} of {plan.width} x {plan.height}"
    weights = ", ".join(f"{name} {mib(size)}" for name, size in found.weights.items())
    heads = ("phase", "most at once", *(["measured"] if taken is not None else []), "in")
    rows = [
        (name, mib(one.most), *([mib(taken[name])] if taken is not None else []), one.moment)
        for name, one in found.phases.items()
    ]
    table = [
        "  ".join([row[0].ljust(8), *(cell.rjust(14) for cell in row[1:-1]), row[-1]])
        for row in (heads, *rows)
    ]
    lines = [f"{what} on torch, {plan.device}, {plan.dtype}", f"weights: {weights}", "", *table]
    phase, peak = found.peak
    lines += ["", f"peak: {mib(peak.most)}, {phase}, in {peak.moment}"]
    if plan.budget is not None:
        lines.append(f"budget: {mib(plan.budget)}; {plan.strategy}")
        if plan.read_again:
            lines.append(f"cost: {mib(plan.read_again)} of weights are read anew for every request")
        if plan.more is not None:
            lines.append(f"from {mib(plan.more[0])} on: {plan.more[1]}")
        lines.append(f"below {mib(plan.least)}: fewer at once, fewer in memory, or nothing")
    return "\n".join([*lines, NOT_COUNTED])
