"""`ritocco plan` of exported graphs: what each takes in one allocation, before anything is opened to run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ritocco import plugins
from ritocco.artefacts import open_artefacts
from ritocco.byte_sizes import mib
from ritocco.errors import RequestError
from ritocco.graph_plan import GraphPlan, asked_of
from ritocco.nets.io import GraphName
from ritocco.plans import asked_without_pictures
from ritocco.schema import PredictionInput
from ritocco.shown import shown

NOT_FORETOLD = (
    "This is for a runtime that knows the sizes beforehand and keeps to the arena, node by node. ONNX\n"
    "Runtime and OpenVINO plan by themselves: what they fuse takes less; what they compute convolutions\n"
    "in, and copies of weights in another layout, more."
)

Plans = Mapping[GraphName, GraphPlan]


def planned_graphs(
    model: Path, given: Mapping[str, Any], *, dtype: str = "auto", **idle: object
) -> tuple[PredictionInput, Plans]:
    """The request's inputs, and what each takes in the largest call that the request makes of it.

    given: inputs of the schema but picture and mask. dtype: `auto`, or that of the graphs. idle: options of
    the command that graphs don't have, by their names on it; whatever is not None or false is refused.
    Raises RequestError, and CheckpointError for a damaged folder and for graphs of which no plan can be made;
    BackendError where no exporter is installed.
    """
    for option, value in idle.items():
        if value is not None and value is not False:
            flag = f"--{option}"
            rule = "is for checkpoints on torch"
            raise RequestError(f"--model is {shown(str(model))}, exported graphs; {flag} {rule}", field=flag)
    fields = asked_without_pictures(given)
    artefacts = open_artefacts(model)
    plans = plugins.exporter().arenas(artefacts, asked_of(artefacts, fields))
    held = dtype_of(plans)
    if dtype not in ("auto", held):
        raise RequestError(f"--dtype is {dtype}; these graphs are {held}", field="--dtype")
    return fields, plans


def dtype_of(plans: Plans) -> str:
    """That of the decoder, and so of all graphs of an export."""
    return plans["vae_decoder"].dtype


def graphs_as_json(fields: PredictionInput, plans: Plans) -> dict[str, Any]:
    """For programs; bytes."""
    return {
        "backend": "graphs",
        "dtype": dtype_of(plans),
        "width": fields.width,
        "height": fields.height,
        "num_outputs": fields.num_outputs,
        "graphs": {
            name: {
                "sizes": dict(one.sizes),
                "weights_bytes": one.weights,
                "arena_bytes": one.arena,
                "lower_bound_bytes": one.lower_bound,
                "inputs_bytes": one.inputs,
                "outputs_bytes": one.outputs,
                "moment": one.moment,
            }
            for name, one in plans.items()
        },
        "weights_bytes": _weights(plans),
        "largest_arena_bytes": _largest(plans)[1].arena,
    }


def graphs_as_text(fields: PredictionInput, plans: Plans) -> str:
    """For people."""
    count = fields.num_outputs
    what = f"{count} picture{'s' if count > 1 else ''} of {fields.width} x {fields.height}"
    heads = ("graph", "sizes", "weights", "arena", "at least", "in and out", "most in")
    rows = [
        (
            name,
            " ".join(f"{symbol}={size}" for symbol, size in one.sizes.items()),
            mib(one.weights),
            mib(one.arena),
            mib(one.lower_bound),
            mib(one.inputs + one.outputs),
            one.moment,
        )
        for name, one in plans.items()
    ]
    table = [
        "  ".join([row[0].ljust(12), row[1].ljust(22), *(cell.rjust(12) for cell in row[2:-1]), row[-1]])
        for row in (heads, *rows)
    ]
    name, largest = _largest(plans)
    total = f"weights: {mib(_weights(plans))}; the largest arena, which serves all graphs in turn: "
    return "\n".join(
        [
            f"{what} on exported graphs, {dtype_of(plans)}",
            "",
            *table,
            "",
            f"{total}{mib(largest.arena)}, {name}",
            NOT_FORETOLD,
        ]
    )


def _weights(plans: Plans) -> int:
    return sum(one.weights for one in plans.values())


def _largest(plans: Plans) -> tuple[GraphName, GraphPlan]:
    return max(plans.items(), key=lambda item: item[1].arena)
