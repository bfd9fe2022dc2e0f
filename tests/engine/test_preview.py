"""Previews: what a lane's state says of its picture, in colours; nobody pays who does not look."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from random_lanes import random_lane
from ritocco import Batcher, Engine, Prediction, Ticket, load
from ritocco.backends.network import NetworkBatch
from ritocco.backends.runtime import Batch, Floats, Lane, LaneState, LatentSize
from ritocco.backends.torch_ import TorchBatch, TorchRuntime
from ritocco.images import Inputs
from ritocco.preview import Preview, believed, cell_means, fitted
from ritocco.schedules import SCHEDULERS
from ritocco.steps import Row, preview
from virtual_runtime import PATIENCE, VirtualRuntime

Ask = Callable[..., dict[str, Any]]
CELLS = (6, 8)
FIRST_ORDER = ("DDIM", "K_EULER", "K_EULER_ANCESTRAL", "DPMSolverMultistep")


def states_of(lane: Lane, network: Any) -> list[tuple[int, LaneState]]:
    """Where it stands after each step but the last."""
    batch = NetworkBatch(network, capacity=1)
    batch.join(0, lane)
    found = []
    for index in range(len(lane.table) - 1):
        batch.step({0: index})
        found.append((index + 1, batch.peek(0)))
    return found


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", FIRST_ORDER)
def test_the_clean_latents_are_those_of_the_steps_own_output(scheduler: str, prediction: str) -> None:
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    lane = random_lane(scheduler, 6, 3, cells=CELLS, width=3, config=config | {"prediction_type": prediction})
    truths: list[Floats] = []

    def network(sample: Floats, timestep: Floats, context: Floats) -> Floats:
        row: Row = lane.table.row(len(truths))
        output: Floats = np.tanh(sample[:, :4] + 0.3)
        truths.append(preview(row, sample[0, :4] / np.float32(row.in_scale), output[0]))
        return output

    for taken, state in states_of(lane, network):
        truth = truths[taken - 1]
        error = np.abs(believed(lane, state, taken) - truth).max()
        assert error <= 2e-4 * np.abs(truth).max(), (taken, error)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_network_that_always_sees_one_picture_is_believed(scheduler: str) -> None:
    picture = random_lane("DDIM", 2, 9, cells=CELLS, width=3).latents
    lane = random_lane(scheduler, 7, 4, cells=CELLS, width=3)
    lane = replace(lane, latents=np.float32(lane.table.start_noise[0]) * lane.latents)
    count = iter(range(100))

    def network(sample: Floats, timestep: Floats, context: Floats) -> Floats:
        row = lane.table.row(next(count))
        output: Floats = ((picture - row.u * sample[:, :4] / row.in_scale) / row.v).astype(np.float32)
        return output

    for taken, state in states_of(lane, network):
        np.testing.assert_allclose(believed(lane, state, taken), picture, atol=5e-3)


def test_a_linear_autoencoder_is_found() -> None:
    rng = np.random.default_rng(2)
    latents = rng.standard_normal((4, 16, 16)).astype(np.float32)
    mixing = rng.standard_normal((3, 4)).astype(np.float32)
    colors = np.einsum("ck,khw->chw", mixing, latents) + np.float32(0.2)
    found = fitted(latents, colors)
    np.testing.assert_allclose(found[:-1].T, mixing, atol=5e-3)
    np.testing.assert_allclose(found[-1], 0.2, atol=5e-3)


def test_a_picture_without_detail_fits_its_colour() -> None:
    found = fitted(np.full((4, 4, 4), 2.0, np.float32), np.full((3, 4, 4), -0.5, np.float32))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[-1] + 2.0 * found[:-1].sum(axis=0), -0.5, atol=1e-6)


def test_means_are_of_cells() -> None:
    pixels = np.zeros((3, 16, 24), np.float32)
    pixels[1, 8:, 16:] = 1.0
    pixels[2, 0, 0] = 64.0
    found = cell_means(pixels)
    assert found.shape == (3, 2, 3)
    assert found[1].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert found[2, 0, 0] == 1.0


def test_a_broken_lane_is_grey() -> None:
    lane = random_lane("DDIM", 3, 1, cells=CELLS, width=3)
    broken = np.full((4, *CELLS), np.nan, np.float32)
    state = LaneState(latents=broken, history=np.zeros((3, 4, *CELLS), np.float32), broken_row=0)
    pixels = np.random.default_rng(0).integers(0, 256, (8 * CELLS[0], 8 * CELLS[1], 3), dtype=np.uint8)
    inputs = Inputs(pixels=pixels, mask=np.zeros(pixels.shape[:2], bool))
    made = Preview(taken=1, lanes=[lane], states=[state], inputs=inputs).pictures()
    assert made.shape == (1, *CELLS, 3)
    assert np.ptp(made) <= 1


@pytest.mark.parametrize("kind", ["network", "torch"])
def test_a_look_changes_nothing_and_sees_what_leaves(tiny_engine: Engine, kind: str) -> None:
    lanes = [
        random_lane("KLMS", 5, 1, 4.0, cells=CELLS, width=32),
        random_lane("PNDM", 4, 2, cells=CELLS, width=32),
    ]

    def opened() -> Batch:
        if kind == "network":
            return NetworkBatch(lambda sample, timestep, context: np.tanh(sample[:, :4]), capacity=2)
        runtime = cast(TorchRuntime, tiny_engine.runtime)
        return runtime.open(LatentSize(height=CELLS[0], width=CELLS[1]), 2)

    def moved(batch: Batch, looks: bool, steps: int) -> list[LaneState]:
        for slot, lane in enumerate(lanes):
            batch.join(slot, lane)
            if looks:
                np.testing.assert_array_equal(batch.peek(slot).latents, lane.latents)
        for index in range(steps):
            batch.step({0: index, 1: index})
            for slot in (0, 1) if looks else ():
                batch.peek(slot)
        return [batch.peek(slot) for slot in (0, 1)] if looks else [batch.leave(slot) for slot in (0, 1)]

    for steps in (1, 3):
        for ours, theirs in zip(moved(opened(), True, steps), moved(opened(), False, steps), strict=True):
            np.testing.assert_array_equal(ours.latents, theirs.latents)
            np.testing.assert_array_equal(ours.history, theirs.history)
            assert ours.broken_row is theirs.broken_row is None


@pytest.fixture
def runtime() -> VirtualRuntime:
    return VirtualRuntime()


class Peeked:
    """Counts looks into Batches."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: type[Any]) -> None:
        self.count = 0
        original = kind.peek

        def peek(batch: Any, slot: int) -> LaneState:
            self.count += 1
            found: LaneState = original(batch, slot)
            return found

        patch.setattr(kind, "peek", peek)


