"""The torch runtime's fast path (fused kernels, packed projections, captured steps) against the plain one.

On a GPU; else with Triton's interpreter, and with work that is run again instead of replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accelerator import DEVICE, GPU
from random_lanes import random_lane
from ritocco.backends.fast_path import FastPath, _cudnn
from ritocco.backends.recorded import again
from ritocco.backends.runtime import Lane, LaneState, LatentSize
from ritocco.backends.torch_ import TorchBatch, TorchRuntime
from ritocco.backends.torch_graph import StepGraph, StepGraphs
from ritocco.checkpoint import open_checkpoint
from ritocco.errors import NonFiniteError
from ritocco.schedules import SCHEDULERS

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu] if GPU else list[pytest.MarkDecorator]()

PLAIN = FastPath(kernels=False, packed=False, graphs=False, search=False)
FAST = FastPath(kernels=True, packed=True, graphs=True, search=GPU)
SIZE = LatentSize(height=4, width=8)
# float32, relative to the largest value: the same sums in another order, enlarged by guidance and steps.
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def runtimes(tiny_checkpoint: Path) -> tuple[TorchRuntime, TorchRuntime]:
    """The plain one and the fast one, float32."""
    checkpoint = open_checkpoint(tiny_checkpoint)
    plain, fast = (
        TorchRuntime(checkpoint, device=DEVICE, dtype=torch.float32, path=path) for path in (PLAIN, FAST)
    )
    return plain, fast


def make_lane(*asked: Any, **changes: Any) -> Lane:
    lane = random_lane(*asked, cells=(SIZE.height, SIZE.width), width=32)
    return replace(lane, **({"latents": np.float32(lane.table.start_noise[0]) * lane.latents} | changes))


def run(batch: TorchBatch, lanes: Sequence[Lane]) -> list[LaneState]:
    for slot, lane in enumerate(lanes):
        batch.join(slot, lane)
    for index in range(max(len(lane.table) for lane in lanes)):
        batch.step({slot: index for slot, lane in enumerate(lanes) if index < len(lane.table)})
    return [batch.leave(slot) for slot in range(len(lanes))]


def assert_close(ours: LaneState, theirs: LaneState) -> None:
    for name in ("latents", "history"):
        result, truth = getattr(ours, name), getattr(theirs, name)
        assert float(np.abs(result - truth).max()) <= TOLERANCE * float(np.abs(truth).max()), name
    assert ours.broken_row == theirs.broken_row


def test_lanes_equal_plain(runtimes: tuple[TorchRuntime, TorchRuntime]) -> None:
    plain, fast = runtimes
    # One with guidance and noise, and a seed of all 64 bits; one with neither, which leaves first.
    lanes = [make_lane("K_EULER_ANCESTRAL", 2, 2**64 - 1, 4.0), make_lane("DPMSolverMultistep", 1, 2)]
    for ours, theirs in zip(run(fast.open(SIZE, 2), lanes), run(plain.open(SIZE, 2), lanes), strict=True):
        assert_close(ours, theirs)


def test_a_look_at_captured_lanes_is_what_leaves(runtimes: tuple[TorchRuntime, TorchRuntime]) -> None:
    batch = runtimes[1].open(SIZE, 2)
    for slot in (1, 0):
        batch.join(slot, make_lane("DDIM", 2, slot))
    batch.step({1: 0, 0: 0})
    seen = [batch.peek(slot) for slot in (0, 1)]
    for ours, slot in zip(seen, (0, 1), strict=True):
        theirs = batch.leave(slot)
        np.testing.assert_array_equal(ours.latents, theirs.latents)
        np.testing.assert_array_equal(ours.history, theirs.history)
        assert ours.history.any()


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of torch's operations, in their order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 3])
def test_beside_a_replay_a_step_is_two_copies(
    runtimes: tuple[TorchRuntime, TorchRuntime], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Of the numbers and of the time vectors, however many lanes there are."""
    fast = runtimes[1]
    replays: list[int] = []
    monkeypatch.setattr(StepGraph, "_work", lambda graph: replays.append(1))
    monkeypatch.setattr(fast, "graphs", StepGraphs(fast.unet, again, torch.float32))
    batch = fast.open(SIZE, count)
    for slot in range(count):
        batch.join(slot, make_lane("K_EULER_ANCESTRAL", 4, slot, 4.0))
    for row in range(4):
        with Dispatched() as dispatched:
            batch.step(dict.fromkeys(range(count), row))
        if row:
            assert dispatched.names == ["aten.copy_.default", "aten.stack.out"]
    assert len(replays) == 4


def test_compiled_lanes_equal_plain(
    runtimes: tuple[TorchRuntime, TorchRuntime], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is one graph to torch's compiler, whatever makes code of it."""
    made: list[Any] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    path = replace(PLAIN, compiled=True)
    compiled = TorchRuntime(open_checkpoint(tiny_checkpoint), device=DEVICE, dtype=torch.float32, path=path)
    lanes = [make_lane("K_EULER_ANCESTRAL", 2, 5, 4.0), make_lane("DPMSolverMultistep", 2, 2)]
    found, wanted = (run(one.open(SIZE, 2), lanes) for one in (compiled, runtimes[0]))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)
    assert len(made) == 1, "the second step ran what the first had made"


@pytest.mark.slow
def test_lanes_of_every_scheduler_equal_plain(runtimes: tuple[TorchRuntime, TorchRuntime]) -> None:
    plain, fast = runtimes
    # Some leave after two steps, and a group of another shape goes on.
    lanes = [
        make_lane(name, 2 + index % 2, 2**64 - 1 - index, 1.0 if name == "KLMS" else 4.0)
        for index, name in enumerate(SCHEDULERS)
    ]
    for ours, theirs in zip(run(fast.open(SIZE, 6), lanes), run(plain.open(SIZE, 6), lanes), strict=True):
        assert_close(ours, theirs)


