"""Memory that runs out: what was captured goes, then half as many lanes move together from then on, and the
pictures are the same.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from accelerator import DEVICE, GPU
from random_lanes import random_lane
from ritocco.backends.fast_path import FastPath
from ritocco.backends.recorded import Replayed, Work
from ritocco.backends.runtime import Lane, LaneState, LatentSize
from ritocco.backends.torch_ import TorchBatch, TorchRuntime
from ritocco.checkpoint import open_checkpoint
from ritocco.errors import BackendError
from ritocco_kernels.ops import REFERENCE, Ops

SIZE = LatentSize(height=4, width=8)
# float32, relative to the largest value: matrix products of other batch shapes, enlarged by guidance.
TOLERANCE = 3e-5


class Captured(FastPath):
    """With kernels around the networks alone: the interpreter takes minutes for those within."""

    def ops(self) -> Ops:
        return REFERENCE


PATHS = {
    "eager": FastPath(kernels=False, packed=False, graphs=False, search=False),
    "captured": Captured(kernels=True, packed=True, graphs=True, search=False),
}


def runtime_of(path: str, checkpoint: Path) -> TorchRuntime:
    if path == "captured":
        pytest.importorskip("triton")
        if GPU:
            pytest.skip("a replay calls no hook, so its memory can't be said to have run out")
    opened = open_checkpoint(checkpoint)
    return TorchRuntime(opened, device=DEVICE, dtype=torch.float32, path=PATHS[path])


@pytest.fixture(params=["eager", "captured"])
def runtime(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> TorchRuntime:
    return runtime_of(request.param, tiny_checkpoint)


@pytest.fixture
def captured(tiny_checkpoint: Path) -> TorchRuntime:
    return runtime_of("captured", tiny_checkpoint)


@pytest.fixture
def rows_that_fit(runtime: TorchRuntime) -> Iterator[list[int]]:
    """Rows of the UNet: its last number is how many fit; those that ran are put before it."""
    held = [100]

    def full(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if len(inputs[0]) > held[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        held.insert(-1, len(inputs[0]))

    hook = runtime.unet.conv_out.register_forward_pre_hook(full)
    yield held
    hook.remove()


def lane_of(size: LatentSize, seed: int) -> Lane:
    lane = random_lane("K_EULER_ANCESTRAL", 3, seed, 4.0, cells=(size.height, size.width), width=32)
    return replace(lane, latents=np.float32(lane.table.start_noise[0]) * lane.latents)


def lanes_of(count: int) -> list[Lane]:
    return [lane_of(SIZE, seed) for seed in range(count)]


def run(runtime: TorchRuntime, lanes: Sequence[Lane], before: Callable[[int], None]) -> list[LaneState]:
    batch = runtime.open(SIZE, len(lanes))
    for slot, lane in enumerate(lanes):
        batch.join(slot, lane)
    for index in range(len(lanes[0].table)):
        before(index)
        batch.step(dict.fromkeys(range(len(lanes)), index))
    return [batch.leave(slot) for slot in range(len(lanes))]


def test_half_as_many_move_together_and_paint_the_same(
    runtime: TorchRuntime, rows_that_fit: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    lanes = lanes_of(5)
    wanted = run(runtime, lanes, lambda index: None)
    assert rows_that_fit == [10, 10, 10, 100]

    def shrink(index: int) -> None:
        if index == 1:
            rows_that_fit[:] = [5]

    with caplog.at_level(logging.WARNING, logger="ritocco"):
        found = run(runtime, lanes, shrink)
    assert rows_that_fit == [4, 4, 2, 4, 4, 2, 5], "two lanes, two, one; twice"
    (said,) = (record.getMessage() for record in caplog.records)
    assert "has not the memory for 5 pictures of 64 x 32 at once; from now on 2 are computed" in said
    for ours, theirs in zip(found, wanted, strict=True):
        for name in ("latents", "history"):
            result, truth = getattr(ours, name), getattr(theirs, name)
            assert np.abs(result - truth).max() <= TOLERANCE * np.abs(truth).max(), name
        assert ours.broken_row is None
    # The next request does not run into it again.
    rows_that_fit[:] = [5]
    caplog.clear()
    run(runtime, lanes, lambda index: None)
    assert rows_that_fit[:3] == [4, 4, 2]
    assert not caplog.records


def test_memory_that_does_not_hold_one_is_an_error(runtime: TorchRuntime, rows_that_fit: list[int]) -> None:
    rows_that_fit[:] = [1]
    with pytest.raises(
        BackendError, match=r"has not the memory for one picture of 64 x 32 pixels.*2\.00 GiB"
    ):
        run(runtime, lanes_of(3), lambda index: None)
    rows_that_fit[:] = [4]
    run(runtime, lanes_of(3), lambda index: None)
    assert max(rows_that_fit[:-1]) == 2, "and one at a time is tried from then on"


def test_no_memory_for_the_way_back_to_the_seats_is_an_error(
    runtime: TorchRuntime, rows_that_fit: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TorchBatch) -> None:
        if rows_that_fit[-1] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(TorchBatch, "_scatter", full)
    batch = runtime.open(SIZE, 1)
    rows_that_fit[:] = [100]
    batch.join(0, lane_of(SIZE, 0))
    rows_that_fit[:] = [1]
    with pytest.raises(BackendError, match=r"has not the memory for one picture of 64 x 32.*2\.00 MiB"):
        batch.step({0: 0})


RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (32, 64, 3), np.uint8)
DRAWN = RNG.standard_normal((1, 3, 16, 32), dtype=np.float32)
LATENTS = RNG.standard_normal((1, 4, 4, 8), dtype=np.float32)
# What is asked of a runtime, by what it has no memory for; and the part that needs it.
CALLS: dict[str, tuple[str, str, Callable[[TorchRuntime], Any]]] = {
    "text": ("encoding a prompt", "_encode_text", lambda one: one.encode_text(np.ones((2, 77), np.int64))),
    "image": ("encoding a picture", "_encode_mean", lambda one: one.encode_image(DRAWN)),
    "pixels": ("encoding a picture", "_encode_mean", lambda one: one.encode_pixels(PICTURE, None)),
    "decode": ("decoding a picture", "_decode", lambda one: one.decode(LATENTS)),
    "paste": ("decoding a picture", "_decode", lambda one: one.decode_pixels(LATENTS, None)),
    "join": ("one picture of 64 x 32 pixels", "unet.hoist_context", lambda one: joined(one)),
}


def joined(runtime: TorchRuntime) -> np.ndarray[Any, Any]:
    """One lane after a step."""
    return run(runtime, lanes_of(1), lambda index: None)[0].latents


def part_of(runtime: TorchRuntime, name: str) -> tuple[Any, str]:
    """Whose attribute it is, and its name; of a packed UNet, what takes the place of `hoist_context`."""
    owner, _, attribute = name.rpartition(".")
    if owner:
        return runtime.unet, "project_context" if runtime.path.packed else attribute
    return runtime, attribute


@pytest.mark.parametrize("name", CALLS)
def test_what_has_no_memory_is_tried_twice_and_an_error(
    runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    what, part, call = CALLS[name]
    tries: list[int] = []

    def full(*_: object) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(*part_of(runtime, part), full)
    with pytest.raises(BackendError, match=rf"has not the memory for {what}: ask for a smaller .*3\.00 GiB"):
        call(runtime)
    assert len(tries) == 2


# `paste` is `decode`, behind which stands a kernel for the layouts of the others.
@pytest.mark.parametrize("name", [name for name in CALLS if name != "paste"])
def test_memory_that_was_captured_for_others_is_given_back(
    captured: TorchRuntime, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _, part, call = CALLS[name]
    wanted = call(captured)
    size = LatentSize(height=2, width=2)
    batch = captured.open(size, 1)
    batch.join(0, lane := lane_of(size, 9))
    batch.step({0: 0})
    held = weakref.ref(next(reversed(captured.graphs._held.values())))  # type: ignore[union-attr]
    owner, attribute = part_of(captured, part)
    original = getattr(owner, attribute)

    def full(*given: Any) -> Any:
        if held() is not None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*given)

    monkeypatch.setattr(owner, attribute, full)
    np.testing.assert_array_equal(call(captured), wanted)
    batch.step({0: 1})
    moved = batch.leave(0).latents
    other = captured.open(size, 1)
    other.join(0, lane)
    for row in (0, 1):
        other.step({0: row})
    np.testing.assert_array_equal(moved, other.leave(0).latents)


def test_lanes_that_fit_without_what_was_captured_all_move(captured: TorchRuntime) -> None:
    size = LatentSize(height=2, width=2)
    batch = captured.open(size, 1)
    batch.join(0, lane_of(size, 9))
    batch.step({0: 0})
    assert captured.graphs is not None
    held = weakref.ref(next(iter(captured.graphs._held.values())))
    rows: list[int] = []
    computed: list[weakref.ref[torch.Tensor]] = []

    def full(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if held() is not None:
            number = torch.ones(1)
            computed.append(weakref.ref(number))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert computed[0]() is None, "the failed step holds nothing"
        rows.append(len(inputs[0]))

    hook = captured.unet.conv_out.register_forward_pre_hook(full)
    try:
        run(captured, lanes_of(3), lambda index: None)
    finally:
        hook.remove()
    assert rows == [6, 6, 6]
    assert captured.fitting == {}


def test_a_capture_without_memory_takes_that_of_others(captured: TorchRuntime) -> None:
    assert captured.graphs is not None
    captured.decode(LATENTS)
    small, large = (LatentSize(height=side, width=side) for side in (2, 4))
    batches = [captured.open(size, 1) for size in (small, large)]
    for batch, size in zip(batches, (small, large), strict=True):
        batch.join(0, lane_of(size, 9))
    batches[0].step({0: 0})
    held, said = weakref.ref(next(iter(captured.graphs._held.values()))), []

    def capture(work: Work) -> Work:
        if held() is not None:
            said.append("full")
            raise torch.OutOfMemoryError("CUDA out of memory.")
        said.append("captured")
        return work

    captured.graphs._capture = capture
    for row in range(3):
        batches[1].step({0: row})
    assert said == ["full", "captured"]
    assert cast(Replayed, captured._decode)._held == {}
    assert np.isfinite(batches[0].leave(0).latents).all()
    assert np.isfinite(batches[1].leave(0).latents).all()
