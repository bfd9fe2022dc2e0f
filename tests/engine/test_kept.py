"""Results that are kept, asked for by several threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from ritocco.kept import Kept

PATIENCE_S = 60


def test_those_asked_for_last_are_kept() -> None:
    made: list[str] = []
    kept: Kept[str] = Kept(2)

    def make(name: str) -> str:
        made.append(name)
        return name

    for name in ("a", "b", "a", "c", "a", "c", "b"):
        assert kept.get(name, partial(make, name)) == name
    assert made == ["a", "b", "c", "b"]


def test_who_finds_one_waits_for_nobody_and_each_is_made_once() -> None:
    kept: Kept[int] = Kept(8, threading.Lock())
    assert kept.get("known", lambda: 0) == 0
    begun, go = threading.Event(), threading.Event()
    made: list[int] = []

    def slow() -> int:
        begun.set()
        assert go.wait(PATIENCE_S)
        made.append(1)
        return len(made)

    with ThreadPoolExecutor(3) as threads:
        try:
            first = threads.submit(kept.get, "slow", slow)
            assert begun.wait(PATIENCE_S)
            second = threads.submit(kept.get, "slow", slow)
            assert threads.submit(kept.get, "known", slow).result(PATIENCE_S) == 0
            assert [one.done() for one in (first, second)] == [False, False]
        finally:
            go.set()
        assert first.result(PATIENCE_S) == second.result(PATIENCE_S) == 1


def test_what_fails_is_made_again() -> None:
    kept: Kept[int] = Kept(8, threading.Lock())
    with pytest.raises(ZeroDivisionError):
        kept.get("one", lambda: 1 // 0)
    assert kept.get("one", lambda: 1) == 1
