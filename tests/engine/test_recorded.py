"""Work that runs, is captured and is replayed: where, by whom, and what happens when a capture fails."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ritocco.backends.recorded import KEPT_SHAPES, Recorded, Replayed, Work, cuda_graphs


class Tape:
    """Counts runs, captures and replays, and how often there was to be room. fails: what captures raise."""

    def __init__(self, fails: list[Exception] | None = None) -> None:
        self.said: list[str] = []
        self.fails = fails or []

    def work(self) -> None:
        self.said.append("run")

    def capture(self, work: Work) -> Work:
        self.said.append("capture")
        if self.fails:
            raise self.fails.pop(0)

        def replay() -> None:
            self.said.append("replay")

        return replay

    def make_room(self, recorded: Recorded) -> None:
        self.said.append("make room")


def in_a_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_it_runs_then_is_captured_then_replayed() -> None:
    tape = Tape()
    recorded = Recorded(tape.work, tape.capture)
    for _ in range(3):
        recorded()
    assert tape.said == ["run", "capture", "replay", "replay"]


def test_only_a_thread_that_ran_it_captures_and_any_replays() -> None:
    tape = Tape()
    recorded = Recorded(tape.work, tape.capture)
    recorded()
    in_a_thread(recorded)
    assert tape.said == ["run", "run"]
    recorded()
    recorded()
    in_a_thread(recorded)
    assert tape.said == ["run", "run", "run", "capture", "replay", "replay"]


def test_a_capture_that_fails_is_said_once_and_the_work_goes_on_running() -> None:
    tape = Tape([RuntimeError("operation not permitted when stream is capturing")])
    recorded = Recorded(tape.work, tape.capture, tape.make_room)
    recorded()
    with pytest.warns(RuntimeWarning, match="not captured, so slower: operation not permitted"):
        recorded()
    recorded()
    assert tape.said == ["run", "capture", "run", "run"]


def after_no_memory() -> Exception:
    """What ends a capture in which memory ran out."""
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory.")
    return error


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: out of memory"), after_no_memory()],
    ids=["torch", "driver", "end"],
)
def test_a_capture_without_memory_makes_room_and_is_tried_again(error: Exception) -> None:
    tape = Tape([error])
    recorded = Recorded(tape.work, tape.capture, tape.make_room)
    for _ in range(4):
        recorded()
    assert tape.said == ["run", "capture", "make room", "run", "capture", "replay", "replay"]


def test_a_capture_that_never_finds_memory_is_given_up_after_the_third() -> None:
    tape = Tape([torch.OutOfMemoryError("CUDA out of memory") for _ in range(9)])
    recorded = Recorded(tape.work, tape.capture, tape.make_room)
    for _ in range(3):
        recorded()
    with pytest.warns(RuntimeWarning, match="not captured, so slower: CUDA out of memory"):
        recorded()
    recorded()
    failed = ["capture", "make room", "run"]
    assert tape.said == ["run", *failed, *failed, *failed, "run"]


def test_a_function_is_recorded_for_each_shape_and_the_latest_are_kept() -> None:
    calls: list[int] = []

    def double(x: Tensor) -> Tensor:
        calls.append(len(x))
        return 2 * x

    captured: list[int] = []

    def capture(work: Work) -> Work:
        captured.append(1)
        work()
        return work

    replayed = Replayed(double, capture)
    for turn in range(3):
        for size in range(1, KEPT_SHAPES + 1):
            given = torch.arange(size) + turn
            assert torch.equal(replayed(given), 2 * given)
    assert len(captured) == KEPT_SHAPES
    replayed(torch.zeros(100))  # the ninth: the least used goes, and begins anew
    replayed(torch.zeros(2))
    replayed(torch.zeros(1))
    assert len(captured) == KEPT_SHAPES
    replayed(torch.zeros(1))
    assert len(captured) == KEPT_SHAPES + 1


def test_what_is_forgotten_is_captured_anew_and_one_can_stay() -> None:
    captured: list[Work] = []

    def capture(work: Work) -> Work:
        captured.append(work)
        return work

    replayed = Replayed(torch.neg, capture)
    for _ in range(2):
        for size in (1, 2):
            replayed(torch.ones(size))
    kept, gone = (weakref.ref(replayed._held[(size,)]) for size in (1, 2))
    one = kept()
    assert one is not None
    replayed.forget(but=one.recorded)
    assert gone() is None, "without the garbage collector"
    for size, count in ((1, 2), (1, 2), (2, 2), (2, 3)):
        assert replayed(torch.ones(size)).tolist() == [-1] * size
        assert len(captured) == count
    replayed.forget()
    del one
    assert kept() is None


class Graph:
    """Of a CUDA that is not there."""

    def replay(self) -> None:
        """Nothing."""


def test_graphs_share_a_pool_while_one_of_them_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[int] = []

    @contextlib.contextmanager
    def capturing(graph: Graph, *, pool: int, **_: Any) -> Iterator[None]:
        pools.append(pool)
        yield

    handles = iter(range(9))
    for name, stand_in in {
        "graph_pool_handle": lambda: next(handles),
        "Stream": lambda device: "aside",
        "current_stream": lambda device: "own",
        "set_stream": lambda stream: None,
        "CUDAGraph": Graph,
        "graph": capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    capture = cuda_graphs(torch.device("cuda"))

    def work() -> None:
        """Nothing."""

    first, second = capture(work), capture(work)
    del first
    third = capture(work)
    assert len(set(pools)) == 1
    del second, third
    capture(work)
    assert pools[3] != pools[0]
