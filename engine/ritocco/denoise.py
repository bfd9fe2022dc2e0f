"""The loop: lanes move along their tables, side by side. It knows nothing of images, prompts or hardware."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from ritocco.backends.runtime import Batch, Lane, LaneState
from ritocco.errors import NonFiniteError


def denoise(batch: Batch, lanes: Sequence[Lane]) -> Generator[int, None, list[LaneState]]:
    """Run every lane from the first row of its table to the last.

    Lanes start together; one with fewer rows is done earlier and the others go on. Yields the number of
    steps taken after each one, and returns the lanes' states in order. Closing the generator between steps
    stops the run; the lanes leave the batch either way.
    Raises NonFiniteError, which names the first step whose result was not finite.
    """
    joined = 0
    try:
        for slot, lane in enumerate(lanes):
            batch.join(slot, lane)
            joined += 1
        for index in range(max((len(lane.table) for lane in lanes), default=0)):
            batch.step({slot: index for slot, lane in enumerate(lanes) if index < len(lane.table)})
            yield index + 1
    finally:
        states = [batch.leave(slot) for slot in range(joined)]
    for lane, state in zip(lanes, states, strict=True):
        refuse_broken(lane, state)
    return states


def refuse_broken(lane: Lane, state: LaneState) -> None:
    """Raises NonFiniteError where a lane's latents were not finite after some step."""
    if state.broken_row is None:
        return
    step, count = state.broken_row, len(lane.table)
    raise NonFiniteError(
        f"step {step + 1} of {count} ({lane.table.scheduler}, timestep {lane.table.timesteps[step]:g}) gave "
        "NaN or infinity: most often float16 overflowing in the network (use dtype bfloat16 or float32), or "
        "damaged weights or latents that are not finite",
        step=step,
    )
