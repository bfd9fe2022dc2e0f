"""`ritocco plan`: what a request will take, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ritocco.artefacts import is_artefacts
from ritocco.byte_sizes import mib, mib_down, mib_up, parse_budget
from ritocco.checkpoint import open_checkpoint
from ritocco.device import choose, refuse_unplanned
from ritocco.errors import RequestError
from ritocco.high_water import RESERVE_BYTES
from ritocco.known import outline
from ritocco.memory import Rehearsal
from ritocco.plans import MemoryPlan, Planner, Strategy, asked_without_pictures
from ritocco.scheduler_config import from_pipeline
from ritocco.schema import PredictionInput
from ritocco.shown import shown

NOT_COUNTED = {
    "cpu": (
        "Not counted: Python and its libraries, pictures on the host, and what the C library keeps of freed "
        "memory."
    ),
    "cuda": (
        "Not counted: what CUDA graphs keep, workspaces of cuDNN and cuBLAS over 56 MiB, what the allocator "
        "rounds up\nand reserves, the device's context, and all that lies on the host."
    ),
}
"""By the device's type."""


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

    model: as for `load`, or one of `KNOWN`. given: inputs of the schema but picture and mask. device: `cpu`,
    or `cuda`, of which this machine need not have one. Raises RequestError for bad ones and for exported
    graphs, CheckpointError, BackendError.
    """
    fields = asked_without_pictures(given)
    if device not in ("cpu", "cuda"):
        raise RequestError(f"--device is {shown(device)}; it must be cpu or cuda", field="--device")
    kept = None if budget is None else parse_budget(budget, "--budget")
    if is_artefacts(model):
        rule = "exported graphs; see graph_report"
        raise RequestError(f"--model is {shown(str(model))}, {rule}", field="--model")
    checkpoint = (
        open_checkpoint(model, variant=variant, tokenizer=tokenizer)
        if model.exists()
        else outline(str(model))
    )
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
        name="--budget",
        schedule=from_pipeline(checkpoint.scheduler),
    )
    return fields, planner.explained(fields)


def as_json(
    plan: MemoryPlan, allocated: Mapping[str, int] | None = None, resident: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """For programs; bytes. allocated, resident: of `plan_verify`, where it was run."""
    found, (phase, peak) = plan.usage, plan.usage.peak
    return {
        "device": plan.device,
        "backend": "torch",
        "dtype": plan.dtype,
        "width": plan.width,
        "height": plan.height,
        "num_outputs": plan.num_outputs,
        "budget_bytes": plan.budget,
        "strategy": _strategy(plan.strategy),
        "calls_per_step": _calls(plan),
        "cuda_graphs": _graphs(plan),
        "read_again_bytes": plan.read_again,
        "read_again_seconds": plan.read_again_seconds,
        "next_larger_budget": None
        if plan.more is None
        else {"bytes": plan.more[0], **_strategy(plan.more[1])},
        "next_smaller_budget": None
        if plan.less is None
        else {"bytes": plan.less[0], **_strategy(plan.less[1])},
        "pictures_that_share_a_step": plan.together,
        "weights": dict(found.weights),
        "phases": {
            name: {"bytes": one.most, "moment": one.moment}
            | ({} if allocated is None else {"measured_bytes": allocated[name]})
            | ({} if resident is None else {"resident_bytes": resident[name]})
            for name, one in found.phases.items()
        },
        "peak_bytes": peak.most,
        "peak_phase": phase,
    } | ({} if resident is None else {"resident_reserve_bytes": RESERVE_BYTES[plan.dtype]})


def _strategy(one: Strategy) -> dict[str, Any]:
    return {"at_once": one.at_once, "leaving": list(one.leaving)}


def as_text(
    plan: MemoryPlan, allocated: Mapping[str, int] | None = None, resident: Mapping[str, int] | None = None
) -> str:
    """For people; see `as_json`."""
    count, found = plan.num_outputs, plan.usage
    what = f"{count} picture{'s' if count > 1 else ''} of {plan.width} x {plan.height}"
    weights = ", ".join(f"{name} {mib(size)}" for name, size in found.weights.items())
    columns = {"most at once": {name: mib_up(one.most) for name, one in found.phases.items()}}
    measured = {"allocated": allocated, "resident": resident}
    columns |= {
        head: {name: mib(size) for name, size in column.items()}
        for head, column in measured.items()
        if column is not None
    }
    rows = [("phase", *columns, "in")]
    rows += [
        (name, *(column[name] for column in columns.values()), one.moment)
        for name, one in found.phases.items()
    ]
    table = ["  ".join([row[0].ljust(8), *(cell.rjust(14) for cell in row[1:-1]), row[-1]]) for row in rows]
    lines = [f"{what} on torch, {plan.device}, {plan.dtype}", f"weights: {weights}", "", *table]
    phase, peak = found.peak
    lines += ["", f"peak: {mib_up(peak.most)}, {phase}, in {peak.moment}"]
    if resident is not None:
        expected = f"{mib(RESERVE_BYTES[plan.dtype])} beyond the allocator's are expected, which is no bound"
        lines.append(f"resident: {expected}")
    if plan.budget is not None:
        lines.append(f"budget: {mib_down(plan.budget)}; {plan.strategy}")
        if (calls := _calls(plan)) > 1:
            lines.append(f"cost: a step is {calls} calls of the UNet instead of one")
        if plan.read_again:
            lines.append(
                f"cost: {mib(plan.read_again)} of weights are read anew for every request, {_time(plan)}"
            )
        if plan.more is not None:
            lines.append(f"from {mib_up(plan.more[0])} on: {plan.more[1]}")
        lines.append(f"below {mib_up(plan.least)}: {_below(plan.less)}")
        if plan.together is not None:
            shared = f"a step of up to {plan.together} pictures" if plan.together > count else "no step"
            lines.append(f"in a Batcher it shares {shared} with others of its size")
    if (graphs := _graphs(plan)) is not None:
        lines.append(f"CUDA graphs: {'on' if graphs else 'off, as under every budget'}")
    return "\n".join([*lines, NOT_COUNTED[plan.device.partition(":")[0]]])


def _calls(plan: MemoryPlan) -> int:
    """Of the UNet, for one step of all pictures."""
    return -(-plan.num_outputs // plan.strategy.at_once)


def _graphs(plan: MemoryPlan) -> bool | None:
    """Whether steps are captured; None where there is no such thing."""
    return None if plan.device == "cpu" else plan.budget is None


def _time(plan: MemoryPlan) -> str:
    if plan.read_again_seconds is None:
        return "which an engine times when they come first"
    return f"which took {plan.read_again_seconds:,.1f} s when they came last"


def _below(less: tuple[int, Strategy] | None) -> str:
    return "nothing fits" if less is None else f"{less[1]}, down to {mib_up(less[0])}"
