"""Memory that runs out: half as many lanes move together from then on, and the pictures are the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accelerator import DEVICE, GPU
from random_lanes import random_lane
from ritocco.backends.fast_path import FastPath
from ritocco.backends.runtime import Lane, LaneState, LatentSize
from ritocco.backends.torch_ import TorchRuntime
from ritocco.checkpoint import open_checkpoint
from ritocco.errors import BackendError

SIZE = LatentSize(height=4, width=8)
# float32, relative to the largest value: matrix products of other batch shapes, enlarged by guidance.
TOLERANCE = 3e-5
PLAIN = FastPath(kernels=False, packed=False, graphs=False, search=False)
PATHS = {"eager": PLAIN, "captured": FastPath(kernels=True, packed=True, graphs=True, search=False)}


# The interpreter takes minutes for the captured one.
@pytest.fixture(params=["eager", pytest.param("captured", marks=pytest.mark.slow)])
def runtime(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> TorchRuntime:
    if request.param == "captured":
        pytest.importorskip("triton")
        if GPU:
            pytest.skip("a replay calls no hook, so its memory can't be said to have run out")
    checkpoint = open_checkpoint(tiny_checkpoint)
    return TorchRuntime(checkpoint, device=DEVICE, dtype=torch.float32, path=PATHS[request.param])


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


def lanes_of(count: int) -> list[Lane]:
    lanes = [
        random_lane("K_EULER_ANCESTRAL", 3, seed, 4.0, cells=(SIZE.height, SIZE.width), width=32)
        for seed in range(count)
    ]
    return [replace(lane, latents=np.float32(lane.table.start_noise[0]) * lane.latents) for lane in lanes]


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


def test_a_decoder_without_memory_is_an_error(runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(runtime, "_decode", full)
    with pytest.raises(BackendError, match="has not the memory for decoding a picture: ask for a smaller"):
        runtime.decode(np.zeros((1, 4, 4, 8), np.float32))
