"""What a request asks of exported graphs, and what each of them then takes in one allocation.

No torch here: what is exported is planned without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ritocco.artefacts import Artefacts
from ritocco.backends.runtime import LatentSize, Traits
from ritocco.backends.sessions import ranges_at
from ritocco.nets.io import GraphName, Range
from ritocco.request import check_size
from ritocco.scheduler_config import from_pipeline
from ritocco.schedules import build
from ritocco.schema import PredictionInput

Sizes = Mapping[str, int]
"""Of every symbol of a graph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPlan:
    """One graph at one size; bytes.

    sizes: of its symbols, see `nets.io`. dtype: of its first output. weights: as they lie in the file, and
    what follows from them and from the sizes alone. arena: one allocation for everything between inputs and
    outputs. lower_bound: the most of it that is needed at once, in the order of the graph's nodes: no arena
    can be smaller. inputs, outputs: the caller's, beside the arena. moment: the node, its operator first, at
    which the lower bound is needed.
    """

    sizes: Sizes
    dtype: str
    weights: int
    arena: int
    lower_bound: int
    inputs: int
    outputs: int
    moment: str


def asked_of(artefacts: Artefacts, fields: PredictionInput) -> dict[GraphName, Sizes]:
    """The sizes of the largest call that a request makes of each graph, see `backends.sessions`: all pictures
    side by side in the UNet, one at a time in the autoencoder.

    Raises RequestError for a size that the graphs don't take.
    """
    sides = artefacts.sizes
    traits = Traits(
        device="cpu",
        dtype="float32",
        lane_timesteps=artefacts.layout == "ritocco",
        size_multiple=artefacts.unet.size_multiple,
        heights=(sides["H"][0], sides["H"][2]),
        widths=(sides["W"][0], sides["W"][2]),
    )
    check_size(fields, traits)
    cells = {"H": fields.height // 8, "W": fields.width // 8}
    prompts = 2 if fields.guidance_scale > 1 else 1
    found: dict[GraphName, Sizes] = {}
    for name, io in artefacts.contract.items():
        ranges = io.ranges
        if name == "text_encoder":
            found[name] = {"N": _rows(prompts, ranges["N"])}
        elif name == "unet":
            found[name] = {"M": _rows(prompts * fields.num_outputs, ranges["M"]), **cells}
        elif name == "unet_once":
            table = build(fields.scheduler, fields.num_inference_steps, from_pipeline(artefacts.scheduler))
            steps = _rows(len(table.timesteps), ranges["R"])
            found[name] = {"R": steps, "M": _rows(prompts, ranges["M"]), **cells}
        elif name == "unet_step":
            size = LatentSize(height=cells["H"], width=cells["W"])
            ranges = ranges_at(size, artefacts.profiles("unet_step"), io)
            lanes = max(1, min(fields.num_outputs, ranges["N"][2], ranges["M"][2] // prompts))
            found[name] = {"N": _rows(lanes, ranges["N"]), "M": _rows(prompts * lanes, ranges["M"]), **cells}
        else:
            found[name] = {"N": _rows(1, ranges["N"]), **cells}
    return found


def _rows(count: int, taken: Range) -> int:
    """Of the largest call: more than a graph takes go in parts, fewer are filled up."""
    return max(taken[0], min(count, taken[2]))
