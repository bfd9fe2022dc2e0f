"""Who moves next: the order, its bound on waiting, and when company pays."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from ritocco.policy import Turn, Work, buckets, decide, in_order, remaining


@dataclass
class Known:
    """Times of one row at a time; others by `batch`, seconds for so many rows. Those in `untried` are due."""

    batch: Mapping[int, float] = field(default_factory=dict)
    sizes: Mapping[Any, float] = field(default_factory=dict)
    starts: float = 0.0
    finishes: float = 0.0
    untried: frozenset[int] = frozenset()

    def step(self, size: Any, rows: int) -> float:
        return self.sizes.get(size, 1.0) * self.batch.get(rows, rows)

    def start(self, size: Any) -> float:
        return self.starts

    def finish(self, size: Any) -> float:
        return self.finishes

    def tried(self, size: Any, rows: int) -> bool:
        return rows not in self.untried

    def due(self, size: Any, rows: int) -> bool:
        return rows in self.untried


def work(key: int, left: int, **changes: Any) -> Work:
    plain = Work(key=key, size="A", lanes=1, rows=1, left=left, age=0.0, started=True)
    return replace(plain, **changes)


NO_GAIN = Known()
GPU = Known(batch={1: 5.2, 2: 8.6, 4: 15.6, 8: 29.7})
FREE = Known(batch={1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0})


def keys(works: list[Work], times: Known = NO_GAIN, ageing: float = 0.1) -> list[int]:
    return [one.key for one in in_order(works, times, ageing=ageing)]


def turn(works: list[Work], times: Known = NO_GAIN, capacity: int = 8) -> Turn:
    return decide(works, times, capacity=capacity, ageing=0.1)


def test_the_least_work_goes_first_in_seconds_not_in_steps() -> None:
    assert keys([work(0, 500), work(1, 4), work(2, 100)]) == [1, 2, 0]
    large = Known(sizes={"L": 10.0, "A": 1.0})
    assert keys([work(0, 4, size="L"), work(1, 30)], large) == [1, 0]
    both = [work(0, 10, started=False), work(1, 12)]
    assert keys(both) == [0, 1]
    assert keys(both, Known(starts=3.0)) == [1, 0]
    assert keys([work(0, 10, lanes=4, rows=1), work(1, 12)], Known(finishes=1.0)) == [1, 0]


def test_waiting_counts_as_work_that_is_done_and_ties_go_to_who_came_first() -> None:
    assert keys([work(0, 100, age=970.0), work(1, 2)]) == [1, 0]
    assert keys([work(0, 100, age=990.0), work(1, 2)]) == [0, 1]
    assert keys([work(0, 100, age=990.0), work(1, 2)], ageing=0.01) == [1, 0]
    assert keys([work(5, 7), work(3, 7), work(4, 7)]) == [3, 4, 5]


def test_two_that_wait_do_not_change_places() -> None:
    pairs = [(work(0, 50, age=80.0), work(1, 40, age=3.0)), (work(0, 50, age=130.0), work(1, 40, age=3.0))]
    for pair in pairs:
        later = [replace(one, age=one.age + 1e4) for one in pair]
        assert keys(list(pair)) == keys(later)
    assert keys(list(pairs[0])) != keys(list(pairs[1]))


def test_where_a_batch_gains_nothing_the_leader_goes_alone() -> None:
    many = [work(key, 10 + key) for key in range(32)]
    assert turn(many) == Turn("step", (0,))


def test_where_a_batch_is_cheap_it_is_filled_when_enough_wait() -> None:
    many = [work(key, 10 + key) for key in range(64)]
    assert turn(many, GPU) == Turn("step", tuple(range(8)))
    assert turn(many, GPU, capacity=4) == Turn("step", (0, 1, 2, 3))
    assert turn(many[:32], GPU) == Turn("step", (0, 1, 2, 3))
    assert turn(many[:2], GPU) == Turn("step", (0,)), "1.65 times as long for two gains too little for two"
    assert turn(many[:2], FREE) == Turn("step", (0, 1))
    assert turn(many[:3], FREE) == Turn("step", (0, 1)), "a bucket is filled or not taken"


def test_company_is_of_the_leaders_size_and_next_in_order() -> None:
    works = [work(0, 1), work(1, 2, size="B"), work(2, 9), work(3, 4), work(4, 3, alone=True)]
    assert turn(works, FREE) == Turn("step", (0, 3))
    assert turn([replace(works[0], alone=True), *works[1:]], FREE) == Turn("step", (0,))


def test_a_request_moves_as_a_whole() -> None:
    four = work(0, 5, lanes=4, rows=4)
    assert turn([four, work(1, 90)], FREE, capacity=2) == Turn("step", (0,)), "more than the capacity, alone"
    assert turn([four, work(1, 90), work(2, 91)], FREE, capacity=8) == Turn("step", (0,))
    pair = work(3, 50, lanes=2, rows=2)
    assert turn([four, pair, work(1, 90), work(2, 91)], FREE, capacity=8) == Turn("step", (0, 3, 1, 2))


def test_company_is_bounded_by_what_memory_bears_of_each() -> None:
    works = [work(key, 5 + key, most=4) for key in range(9)]
    assert turn(works, FREE) == Turn("step", (0, 1, 2, 3))
    assert turn([replace(works[0], most=1), *works[1:]], FREE) == Turn("step", (0,))
    # One that bears fewer stays behind; those after it fill the step.
    assert turn([works[0], replace(works[1], most=2), *works[2:]], FREE) == Turn("step", (0, 2, 3, 4))
    assert turn([works[0], works[1], *(replace(one, most=2) for one in works[2:])], FREE) == Turn(
        "step", (0, 1)
    )


def test_finished_pictures_are_decoded_first_and_company_is_started_before_the_step() -> None:
    works = [work(0, 3), work(1, 0), work(2, 0, age=5.0)]
    assert turn(works) == Turn("finish", (2,))
    assert turn([work(0, 3, started=False), work(1, 5)]) == Turn("start", (0,))
    waiting = [work(0, 3), work(1, 5, started=False), work(2, 6)]
    assert turn(waiting[:2], FREE) == Turn("start", (1,))
    assert turn([waiting[0], replace(waiting[1], started=True)], FREE) == Turn("step", (0, 1))
    # A start that takes long is no company for a leader with one step to go.
    slow = Known(batch={1: 1.0, 2: 1.0}, starts=50.0)
    assert turn([work(0, 1), *(work(key, 90, started=False) for key in (1, 2))], slow) == Turn("step", (0,))


def test_what_was_never_tried_is_tried_once_the_smaller_one_gained() -> None:
    many = [work(key, 10 + key) for key in range(8)]
    everything = frozenset({1, 2, 4, 8})
    assert turn(many, Known(untried=everything)) == Turn("step", (0,))
    assert turn(many, Known(untried=everything - {1})) == Turn("step", (0, 1))
    assert turn(many, Known(untried=frozenset({4, 8}))) == Turn("step", (0,)), "two gained nothing"
    gains = replace(GPU, untried=frozenset({4, 8}))
    assert turn(many, gains) == Turn("step", (0, 1, 2, 3))


def test_buckets() -> None:
    assert [buckets(count) for count in (1, 2, 3, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


@pytest.mark.parametrize("times", [NO_GAIN, GPU, FREE, Known(starts=4.0, finishes=2.0, batch=GPU.batch)])
def test_company_never_makes_the_work_go_slower(times: Known) -> None:
    """The bound on waiting counts on it."""
    rng = np.random.default_rng(3)
    companies = 0
    for _ in range(300):
        works = [
            work(
                key,
                int(rng.integers(1, 60)),
                age=float(rng.integers(0, 400)),
                size="AB"[rng.integers(2)],
                started=bool(rng.integers(2)),
            )
            for key in range(int(rng.integers(1, 30)))
        ]
        chosen = turn(works, times)
        if chosen.act != "step":
            continue
        leader = min(works, key=lambda one: (remaining(one, times) - 0.1 * one.age, one.key))
        assert leader.key in chosen.keys
        companies += len(chosen.keys) > 1
        alone = sum(times.step("A", 1) for _ in chosen.keys)
        assert times.step("A", len(chosen.keys)) <= alone + 1e-9
    assert companies or times is NO_GAIN


@pytest.mark.parametrize("times", [NO_GAIN, GPU])
@pytest.mark.parametrize("ageing", [0.05, 0.2])
def test_nobody_starves_however_many_short_ones_come(times: Known, ageing: float) -> None:
    """Overload for ever: always 8 requests of 4 steps in the house besides a long one."""
    long, house = work(0, 40), 8
    fresh = itertools.count(1)
    works = [long] + [work(next(fresh), 4) for _ in range(house)]
    now, asked = 0.0, {one.key: 0.0 for one in works}
    r = remaining(long, times)
    slower = max(times.step("A", rows) for rows in (1, 2, 4, 8)) / times.step("A", 1)
    bound = r / ageing + slower * (r + house * 4 * times.step("A", 1))
    firsts = 0
    while any(one.key == 0 for one in works):
        aged = [replace(one, age=now - asked[one.key]) for one in works]
        taken = decide(aged, times, capacity=8, ageing=ageing)
        firsts += taken.act == "step" and 0 not in taken.keys
        if taken.act == "step":
            now += times.step("A", len(taken.keys))
        works = [replace(one, left=one.left - (one.key in taken.keys and one.left > 0)) for one in works]
        works = [one for one in works if not (taken.act == "finish" and one.key == taken.keys[0])]
        while len(works) - any(one.key == 0 for one in works) < house:
            works.append(work(next(fresh), 4))
            asked[works[-1].key] = now
        assert now <= bound, f"waits for ever: {now} seconds, {bound} at most"
    assert firsts > 10, "short ones did go first"
