"""The loop: who moves when, what closing and breaking do, and whole runs against an exact solution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import pytest

from ritocco.backends.network import NetworkBatch
from ritocco.backends.runtime import Floats, Lane, LaneState
from ritocco.denoise import denoise
from ritocco.errors import NonFiniteError
from ritocco.schedules import StepTable, build

CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "use_karras_sigmas": True,
}
STD = 0.5  # of the Gaussian data
SIDE = (4, 2, 2)


def lane_of(table: StepTable, *, latents: Floats | None = None, means: tuple[float, ...] = (0.0,)) -> Lane:
    """A lane whose contexts tell the Gaussian's mean: (prompt,) or (prompt, negative prompt, guidance)."""
    contexts = [np.full((77, 2), mean, np.float32) for mean in means]
    return Lane(
        table=table,
        seed=0,
        guidance=means[2] if len(means) == 3 else 1.0,
        latents=np.zeros(SIDE, np.float32) if latents is None else latents,
        context=contexts[0],
        unconditional=contexts[1] if len(means) == 3 else None,
        condition=np.zeros((5, 2, 2), np.float32),
    )


class Ledger:
    """A Batch that writes down what is asked of it. broken: slot -> row that it reports as broken."""

    def __init__(self, broken: Mapping[int, int] | None = None, refuse: int | None = None) -> None:
        self.joined: list[int] = []
        self.steps: list[dict[int, int]] = []
        self.left: list[int] = []
        self._broken, self._refuse = broken or {}, refuse

    def join(self, slot: int, lane: Lane) -> None:
        if slot == self._refuse:
            raise ValueError("no room")
        self.joined.append(slot)

    def step(self, rows: Mapping[int, int]) -> None:
        self.steps.append(dict(rows))

    def peek(self, slot: int) -> LaneState:
        raise AssertionError("the loop looks at nobody")

    def leave(self, slot: int) -> LaneState:
        self.left.append(slot)
        latents = np.full(SIDE, slot, np.float32)
        return LaneState(
            latents=latents, history=np.zeros((3, *SIDE), np.float32), broken_row=self._broken.get(slot)
        )


def drain(run: Generator[int, None, list[LaneState]]) -> tuple[list[int], list[LaneState]]:
    """What it yields, and what it returns."""
    yielded = []
    while True:
        try:
            yielded.append(next(run))
        except StopIteration as end:
            return yielded, end.value


def tables(*steps: int) -> list[Lane]:
    return [lane_of(build("DDIM", count, CONFIG | {"use_karras_sigmas": False})) for count in steps]


def test_lanes_start_together_and_the_shorter_one_waits_at_its_end() -> None:
    batch = Ledger()
    yielded, states = drain(denoise(batch, tables(2, 4, 3)))
    assert yielded == [1, 2, 3, 4]
    assert batch.steps == [{0: 0, 1: 0, 2: 0}, {0: 1, 1: 1, 2: 1}, {1: 2, 2: 2}, {1: 3}]
    assert [float(state.latents.flat[0]) for state in states] == [0.0, 1.0, 2.0]
    assert batch.left == [0, 1, 2]


def test_no_lanes_no_steps() -> None:
    assert drain(denoise(Ledger(), [])) == ([], [])


def test_closing_between_steps_stops_and_frees_the_slots() -> None:
    batch = Ledger(broken={0: 0})
    run = denoise(batch, tables(5, 5))
    assert (next(run), next(run)) == (1, 2)
    run.close()
    assert len(batch.steps) == 2
    assert batch.left == [0, 1]


def test_lanes_leave_where_a_later_one_cannot_join() -> None:
    batch = Ledger(refuse=2)
    with pytest.raises(ValueError, match="no room"):
        next(denoise(batch, tables(5, 5, 5)))
    assert batch.joined == batch.left == [0, 1]


def test_a_broken_lane_is_an_error_that_names_step_scheduler_and_cause() -> None:
    lanes = tables(6, 6)
    with pytest.raises(NonFiniteError, match="NaN or infinity") as caught:
        drain(denoise(Ledger(broken={1: 3}), lanes))
    timestep = f"{lanes[1].table.timesteps[3]:g}"
    for word in ("step 4 of 6", "DDIM", f"timestep {timestep}", "float16", "bfloat16", "weights"):
        assert word in str(caught.value)
    assert caught.value.step == 3


class Gaussian:
    """The exact noise prediction, row after row of a table, for normal data whose mean the context tells."""

    def __init__(self, table: StepTable) -> None:
        rows = [table.row(index) for index in range(len(table))]
        self._rows = iter(rows)
        # x0 = u x + v e, so signal and noise at a row are 1/u and -v/u where e is the noise.
        self.levels = [(1.0 / row.u, -row.v / row.u) for row in rows]

    def __call__(self, sample: Floats, timestep: Floats, context: Floats) -> Floats:
        row = next(self._rows)
        np.testing.assert_array_equal(timestep, np.float32(row.timestep))
        signal, noise = 1.0 / row.u, -row.v / row.u
        x = sample[:, :4].astype(np.float64) / row.in_scale
        mean = context[:, :1, :1, None]
        output: Floats = (noise * (x - signal * mean) / (STD**2 * signal**2 + noise**2)).astype(np.float32)
        return output


def exact(x: Floats, mean: float, start: tuple[float, float], end: tuple[float, float]) -> Any:
    """Where the probability flow takes x between two levels. [Song et al. 2021, arXiv:2011.13456, Eq. 13]"""
    spread = [math.sqrt(STD**2 * signal**2 + noise**2) for signal, noise in (start, end)]
    return end[0] * mean + (x - start[0] * mean) * spread[1] / spread[0]


def run_error(scheduler: str, steps: int, means: tuple[float, ...]) -> float:
    """Error of a whole run from the exact trajectory, up to the last row (which leads to no noise at all)."""
    table = build(scheduler, steps, CONFIG)
    network = Gaussian(table)
    start, end = network.levels[0], network.levels[-1]
    latents = (np.linspace(-2.0, 2.0, 16) * start[1]).reshape(SIDE).astype(np.float32)
    lane = lane_of(table.take(slice(0, -1)), latents=latents, means=means)
    yielded, (state,) = drain(denoise(NetworkBatch(network, capacity=1), [lane]))
    assert yielded == list(range(1, steps))
    # The prediction is linear in the mean, so guidance is the flow towards a mean further out.
    mean = means[0] if len(means) == 1 else means[1] + means[2] * (means[0] - means[1])
    return float(np.abs(state.latents - exact(latents, mean, start, end)).max())


@pytest.mark.parametrize("means", [(0.7,), (0.3, 0.1, 4.0)], ids=["guidance 1", "guidance 4"])
@pytest.mark.parametrize(
    ("scheduler", "least", "most"), [("K_EULER", 1.85, 2.1), ("DPMSolverMultistep", 3.8, 4.6)]
)
def test_order_of_convergence(scheduler: str, least: float, most: float, means: tuple[float, ...]) -> None:
    errors = [run_error(scheduler, steps, means) for steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert least < coarse / fine < most, errors
