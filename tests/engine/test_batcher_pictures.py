"""A request's pictures do not depend on who shares its batch, its engine or its queue."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ritocco import BackendError, Batcher, Engine, NonFiniteError, Prediction, load
from ritocco.backends.runtime import LaneState, LatentSize
from ritocco.backends.torch_ import TorchBatch
from ritocco.checkpoint import open_checkpoint
from ritocco.memory import Rehearsal
from ritocco.policy import Turn, Work
from ritocco.schedules import SCHEDULERS
from ritocco.step_times import StepTimes
from virtual_runtime import PATIENCE

# As between batch sizes in `test_engine.py`: matrix products of other shapes differ in their last bits, and a
# value that lies close to a border between two of a picture's 256 levels may come out one level away.
FLOAT_TOLERANCE = 5e-5
LEVELS = 1
SIZE = LatentSize(height=8, width=8)
Ask = Callable[..., dict[str, Any]]


def together(works: list[Work], times: Any, *, capacity: int, ageing: float) -> Turn:
    """A policy that takes along whom it can: all that are started, of the size of the first in line."""
    for act, one in [("finish", work) for work in works if not work.left]:
        return Turn(act, (one.key,))  # type: ignore[arg-type]
    for one in works:
        if not one.started:
            return Turn("start", (one.key,))
    company = [one for one in sorted(works, key=lambda one: one.key) if one.size == works[0].size]
    return Turn("step", tuple(one.key for one in company[:capacity]))


def in_turns(works: list[Work], times: Any, *, capacity: int, ageing: float) -> Turn:
    """A policy that moves whoever has most left, alone, so that everybody is passed all the time."""
    for one in works:
        if not one.left:
            return Turn("finish", (one.key,))
    one = max(works, key=lambda work: (work.left, -work.key))
    return Turn("step" if one.started else "start", (one.key,))


def mixed(ask: Ask) -> list[dict[str, Any]]:
    """All schedulers, several steps, sizes, seeds, guidances and numbers of pictures."""
    return [
        ask(
            scheduler=scheduler,
            num_inference_steps=3 + place,
            seed=40 + place,
            guidance_scale=(7.5, 1, 3)[place % 3],
            num_outputs=1 + (place == 1),
            prompt="a cat " * place,
            size=(64, 64) if place < 6 else (128, 64),
        )
        for place, scheduler in enumerate((*SCHEDULERS, "PNDM", "K_EULER_ANCESTRAL"))
    ]


def run(batcher: Batcher, requests: list[dict[str, Any]], **options: Any) -> list[Prediction]:
    tickets = [batcher.submit(one, **options) for one in requests]
    return [ticket.result(PATIENCE) for ticket in tickets]


def pixels(prediction: Prediction) -> npt.NDArray[np.int64]:
    return np.stack([np.asarray(image) for image in prediction.images]).astype(np.int64)


def test_pictures_of_mixed_batches_are_those_of_requests_alone(
    spied_engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All six schedulers in one batch, float32."""
    requests = mixed(ask)
    floats: Any = spied_engine.runtime
    alone, wanted = [], []
    for one in requests:
        alone.append(spied_engine.predict(one, paste_back=False))
        wanted.append(floats.decoded[-1])
    floats.decoded.clear()
    monkeypatch.setattr("ritocco.device_loop.decide", together)
    with Batcher(spied_engine) as batcher:
        found = run(batcher, requests, paste_back=False)
        assert max(batcher.snapshot().steps) >= 6, "they did share steps"
    for ours, theirs, floats_alone in zip(found, alone, wanted, strict=True):
        assert ours.status == "succeeded"
        assert np.abs(pixels(ours) - pixels(theirs)).max() <= LEVELS
        # They were decoded in another order.
        nearest = min(
            float(np.abs(one - floats_alone).max())
            for one in floats.decoded
            if one.shape == floats_alone.shape
        )
        assert nearest <= FLOAT_TOLERANCE
        # The bar is as long as the times beside it leave room for.
        lines, lines_alone = (re.sub(r"\|.*\||\[.*", "", one.logs) for one in (theirs, ours))
        assert lines == lines_alone


