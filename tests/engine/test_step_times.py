"""Step times, learned: what counts as a measurement, and what is drawn from those that are there."""

from __future__ import annotations

import pytest

from ritocco.backends.runtime import LatentSize
from ritocco.step_times import FRESH, KEPT, SETTLED, STALE, StepTimes

SMALL, LARGE = LatentSize(height=8, width=8), LatentSize(height=16, width=8)


class Clock:
    """Steps of given seconds, one after the other."""

    def __init__(self) -> None:
        self.times, self.now = StepTimes(), 0.0

    def run(self, size: LatentSize, rows: int, seconds: float, count: int, who: object = "A") -> None:
        for _ in range(count):
            began, self.now = self.now, self.now + seconds
            self.times.stepped(size, rows, who, began, self.now)


def test_before_anything_is_measured_there_is_a_guess_in_proportion() -> None:
    times = StepTimes()
    assert times.step(LARGE, 2) == pytest.approx(4 * times.step(SMALL, 1))
    assert times.step(SMALL, 1) > 0
    assert times.start(SMALL) == times.finish(SMALL) == 0.0
    assert not times.tried(SMALL, 1)
    assert times.due(SMALL, 1)


def test_the_first_steps_of_a_run_do_not_count_and_the_median_of_the_latest_does() -> None:
    clock = Clock()
    clock.run(SMALL, 2, 100.0, SETTLED)
    assert not clock.times.tried(SMALL, 2)
    assert clock.times.step(LARGE, 2) == 200.0, "for want of anything better"
    clock.run(SMALL, 2, 3.0, 1)
    assert clock.times.tried(SMALL, 2)
    assert clock.times.step(SMALL, 2) == 3.0
    clock.run(SMALL, 2, 5.0, 2)
    assert clock.times.step(SMALL, 2) == 5.0
    clock.run(SMALL, 2, 1.0, KEPT)
    assert clock.times.step(SMALL, 2) == 1.0
    assert clock.times.measured() == {(SMALL, 2): 1.0}


def test_other_lanes_begin_another_run() -> None:
    clock = Clock()
    for who in range(20):
        clock.run(SMALL, 2, 2.0, SETTLED, who)
    assert not clock.times.tried(SMALL, 2)
    clock.run(SMALL, 2, 2.0, SETTLED, "A")
    clock.times.took("start", SMALL, 50.0)
    clock.run(SMALL, 2, 2.0, SETTLED, "A")
    assert not clock.times.tried(SMALL, 2), "what came between is in no step"


def test_a_short_run_counts_as_a_whole_where_the_device_was_waited_for() -> None:
    clock = Clock()
    clock.run(SMALL, 1, 9.0, FRESH, "first")  # in which a runtime gets ready
    clock.times.waited(clock.now)
    assert not clock.times.tried(SMALL, 1)
    clock.run(SMALL, 1, 0.0, 3, "second")  # the host is ahead
    clock.now += 12.0
    clock.times.waited(clock.now)
    assert clock.times.step(SMALL, 1) == 4.0


def test_other_numbers_are_drawn_from_the_measured() -> None:
    clock = Clock()
    clock.run(SMALL, 2, 4.0, 9, "two")
    clock.run(SMALL, 6, 8.0, 9, "six")
    step = clock.times.step
    assert [step(SMALL, rows) for rows in (1, 2, 3, 4, 6, 12)] == [2.0, 4.0, 5.0, 6.0, 8.0, 16.0]
    assert step(LARGE, 4) == 12.0
    clock.run(LARGE, 4, 7.0, 9, "large")
    assert (step(LARGE, 4), step(LARGE, 2)) == (7.0, 3.5)
    clock.times.took("finish", SMALL, 3.0)
    assert (clock.times.finish(SMALL), clock.times.finish(LARGE), clock.times.start(SMALL)) == (3.0, 6.0, 0.0)


def test_what_was_given_up_is_due_again_much_later() -> None:
    clock = Clock()
    clock.run(SMALL, 4, 9.0, 9, "four")
    assert not clock.times.due(SMALL, 4)
    clock.run(SMALL, 2, 1.0, STALE, "two")
    assert not clock.times.due(SMALL, 4)
    clock.run(SMALL, 2, 1.0, 1, "two")
    assert clock.times.due(SMALL, 4)
    assert clock.times.tried(SMALL, 4)
    assert not clock.times.due(SMALL, 2)
