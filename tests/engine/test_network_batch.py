"""NetworkBatch: packing, guidance and the step around any UNet; mixed lanes equal the same lanes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from random_lanes import random_lane
from ritocco.backends.network import NetworkBatch
from ritocco.backends.runtime import Floats, Lane, LaneState
from ritocco.noise import normal
from ritocco.schedules import NO_HISTORY, SCHEDULERS, advance, stack

SHAPE = (4, 6, 8)


class ToyUNet:
    """Reads all it is given, in elementwise arithmetic: a row's result has the same bits in any call.

    calls: (sample, timestep, context) of each.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Floats, Floats, Floats]] = []

    def __call__(self, sample: Floats, timestep: Floats, context: Floats) -> Floats:
        self.calls.append((sample, timestep, context))
        told = np.sin(timestep / np.float32(90.0))[:, None, None, None]
        words = context[:, 0, 0][:, None, None, None]
        x, mask, masked = sample[:, :4], sample[:, 4:5], sample[:, 5:]
        output: Floats = np.tanh(np.float32(0.8) * x + told * mask + np.float32(0.3) * masked + words)
        return output


make_lane = partial(random_lane, cells=SHAPE[1:], width=3)


def mixed_lanes() -> list[Lane]:
    """Different tables, lengths, guidance and seeds."""
    return [
        make_lane("PNDM", 6, 1, 7.5),
        make_lane("K_EULER_ANCESTRAL", 4, 2),
        make_lane("KLMS", 7, 3, 3.0, strength=0.6),
        make_lane("DPMSolverMultistep", 6, 4, 12.0),
        make_lane("DDIM", 6, 2**64 - 1),
        make_lane("K_EULER", 3, 6, 2.0),
    ]


def run(lanes: Sequence[Lane], network: Any = None, **options: Any) -> list[LaneState]:
    """Every lane to its end, side by side."""
    batch = NetworkBatch(network or ToyUNet(), capacity=len(lanes), **options)
    for slot, lane in enumerate(lanes):
        batch.join(slot, lane)
    for index in range(max(len(lane.table) for lane in lanes)):
        batch.step({slot: index for slot, lane in enumerate(lanes) if index < len(lane.table)})
    return [batch.leave(slot) for slot in range(len(lanes))]


def assert_same_bits(ours: LaneState, theirs: LaneState) -> None:
    np.testing.assert_array_equal(ours.latents, theirs.latents)
    np.testing.assert_array_equal(ours.history, theirs.history)
    assert ours.broken_row is theirs.broken_row is None


@pytest.mark.parametrize("lane_timesteps", [True, False])
def test_mixed_lanes_equal_the_same_lanes_alone(lane_timesteps: bool) -> None:
    lanes = mixed_lanes()
    together = run(lanes, lane_timesteps=lane_timesteps)
    for lane, state in zip(lanes, together, strict=True):
        assert_same_bits(state, run([lane])[0])
        assert np.abs(state.latents - lane.latents).max() > 0.1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_lane_that_leaves_and_rejoins_elsewhere_ends_up_equal(scheduler: str) -> None:
    lane, other = make_lane(scheduler, 6, 11, 5.0), make_lane("DDIM", 6, 12)
    through = run([lane])[0]
    first = NetworkBatch(ToyUNet(), capacity=1)
    first.join(0, lane)
    for index in range(4):
        first.step({0: index})
    half = first.leave(0)
    second = NetworkBatch(ToyUNet(), capacity=3)
    second.join(0, other)
    second.step({0: 0})
    second.join(2, replace(lane, latents=half.latents, history=half.history))
    for index in range(4, len(lane.table)):
        second.step({2: index, 0: index - 3})
    assert_same_bits(second.leave(2), through)


def test_the_network_sees_scaled_latents_and_unscaled_conditions() -> None:
    lane = make_lane("K_EULER", 5, 21, 4.0)
    single = make_lane("DDIM", 5, 22)
    network = ToyUNet()
    batch = NetworkBatch(network, capacity=2)
    batch.join(0, lane)
    batch.join(1, single)
    batch.step({0: 0, 1: 2})
    ((sample, timestep, context),) = network.calls
    assert sample.shape == (3, 9, 6, 8)
    assert {sample.dtype, timestep.dtype, context.dtype} == {np.dtype(np.float32)}
    assert float(lane.table.in_scale[0]) < 0.2
    scaled = np.float32(lane.table.in_scale[0]) * lane.latents
    for row, (latents, owner) in enumerate([(scaled, lane), (scaled, lane), (single.latents, single)]):
        np.testing.assert_array_equal(sample[row, :4], latents)
        np.testing.assert_array_equal(sample[row, 4:], owner.condition)
    assert lane.unconditional is not None
    np.testing.assert_array_equal(context, np.stack([lane.unconditional, lane.context, single.context]))
    expected = [lane.table.timesteps[0]] * 2 + [single.table.timesteps[2]]
    np.testing.assert_array_equal(timestep, np.array(expected, np.float32))