def test_a_request_that_is_passed_and_set_aside_paints_bit_for_bit_the_same(
    tiny_engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone at every step, it is the same batch as alone, whoever came between; the seats are too few."""
    requests = [one | {"num_outputs": 1} for one in mixed(ask)]
    alone = [tiny_engine.predict(one) for one in requests]
    monkeypatch.setattr("ritocco.device_loop.decide", in_turns)
    left: list[int] = []
    original = TorchBatch.leave

    def leave(batch: TorchBatch, slot: int) -> LaneState:
        left.append(slot)
        return original(batch, slot)

    monkeypatch.setattr(TorchBatch, "leave", leave)
    with Batcher(tiny_engine, capacity=1) as batcher:
        found = run(batcher, requests)
    assert len(left) > 2 * len(requests), "they left, and came back"
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.output == theirs.output


def test_options_reach_the_pictures(tiny_engine: Engine, ask: Ask) -> None:
    noise = np.random.default_rng(3).standard_normal((4, 8, 8))
    for options in (
        {"mask_feather": 6},
        {"paste_back": False},
        {"strength": 0.5},
        {"latents": noise},
        {"output_format": "webp"},
    ):
        theirs: Any = tiny_engine.predict(ask(), **options)
        with Batcher(tiny_engine) as batcher:
            (ours,) = run(batcher, [ask()], **options)
        assert ours.output == theirs.output
        assert ours.input == theirs.input
        assert ours.version == theirs.version


def test_two_engines_paint_the_same(tiny_engine: Engine, tiny_checkpoint: Path, ask: Ask) -> None:
    requests = [ask(seed=seed, num_inference_steps=2 + seed % 3) for seed in range(5)]
    alone = [tiny_engine.predict(one) for one in requests]
    with (
        load(tiny_checkpoint, device="cpu", dtype="float32") as other,
        Batcher([tiny_engine, other], capacity=1) as batcher,
    ):
        found = run(batcher, requests)
    assert [one.output for one in found] == [one.output for one in alone]


def test_a_network_that_breaks_ends_its_own_request(
    tiny_engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ritocco.device_loop.decide", together)
    bad = np.zeros((4, 8, 8), np.float32)
    bad[0, 0, 0] = 3e38  # finite, and what is made of it is not
    with Batcher(tiny_engine) as batcher:
        fine, broken = batcher.submit(ask(num_inference_steps=4)), batcher.submit(ask(), latents=bad)
        with pytest.raises(NonFiniteError, match="step 1 of 3"):
            broken.result(PATIENCE)
        assert fine.result(PATIENCE).status == "succeeded"
        assert batcher.healthy
    assert broken.prediction.status == "failed"
    assert "NaN or infinity" in str(broken.prediction.error)


def test_memory_that_runs_out_halves_the_batch_and_nobody_notices(
    tiny_engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime: Any = tiny_engine.runtime
    requests = [ask(seed=seed, num_inference_steps=4) for seed in range(4)]
    alone = [tiny_engine.predict(one) for one in requests]
    monkeypatch.setattr("ritocco.device_loop.decide", together)
    monkeypatch.setattr(runtime, "fitting", {})

    def full(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = runtime.unet.conv_out.register_forward_pre_hook(full)
    try:
        with Batcher(tiny_engine) as batcher:
            found = run(batcher, requests)
    finally:
        hook.remove()
    assert runtime.fitting == {SIZE: 2}
    for ours, theirs in zip(found, alone, strict=True):
        assert np.abs(pixels(ours) - pixels(theirs)).max() <= LEVELS


def test_under_a_budget_requests_share_the_steps_that_it_bears(
    tiny_checkpoint: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepTimes, "tried", lambda *_: True)
    monkeypatch.setattr(StepTimes, "due", lambda *_: False)
    monkeypatch.setattr(StepTimes, "step", lambda *_: 1.0)  # company costs nothing
    requests = [ask(seed=seed, num_inference_steps=3) for seed in range(5)]
    rehearsal = Rehearsal(open_checkpoint(tiny_checkpoint), dtype=torch.float32, movable=True)
    budget = rehearsal.together(height=64, width=64, lanes=2, rows=51).most
    with load(tiny_checkpoint, device="cpu", dtype="float32", memory_budget=budget) as engine:
        fields = engine.check(requests[0]).request.fields
        assert engine.together(fields, 4) == 2
        alone = [engine.predict(one) for one in requests]
        with Batcher(engine, capacity=4) as batcher:
            found = run(batcher, requests)
            assert max(batcher.snapshot().steps) == 2
    for ours, theirs in zip(found, alone, strict=True):
        assert np.abs(pixels(ours) - pixels(theirs)).max() <= LEVELS


def test_who_has_no_plan_of_company_moves_alone(
    tiny_checkpoint: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its device goes on."""

    def broken(*_: object) -> int:
        raise BackendError("no plans")

    monkeypatch.setattr(Engine, "together", broken)
    with (
        load(tiny_checkpoint, device="cpu", dtype="float32", memory_budget="64MiB") as engine,
        Batcher(engine) as batcher,
    ):
        found = run(batcher, [ask(num_inference_steps=2)] * 2)
        assert set(batcher.snapshot().steps) == {1}
    assert [one.status for one in found] == ["succeeded"] * 2


def test_a_cancel_waits_for_nobodys_plan(
    tiny_checkpoint: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the device: who comes while others are planned is painted."""
    go = threading.Event()
    monkeypatch.setattr(Engine, "together", lambda *_: go.wait(60) and 1)
    with (
        load(tiny_checkpoint, device="cpu", dtype="float32", memory_budget="64MiB") as engine,
        Batcher(engine) as batcher,
    ):
        try:
            long = batcher.submit(ask(num_inference_steps=500))
            assert batcher.submit(ask(num_inference_steps=2)).result(60).status == "succeeded"
            long.cancel()
            assert long.result(60).status == "canceled"
            assert not go.is_set()
        finally:
            go.set()


def test_under_a_budget_only_those_who_move_are_on_the_device(
    tiny_checkpoint: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan is of what moves; others come and go between its steps, and none is refused in its turn."""
    with load(tiny_checkpoint, device="cpu", dtype="float32", memory_budget="64MiB") as engine:
        requests = [ask(seed=seed, num_inference_steps=3, num_outputs=2) for seed in range(3)]
        alone = [engine.predict(one) for one in requests]
        engine.together(engine.check(requests[0]).request.fields, 8)  # rehearses steps too
        monkeypatch.setattr("ritocco.device_loop.decide", in_turns)
        seated: list[int] = []
        original = TorchBatch.step

        def step(batch: TorchBatch, rows: Mapping[int, int]) -> None:
            seated.append(len(batch._seats))
            original(batch, rows)

        monkeypatch.setattr(TorchBatch, "step", step)
        with Batcher(engine) as batcher:
            found = run(batcher, requests)
    assert set(seated) == {2}
    assert [one.output for one in found] == [one.output for one in alone]
    assert all("Memory: " in one.logs for one in found)
