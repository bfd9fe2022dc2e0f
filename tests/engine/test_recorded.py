"""Work that runs, is captured and is replayed: where, by whom, and what happens when a capture fails."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ritocco.backends.recorded import KEPT_SHAPES, Recorded, Replayed, Work


class Tape:
    """Counts runs, captures and replays; a replay does the work again."""

    def __init__(self, *, fails: bool = False) -> None:
        self.said: list[str] = []
        self.fails = fails

    def work(self) -> None:
        self.said.append("run")

    def capture(self, work: Work) -> Work:
        self.said.append("capture")
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def replay() -> None:
            self.said.append("replay")

        return replay


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
    tape = Tape(fails=True)
    recorded = Recorded(tape.work, tape.capture)
    recorded()
    with pytest.warns(RuntimeWarning, match="not captured, so slower: CUDA out of memory"):
        recorded()
    recorded()
    assert tape.said == ["run", "capture", "run", "run"]


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
