"""The parity gate: a graph's outputs beside torch's, before anybody may use it.

The truth is torch in float32 on weights rounded to the graph's dtype. float16 graphs are run on a CPU, where
ONNX Runtime computes them in float32: their structure and their weights are gated, their float16 arithmetic
is not. bfloat16 graphs likewise, by OpenVINO, as ONNX Runtime's CPU does not run them; without OpenVINO they
are checked for validity only.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ritocco.artefacts import GRAPH_FILE
from ritocco.checkpoint import Checkpoint
from ritocco.errors import CheckpointError
from ritocco.nets.io import HOISTED, Contract, GraphName, Layout, NetworkIO
from ritocco_export.figures import LARGEST_ERROR, LEAST_PSNR_DB, Figures
from ritocco_export.frugal import can_run, open_session, widen
from ritocco_export.graphs import example_inputs, graph_module


def compare(
    checkpoint: Checkpoint, graph: GraphName, file: Path, io: NetworkIO, *, layout: Layout, static: bool
) -> Figures:
    """Run a graph and torch on the same inputs at two sizes. Raises CheckpointError where they disagree."""
    dtype = io.outputs[0].dtype
    if not can_run(dtype):
        return Figures.not_run()
    cases = [example_inputs(io, sizes, seed=seed) for seed, sizes in enumerate(_sizes(io, static=static))]
    wanted = _truth(checkpoint, graph, dtype, layout, cases)
    session = open_session(file, graph, dtype)
    pairs: list[tuple[Any, Any]] = []
    for inputs, outputs in zip(cases, wanted, strict=True):
        pairs += zip(session.run_all(_feeds(io, inputs)).values(), outputs, strict=True)
    return _judge(graph, dtype, pairs)


def compare_hoisted(checkpoint: Checkpoint, folder: Path, contract: Contract, *, static: bool) -> Figures:
    """Run `unet_step` on what `unet_once` gives, beside torch's whole UNet.

    Two prompts, one lane, a table of which the step takes any row: what a guided picture asks for. Raises
    CheckpointError where they disagree.
    """
    once, step = contract["unet_once"], contract["unet_step"]
    dtype = step.outputs[0].dtype
    if not can_run(dtype):
        return Figures.not_run()
    cases, plain = [], []
    for seed, sizes in enumerate(_sizes(once, static=static)):
        timesteps, context, condition = example_inputs(once, sizes, seed=seed)
        latents = example_inputs(step, {**sizes, "N": 1, "M": 1}, seed=seed)[0]
        sample = torch.cat([latents, condition], dim=1).repeat(len(context), 1, 1, 1)
        cases.append((timesteps, context, condition, latents))
        plain.append([sample, timesteps[-1:].repeat(len(context)), context])
    wanted = _truth(checkpoint, "unet", dtype, "ritocco", plain)
    first, second = (
        open_session(folder / graph / GRAPH_FILE, graph, dtype) for graph in ("unet_once", "unet_step")
    )
    pairs: list[tuple[Any, Any]] = []
    for (timesteps, context, condition, latents), (whole,) in zip(cases, wanted, strict=True):
        kept = dict(first.run_all(_feeds(once, (timesteps, context, condition))))
        kept["time"] = kept["time"][-1:]
        # Sizes of the step that the lane has to be filled up to.
        lanes, rows = step.ranges["N"][0], max(step.ranges["M"][0], len(context))
        index = np.minimum(np.arange(rows), len(context) - 1)
        feeds = {name: value.repeat(lanes, 0) for name, value in kept.items() if name in HOISTED}
        feeds |= {name: value[index] for name, value in kept.items() if name not in HOISTED}
        feeds |= {"latents": _array(latents.repeat(lanes, 1, 1, 1)), "rows": np.zeros(rows, np.int32)}
        found = second.run(feeds)
        pairs.append((found[: len(context)], whole))
    return _judge("unet_step on unet_once", dtype, pairs)


def _truth(
    checkpoint: Checkpoint,
    graph: GraphName,
    dtype: str,
    layout: Layout,
    cases: Sequence[Sequence[torch.Tensor]],
) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """What torch gives for each case; the network is gone afterwards."""
    rounded = widen(graph_module(checkpoint, graph, dtype=getattr(torch, dtype), layout=layout))
    with torch.inference_mode():
        found = [rounded(*_wide(inputs)) for inputs in cases]
    del rounded
    gc.collect()
    return [tuple(o.numpy() for o in (one if isinstance(one, tuple) else (one,))) for one in found]


def _feeds(io: NetworkIO, inputs: Sequence[torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {port.name: _array(value) for port, value in zip(io.inputs, inputs, strict=True)}


def _array(value: torch.Tensor) -> np.ndarray[Any, Any]:
    """NumPy has no bfloat16; sessions take float32 for it."""
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _wide(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [value.float() if value.is_floating_point() else value for value in inputs]


def _judge(graph: str, dtype: str, pairs: Sequence[tuple[Any, Any]]) -> Figures:
    """The worst of all pairs, found and wanted. Raises CheckpointError where it is past what is allowed."""
    measured = [difference(found.astype(np.float64), wanted.astype(np.float64)) for found, wanted in pairs]
    worst, least = max(error for error, _ in measured), min(psnr for _, psnr in measured)
    figures = Figures(error=worst, psnr_db=least, arithmetic="float32")
    if not (worst <= LARGEST_ERROR[dtype] and least >= LEAST_PSNR_DB[dtype]):
        allowed = f"{LARGEST_ERROR[dtype]:.0e} and {LEAST_PSNR_DB[dtype]:.0f} dB"
        raise CheckpointError(
            f"{graph}: the {dtype} graph departs from torch by {worst:.1e} ({least:.1f} dB), where {allowed} "
            "are allowed"
        )
    return figures


def difference(
    found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], *, peak: float | None = None
) -> tuple[float, float]:
    """Largest error over `peak`, and PSNR over it. Infinite error where anything of either is not finite.

    peak: None takes the largest value wanted.
    """
    if found.shape != wanted.shape or not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return math.inf, -math.inf
    peak = peak or max(float(np.abs(wanted).max()), 1e-30)
    error = np.abs(found - wanted)
    mean = float(np.square(error / peak).mean())
    return float(error.max()) / peak, (math.inf if mean == 0 else -10 * math.log10(mean))


def _sizes(io: NetworkIO, *, static: bool) -> list[dict[str, int]]:
    """The smallest size, and another one in which all symbols differ from it where the ranges allow that."""
    if static:
        return [{symbol: best for symbol, (_, best, _) in io.ranges.items()}]
    small = {symbol: least for symbol, (least, _, _) in io.ranges.items()}
    other = {}
    for position, (symbol, (least, _, most)) in enumerate(io.ranges.items()):
        multiple = io.multiples.get(symbol, 1)
        other[symbol] = min(most, least + (1 + position) * max(multiple, 8 if symbol in "HW" else 1))
    return [small, other]
