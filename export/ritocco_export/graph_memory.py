"""The plan of one exported graph at one size: its liveness, and the arena of it."""

from __future__ import annotations

from pathlib import Path

import onnx

from ritocco.errors import CheckpointError
from ritocco.graph_plan import GraphPlan, Sizes
from ritocco.nets.io import NetworkIO
from ritocco_export.arena import allocate
from ritocco_export.liveness import input_ranks, liveness, read_graph


def graph_plan(file: Path, io: NetworkIO, sizes: Sizes) -> GraphPlan:
    """What a graph takes at the sizes of its contract's symbols; bytes.

    Raises CheckpointError, with the file's name, where it can't be told.
    """
    model = read_graph(file)
    ranks = input_ranks(model)
    shapes = {}
    for port in io.inputs:
        shape = port.resolve(sizes)
        # Optimum's timestep stands in brackets in its older exports.
        shapes[port.name] = shape or (1,) * ranks.get(port.name, 0)
    try:
        found = liveness(model, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    arena = allocate(found.tensors)
    dtype = found.dtypes[model.graph.output[0].name]
    return GraphPlan(
        sizes=sizes,
        dtype=onnx.helper.tensor_dtype_to_np_dtype(dtype).name,
        weights=found.weights + sum(found.constants.values()),
        arena=arena.size,
        lower_bound=arena.lower_bound,
        inputs=sum(found.inputs.values()),
        outputs=sum(found.outputs.values()),
        moment=found.steps[arena.busiest] if found.tensors else "nothing between inputs and outputs",
    )
