"""TorchBatch, which hoists what does not change, against NetworkBatch around the plain UNet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from random_lanes import random_lane
from ritocco import Engine
from ritocco.backends.network import NetworkBatch
from ritocco.backends.runtime import Batch, Floats, Lane, LaneState, LatentSize
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import open_checkpoint
from ritocco.noise import normal
from ritocco.schedules import NO_HISTORY, SCHEDULERS, advance, stack

# float32, relative to the largest value: both sides run the same matrix products, in other batch shapes and
# with conv_in split in two sums. Measured: 3e-6; guidance enlarges it.
TOLERANCE = 1e-5
SIZE = LatentSize(height=6, width=8)
SHAPE = (4, 6, 8)


@pytest.fixture(scope="module")
def runtime(tiny_engine: Engine) -> TorchRuntime:
    return cast(TorchRuntime, tiny_engine.runtime)


@pytest.fixture(scope="module")
def make_lane(tiny_checkpoint: Path) -> Callable[..., Lane]:
    config = open_checkpoint(tiny_checkpoint).scheduler

    def make(*asked: Any, **changes: Any) -> Lane:
        lane = random_lane(*asked, cells=SHAPE[1:], width=32, config=config)
        return replace(lane, **({"latents": np.float32(lane.table.start_noise[0]) * lane.latents} | changes))

    return make


@pytest.fixture
def rows_per_step(runtime: TorchRuntime) -> Any:
    """Counts UNet rows: one entry for each evaluation."""
    rows: list[int] = []
    hook = runtime.unet.conv_out.register_forward_hook(lambda *call: rows.append(len(call[2])))
    yield rows
    hook.remove()


def plain(runtime: TorchRuntime) -> Callable[[Floats, Floats, Floats], Floats]:
    """The UNet's own `forward`, with nothing hoisted."""

    def predict(sample: Floats, timestep: Floats, context: Floats) -> Floats:
        with torch.inference_mode():
            rows: Floats = runtime.unet(*map(torch.from_numpy, (sample, timestep, context))).numpy()
        return rows

    return predict


def run(batch: Batch, lanes: Sequence[Lane]) -> list[LaneState]:
    for slot, lane in enumerate(lanes):
        batch.join(slot, lane)
    for index in range(max(len(lane.table) for lane in lanes)):
        batch.step({slot: index for slot, lane in enumerate(lanes) if index < len(lane.table)})
    return [batch.leave(slot) for slot in range(len(lanes))]


def assert_close(ours: LaneState, theirs: LaneState) -> None:
    for name in ("latents", "history"):
        result, truth = getattr(ours, name), getattr(theirs, name)
        assert result.dtype == np.float32
        assert result.shape == truth.shape
        assert float(np.abs(result - truth).max()) <= TOLERANCE * float(np.abs(truth).max()), name
    assert ours.broken_row is theirs.broken_row is None


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_hoisted_equals_plain(runtime: TorchRuntime, make_lane: Callable[..., Lane], scheduler: str) -> None:
    lanes = [make_lane(scheduler, 4, 1, 4.0), make_lane(scheduler, 4, 2)]
    plainly = run(NetworkBatch(plain(runtime), capacity=2), lanes)
    for ours, theirs, lane in zip(run(runtime.open(SIZE, 2), lanes), plainly, lanes, strict=True):
        assert_close(ours, theirs)
        assert theirs.history.any()
        assert np.abs(ours.latents - lane.latents).max() > 0.1


def test_mixed_lanes_equal_plain_and_the_same_lanes_alone(
    runtime: TorchRuntime, make_lane: Callable[..., Lane]
) -> None:
    lanes = [
        make_lane("PNDM", 4, 3, 3.0),
        make_lane("K_EULER_ANCESTRAL", 3, 4),
        make_lane("KLMS", 5, 5, 2.0),
        make_lane("DPMSolverMultistep", 4, 2**64 - 1, 5.0),
        make_lane("DDIM", 2, 7),
    ]
    together = run(runtime.open(SIZE, 5), lanes)
    plainly = run(NetworkBatch(plain(runtime), capacity=5), lanes)
    for lane, ours, theirs in zip(lanes, together, plainly, strict=True):
        assert_close(ours, theirs)
        assert_close(ours, run(runtime.open(SIZE, 1), [lane])[0])


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_lane_that_leaves_and_rejoins_elsewhere_ends_up_equal(
    runtime: TorchRuntime, make_lane: Callable[..., Lane], guidance: float
) -> None:
    lane, other = make_lane("PNDM", 5, 8, guidance), make_lane("K_EULER_ANCESTRAL", 6, 9, 3.0)
    through = run(runtime.open(SIZE, 1), [lane])[0]
    first = runtime.open(SIZE, 1)
    first.join(0, lane)
    for index in range(3):
        first.step({0: index})
    half = first.leave(0)
    second = runtime.open(SIZE, 3)
    second.join(1, other)
    second.step({1: 0})
    second.join(2, replace(lane, latents=half.latents, history=half.history))
    for index in range(3, len(lane.table)):
        second.step({2: index, 1: index - 2})
    assert_close(second.leave(2), through)
    second.step({1: 4})
    second.step({1: 5})
    assert_close(second.leave(1), run(runtime.open(SIZE, 1), [other])[0])