@pytest.fixture
def held(runtime: VirtualRuntime, tiny_engine: Engine) -> Any:
    from ritocco.checkpoint import load_tokenizer, open_checkpoint
    from ritocco.loading import pocket_model

    opened = open_checkpoint(pocket_model())
    engine = Engine(runtime, load_tokenizer(opened), opened.scheduler)
    batcher = Batcher(engine, clock=lambda: runtime.now)
    runtime.hold()
    yield batcher
    runtime.let_all()
    batcher.close(drain=False, timeout=PATIENCE)


def test_whoever_looks_is_answered_at_the_next_step_and_nobody_else_is(
    runtime: VirtualRuntime, held: Batcher, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    peeked = Peeked(monkeypatch, NetworkBatch)
    given = ask(scheduler="K_EULER", guidance_scale=1, num_inference_steps=6, num_outputs=2)
    ticket = held.submit(given)
    told: list[int] = []
    other = held.submit(given, on_step=lambda done, total: told.append(done))

    def go(*, to: int) -> None:
        """Until the next network waits, so many later."""
        for _ in range(to):
            runtime.let()
            runtime.arrive()

    assert runtime.arrive() == "start"
    go(to=2)  # both have started, and a step waits
    go(to=2)
    assert peeked.count == 0, "nobody has looked"
    assert ticket.look() is None
    go(to=2)
    first = ticket.look()
    assert first is not None
    assert peeked.count == 2, "its two pictures, once"
    assert first.pictures().shape == (2, 8, 8, 3)
    assert [state.latents.shape for state in first.states] == [(4, 8, 8)] * 2
    go(to=1)
    second = ticket.look()
    assert second is not None
    assert second.taken >= first.taken
    runtime.let_all()
    assert ticket.result(PATIENCE).status == other.result(PATIENCE).status == "succeeded"
    assert ticket.look() is None, "what has ended holds nothing"
    assert told == [1, 2, 3, 4, 5, 6]


def test_a_look_that_fails_costs_the_preview_alone(
    runtime: VirtualRuntime,
    held: Batcher,
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(batch: Any, slot: int) -> LaneState:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(NetworkBatch, "peek", broken)
    ticket = held.submit(ask(scheduler="K_EULER", guidance_scale=1, num_inference_steps=3))
    assert runtime.arrive() == "start"
    ticket.look()
    runtime.let_all()
    assert ticket.result(PATIENCE).status == "succeeded"
    assert ticket.look() is None
    assert f"no preview of prediction {ticket.id}" in caplog.text


def looked_at(
    batcher: Batcher, given: Mapping[str, Any], seen: list[Preview] | None = None, **options: Any
) -> Prediction:
    """A request that somebody looks at after every step."""
    tickets: list[Ticket] = []
    here = threading.Event()

    def look(done: int, total: int) -> None:
        found = tickets[0].look()
        if seen is not None and found is not None:
            seen.append(found)

    tickets.append(batcher.submit(given, on_start=lambda: here.wait(PATIENCE), on_step=look, **options))
    here.set()
    return tickets[0].result(PATIENCE)


def test_pictures_do_not_depend_on_looks(
    tiny_engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    peeked = Peeked(monkeypatch, TorchBatch)
    requests = [
        ask(scheduler=scheduler, num_inference_steps=5, seed=place, num_outputs=1 + place % 2)
        for place, scheduler in enumerate(SCHEDULERS)
    ]
    for given in requests:
        alone = tiny_engine.predict(given)
        with Batcher(tiny_engine) as batcher:
            assert looked_at(batcher, given).output == alone.output
    assert peeked.count > len(requests)


def test_the_embedded_models_preview_comes_near_its_picture() -> None:
    """Before the last step, the mean colours of the cells are about those of the picture that comes out."""
    assets = Path(str(files("ritocco"))) / "assets"
    given: Mapping[str, Any] = {
        "image": assets / "coffee.jpg",
        "mask": assets / "coffee-mask.png",
        "width": 256,
        "height": 256,
        "num_inference_steps": 6,
        "seed": 5,
    }
    seen: list[Preview] = []
    with load(device="cpu", dtype="float32") as engine, Batcher(engine) as batcher:
        made = looked_at(batcher, given, seen, paste_back=False)
    last = seen[-1].pictures()[0].astype(np.float32)
    picture = np.asarray(made.images[0], np.float32).transpose(2, 0, 1)
    truth = cell_means(picture).transpose(1, 2, 0)
    errors: Sequence[float] = [float(np.abs(one - truth).mean()) for one in (last, 0 * truth + truth.mean())]
    assert errors[0] < 0.5 * errors[1], errors