@pytest.mark.slow
def test_two_batches_of_a_kind_take_turns(runtimes: tuple[TorchRuntime, TorchRuntime]) -> None:
    plain, fast = runtimes
    lanes = [make_lane("DDIM", 3, 1, 2.0), make_lane("K_EULER_ANCESTRAL", 3, 2, 3.0)]
    batches = [fast.open(SIZE, 1) for _ in lanes]
    for batch, lane in zip(batches, lanes, strict=True):
        batch.join(0, lane)
    for index in range(3):
        for batch in batches:
            batch.step({0: index})
    for batch, lane in zip(batches, lanes, strict=True):
        assert_close(batch.leave(0), run(plain.open(SIZE, 1), [lane])[0])


@pytest.mark.slow
def test_a_lane_that_rejoins_or_repeats_a_row_ends_up_equal(
    runtimes: tuple[TorchRuntime, TorchRuntime],
) -> None:
    states = []
    for runtime in runtimes:
        lane = make_lane("PNDM", 2, 3, 2.0)
        batch = runtime.open(SIZE, 2)
        batch.join(1, lane)
        batch.step({1: 0})
        state = batch.leave(1)
        batch.join(0, replace(lane, latents=state.latents, history=state.history))
        batch.step({0: 0})  # not the row that was prepared for
        batch.step({0: 1})
        states.append(batch.leave(0))
    assert_close(states[1], states[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_the_first_broken_row_is_recorded(runtimes: tuple[TorchRuntime, TorchRuntime]) -> None:
    _, fast = runtimes
    lane = make_lane("DDIM", 2, 4)
    broken = make_lane("DDIM", 2, 4, latents=np.full_like(lane.latents, np.inf))
    assert [state.broken_row for state in run(fast.open(SIZE, 2), [lane, broken])] == [None, 0]


def test_networks_around_the_loop_equal_plain(runtimes: tuple[TorchRuntime, TorchRuntime]) -> None:
    plain, fast = runtimes
    rng = np.random.default_rng(0)
    for name, given in (
        ("encode_text", [rng.integers(0, 100, (2, 77)) for _ in range(3)]),
        ("encode_image", [rng.standard_normal((1, 3, 16, 32), dtype=np.float32) for _ in range(3)]),
        ("decode", [rng.standard_normal((2, 4, 2, 4), dtype=np.float32) for _ in range(3)]),
    ):
        results = [getattr(fast, name)(one) for one in given]  # run, captured, replayed
        for result, one in zip(results, given, strict=True):
            truth = getattr(plain, name)(one)
            assert float(np.abs(result - truth).max()) <= TOLERANCE * float(np.abs(truth).max()), name


def test_pictures_that_cross_as_bytes_equal_those_of_the_host(
    runtimes: tuple[TorchRuntime, TorchRuntime],
) -> None:
    plain, fast = runtimes
    rng = np.random.default_rng(1)
    pixels, mask = rng.integers(0, 256, (16, 32, 3), np.uint8), rng.random((16, 32)) > 0.5
    latents = rng.standard_normal((2, 4, 2, 4), dtype=np.float32)
    for hidden in (None, mask):
        truth = plain.encode_pixels(pixels, hidden)
        assert np.abs(fast.encode_pixels(pixels, hidden) - truth).max() <= TOLERANCE * np.abs(truth).max()
    for kept in (None, (pixels, mask)):
        wanted, made = (one.decode_pixels(latents, kept).astype(int) for one in (plain, fast))
        assert np.abs(made - wanted).max() <= 1, "a last digit, where the two round to either side"
        assert (made == wanted).mean() > 0.99
    assert (made[:, ~mask] == pixels[~mask]).all()
    for one in runtimes:
        with pytest.raises(NonFiniteError, match="the decoded image holds NaN or infinity"):
            one.decode_pixels(np.where(latents > 2, np.float32(np.nan), latents), None)


def test_packed_weights_are_not_held_twice(runtimes: tuple[TorchRuntime, TorchRuntime]) -> None:
    plain, fast = runtimes
    names = dict(plain.unet.named_parameters())
    held = {parameter.untyped_storage().data_ptr(): parameter for parameter in fast.unet.parameters()}
    size = sum(one.untyped_storage().nbytes() for one in held.values())
    assert size == sum(parameter.numel() * 4 for parameter in names.values())
    for name, parameter in fast.unet.named_parameters():
        assert torch.equal(parameter, names[name]), name


def settings() -> tuple[bool, bool]:
    return torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32


def test_settings_of_torch_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two threads are inside at once, and the first to come is the first to go."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = settings()
    first, second = (_cudnn.set(search=True) for _ in range(2))
    for block in (first, second):
        block.__enter__()
        assert settings() == (True, False)
    first.__exit__(None, None, None)
    assert settings() == (True, False)
    second.__exit__(None, None, None)
    assert settings() == before


def test_graphs_take_kernels_and_packed() -> None:
    with pytest.raises(ValueError, match="graphs is True"):
        replace(FAST, packed=False)


def test_a_cpu_takes_the_plain_path() -> None:
    assert FastPath.of(torch.device("cpu")) == (PLAIN, ())


def test_a_gpu_where_triton_fails_takes_the_plain_path_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(device: torch.device) -> str:
        return "Triton fails here (RuntimeError: no C compiler)"

    monkeypatch.setattr("ritocco.backends.fast_path._trouble", failing)
    path, (said,) = FastPath.of(torch.device("cuda"))
    assert (path.kernels, path.graphs, path.packed) == (False, False, True)
    assert (
        said == "without fused kernels and graphs, so slower: Triton fails here (RuntimeError: no C compiler)"
    )