def test_a_lane_that_is_not_named_stays_where_it_is(
    runtime: TorchRuntime, make_lane: Callable[..., Lane]
) -> None:
    lanes = [make_lane("KLMS", 3, 10, 2.0), make_lane("KLMS", 3, 11, 2.0), make_lane("KLMS", 3, 12)]
    batch = runtime.open(SIZE, 3)
    for slot, lane in enumerate(lanes):
        batch.join(slot, lane)
    batch.step({2: 0, 0: 0})
    waiting = batch.leave(1)
    np.testing.assert_array_equal(waiting.latents, lanes[1].latents)
    assert not waiting.history.any()
    for index in (1, 2):
        batch.step({0: index, 2: index})
    for slot in (0, 2):
        assert_close(batch.leave(slot), run(runtime.open(SIZE, 1), [lanes[slot]])[0])


def test_shared_parts_are_hoisted_once(
    runtime: TorchRuntime, make_lane: Callable[..., Lane], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    for name in ("hoist_context", "hoist_timesteps", "hoist_condition"):
        original = getattr(runtime.unet, name)

        def counted(*args: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(runtime.unet, name, counted)
    lane = make_lane("DDIM", 3, 13, 4.0)
    lanes = [replace(lane, seed=seed, latents=normal(seed, 0, SHAPE)) for seed in range(4)]
    states = run(runtime.open(SIZE, 5), lanes)
    assert calls == {"hoist_context": 1, "hoist_timesteps": 1, "hoist_condition": 1}
    assert not np.array_equal(states[0].latents, states[1].latents)
    # The same contents in other arrays are nobody's to share.
    run(runtime.open(SIZE, 2), [lane, replace(lane, condition=lane.condition.copy(), unconditional=None)])
    assert calls == {"hoist_context": 3, "hoist_timesteps": 2, "hoist_condition": 3}


def test_a_lane_at_guidance_one_costs_one_row(
    runtime: TorchRuntime, make_lane: Callable[..., Lane], rows_per_step: list[int]
) -> None:
    run(
        runtime.open(SIZE, 3),
        [make_lane("DDIM", 2, 14, 2.0), make_lane("DDIM", 3, 15), make_lane("DDIM", 1, 16)],
    )
    assert rows_per_step == [4, 3, 1]


def test_row_k_adds_the_noise_of_draw_k_plus_one(
    runtime: TorchRuntime, make_lane: Callable[..., Lane], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.unet, "step", lambda latents, *_: torch.zeros_like(latents))
    lane, other = make_lane("K_EULER_ANCESTRAL", 4, 2**64 - 1), make_lane("DDIM", 4, 17)
    x = lane.latents
    for index in range(len(lane.table)):
        row = stack([lane.table.row(index)])
        x, _ = advance(row, x, np.zeros_like(x), normal(lane.seed, index + 1, SHAPE), NO_HISTORY)
    ours = run(runtime.open(SIZE, 2), [lane, other])[0]
    np.testing.assert_allclose(ours.latents, x.reshape(SHAPE), rtol=0, atol=1e-5)


def test_the_first_broken_row_is_kept_and_neighbours_are_untouched(
    runtime: TorchRuntime, make_lane: Callable[..., Lane], monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = [make_lane("DPMSolverMultistep", 5, 18), make_lane("DDIM", 5, 19)]
    alone = run(runtime.open(SIZE, 1), lanes[:1])[0]
    original, calls = runtime.unet.step, [0]

    def breaks(*args: Any) -> Tensor:
        output = original(*args)
        calls[0] += 1
        if calls[0] in (3, 4):
            output[1, 2, 3, 4] = torch.inf
        return output

    monkeypatch.setattr(runtime.unet, "step", breaks)
    healthy, broken = run(runtime.open(SIZE, 2), lanes)
    assert broken.broken_row == 2
    assert not np.isfinite(broken.latents).all()
    assert_close(healthy, alone)


def test_slots_and_sizes_are_checked(runtime: TorchRuntime, make_lane: Callable[..., Lane]) -> None:
    batch, lane = runtime.open(SIZE, 2), make_lane("DDIM", 2, 20)
    batch.join(1, lane)
    for slot in (-1, 2, 1):
        with pytest.raises(ValueError, match=f"slot is {slot}; it must be a free one below 2"):
            batch.join(slot, lane)
    with pytest.raises(ValueError, match="this batch takes"):
        batch.join(0, replace(lane, latents=np.zeros((4, 8, 6), np.float32)))
    batch.leave(1)
    batch.join(1, lane)
    batch.step({1: 0})
    assert np.isfinite(batch.leave(1).latents).all()


def test_state_is_float32_whatever_the_network_computes_in(
    tiny_checkpoint: Path, runtime: TorchRuntime, make_lane: Callable[..., Lane]
) -> None:
    low = TorchRuntime(open_checkpoint(tiny_checkpoint), device=torch.device("cpu"), dtype=torch.bfloat16)
    lane = make_lane("KLMS", 3, 21, 2.0, history=normal(21, 3, (3, *SHAPE)))
    batch = low.open(SIZE, 1)
    batch.join(0, lane)
    unmoved = batch.leave(0)
    np.testing.assert_array_equal(unmoved.latents, lane.latents)
    np.testing.assert_array_equal(unmoved.history, lane.history)
    ours, truth = (run(one.open(SIZE, 1), [lane])[0] for one in (low, runtime))
    assert ours.latents.dtype == ours.history.dtype == np.float32
    scale = float(np.abs(truth.latents).max())
    assert 0 < float(np.abs(ours.latents - truth.latents).max()) < 0.05 * scale
    assert low.traits.dtype == "bfloat16"
    assert (low.traits.device, low.traits.lane_timesteps, low.traits.size_multiple) == ("cpu", True, 2)