def test_guidance_goes_from_the_unconditional_output_past_the_conditional_one() -> None:
    lane = make_lane("K_EULER", 5, 31, 7.5)
    network, batch = ToyUNet(), NetworkBatch(ToyUNet(), capacity=1)
    batch.join(0, lane)
    batch.step({0: 0})
    row = lane.table.row(0)
    sample = np.concatenate([np.float32(row.in_scale) * lane.latents, lane.condition])[None]
    told = np.array([row.timestep], np.float32)
    assert lane.unconditional is not None
    without, with_prompt = (network(sample, told, c[None])[0] for c in (lane.unconditional, lane.context))
    guided = without + 7.5 * (with_prompt - without)
    expected, _ = advance(row, lane.latents, guided, 0.0, NO_HISTORY)
    np.testing.assert_allclose(batch.leave(0).latents, expected, rtol=1e-5, atol=1e-5)


def test_one_timestep_per_call_groups_lanes_by_timestep() -> None:
    lanes = [make_lane("DDIM", 4, 41, 2.0), make_lane("DDIM", 4, 42), make_lane("DDIM", 5, 43)]
    network = ToyUNet()
    states = run(lanes, network, lane_timesteps=False)
    for _, timestep, _ in network.calls:
        assert len(set(timestep.tolist())) == 1
    rows = [len(timestep) for _, timestep, _ in network.calls]
    # Four steps in two groups (three rows and one), but for the one that both tables share; then one step.
    shared = {*lanes[0].table.timesteps.tolist()} & {*lanes[2].table.timesteps[:4].tolist()}
    same_step = sum(a == b for a, b in zip(lanes[0].table.timesteps, lanes[2].table.timesteps, strict=False))
    assert len(shared) >= same_step
    assert len(rows) == 4 * 2 - same_step + 1
    assert sum(rows) == 4 * 3 + 5
    for lane, state in zip(lanes, states, strict=True):
        assert_same_bits(state, run([lane])[0])


def test_a_lane_that_is_not_named_stays_where_it_is() -> None:
    batch = NetworkBatch(ToyUNet(), capacity=2)
    lane, other = make_lane("KLMS", 4, 51), make_lane("KLMS", 4, 52)
    batch.join(0, lane)
    batch.join(1, other)
    batch.step({1: 0})
    state = batch.leave(0)
    np.testing.assert_array_equal(state.latents, lane.latents)
    assert not state.history.any()
    assert (batch.leave(1).latents != other.latents).any()


def test_what_a_lane_holds_is_not_written_to() -> None:
    history = normal(1, 1, (3, *SHAPE))
    lane = make_lane("PNDM", 5, 61, 2.0, history=history)
    before = lane.latents.copy(), history.copy()
    state = run([lane])[0]
    np.testing.assert_array_equal(lane.latents, before[0])
    np.testing.assert_array_equal(history, before[1])
    assert state.latents.dtype == state.history.dtype == np.float32
    assert state.history.shape == (3, *SHAPE)


def test_row_k_adds_the_noise_of_draw_k_plus_one() -> None:
    lane = make_lane("K_EULER_ANCESTRAL", 5, 2**63 + 9)
    batch = NetworkBatch(lambda sample, *_: np.zeros_like(sample[:, :4]), capacity=1)
    batch.join(0, lane)
    x = lane.latents
    for index in range(len(lane.table)):
        batch.step({0: index})
        row = stack([lane.table.row(index)])
        x, _ = advance(row, x, np.zeros_like(x), normal(lane.seed, index + 1, SHAPE), NO_HISTORY)
    assert lane.table.noisy
    np.testing.assert_array_equal(batch.leave(0).latents, x.reshape(SHAPE))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_the_first_broken_row_is_kept_and_neighbours_are_untouched(poison: float) -> None:
    network, calls = ToyUNet(), [0]

    def breaks(sample: Floats, timestep: Floats, context: Floats) -> Floats:
        output = network(sample, timestep, context)
        calls[0] += 1
        if calls[0] in (3, 5):
            output[-1, 0, 0, 0] = poison
        return output

    lanes = [make_lane("DPMSolverMultistep", 6, 71, 2.0), make_lane("DDIM", 6, 72)]
    healthy, broken = run(lanes, breaks)
    assert broken.broken_row == 2
    assert not np.isfinite(broken.latents).all()
    assert_same_bits(healthy, run(lanes[:1])[0])


@pytest.mark.parametrize("slot", [-1, 2, 1])
def test_slots_are_checked(slot: int) -> None:
    batch = NetworkBatch(ToyUNet(), capacity=2)
    batch.join(1, make_lane("DDIM", 2, 81))
    with pytest.raises(ValueError, match=f"slot is {slot}; it must be a free one below 2"):
        batch.join(slot, make_lane("DDIM", 2, 82))
    batch.leave(1)
    batch.join(1, make_lane("DDIM", 2, 83))


def test_the_order_of_slots_in_a_step_does_not_matter() -> None:
    def once(rows: Mapping[int, int]) -> list[LaneState]:
        batch = NetworkBatch(ToyUNet(), capacity=2)
        for slot, lane in enumerate((make_lane("DDIM", 3, 91, 3.0), make_lane("PNDM", 3, 92))):
            batch.join(slot, lane)
        batch.step(rows)
        return [batch.leave(0), batch.leave(1)]

    for ours, theirs in zip(once({0: 0, 1: 0}), once({1: 0, 0: 0}), strict=True):
        assert_same_bits(ours, theirs)
