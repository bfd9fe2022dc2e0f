"""Lanes of seeded random contents, and their way to the end, for the tests of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ritocco.backends.runtime import Lane, LaneState, LatentSize
from ritocco.backends.sessions import SessionRuntime
from ritocco.noise import normal
from ritocco.schedules import build

CONFIG: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def random_lane(
    scheduler: str,
    steps: int,
    seed: int,
    guidance: float = 1.0,
    *,
    cells: tuple[int, int],
    width: int,
    config: Mapping[str, Any] = CONFIG,
    strength: float = 1.0,
    **changes: Any,
) -> Lane:
    """cells: latent height and width. width: of the context. changes: fields to replace at last."""
    shapes = ((4, *cells), (5, *cells), (2, 77, width))
    latents, condition, contexts = (
        normal((1000 + seed) % 2**64, draw, shape) for draw, shape in enumerate(shapes)
    )
    lane = Lane(
        table=build(scheduler, steps, config, strength=strength),
        seed=seed,
        guidance=guidance,
        latents=latents,
        context=contexts[0],
        unconditional=contexts[1] if guidance > 1 else None,
        condition=condition,
    )
    return replace(lane, **changes)


def walk(runtime: SessionRuntime, size: LatentSize, lanes: Sequence[Lane]) -> list[LaneState]:
    """Every lane to its end, side by side."""
    batch = runtime.open(size, len(lanes))
    for slot, lane in enumerate(lanes):
        batch.join(slot, lane)
    for index in range(max(len(lane.table) for lane in lanes)):
        batch.step({slot: index for slot, lane in enumerate(lanes) if index < len(lane.table)})
    return [batch.leave(slot) for slot in range(len(lanes))]
