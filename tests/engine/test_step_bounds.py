"""Plans of company that are made in a thread of their own."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import ritocco
from ritocco.batcher import Batcher
from ritocco.step_bounds import StepBounds
from ritocco.tickets import Entry, Ticket

PATIENCE_S = 60


def entry(lanes: int) -> Entry:
    """As far as a plan looks at one."""
    job = SimpleNamespace(request=SimpleNamespace(fields=lanes))
    return Entry(ticket=cast(Any, None), job=cast(Any, job), key=lanes, arrived=0.0)


def test_one_until_it_is_planned_and_each_is_planned_once() -> None:
    go, asked = threading.Event(), []

    def plan(fields: Any) -> int:
        assert go.wait(PATIENCE_S)
        asked.append(fields)
        return int(fields)

    bounds, four, eight = StepBounds(plan), entry(4), entry(8)
    try:
        bounds.look_at([four, eight])
        assert (bounds.of(four), bounds.of(eight)) == (1, 1)
        go.set()
        until = time.monotonic() + PATIENCE_S
        while bounds.of(eight) == 1 and time.monotonic() < until:
            bounds.look_at([four, eight])
            time.sleep(0.01)
        assert (bounds.of(four), bounds.of(eight), asked) == (4, 8, [4, 8])
    finally:
        go.set()
        bounds.close()


def test_once_it_is_closed_everybody_new_moves_alone() -> None:
    """As at the interpreter's end, where no thread starts any more."""
    bounds = StepBounds(lambda fields: 8)
    bounds.close()
    late = entry(8)
    bounds.look_at([late])
    assert bounds.of(late) == 1


@pytest.mark.slow
def test_a_batcher_with_nothing_to_do_keeps_nobodys_pictures(
    tiny_checkpoint: Path, ask: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Ticket]] = []
    original = StepBounds.look_at

    def look_at(bounds: StepBounds, entries: Any) -> None:
        seen.extend(weakref.ref(one.ticket) for one in entries)
        original(bounds, entries)

    monkeypatch.setattr(StepBounds, "look_at", look_at)
    with (
        ritocco.load(tiny_checkpoint, device="cpu", dtype="float32", memory_budget="64MiB") as engine,
        Batcher(engine) as batcher,
    ):
        batcher.submit(ask(num_inference_steps=2)).result(PATIENCE_S)
        until = time.monotonic() + PATIENCE_S
        while any(one() is not None for one in seen) and time.monotonic() < until:
            gc.collect()
            time.sleep(0.05)
        assert seen
        assert all(one() is None for one in seen)
