"""The batcher on a virtual clock: who goes first, every way to end, and that every ticket does."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from ritocco import (
    BackendError,
    Batcher,
    BusyError,
    DeviceLostError,
    Engine,
    RequestError,
    Ticket,
    TimeLimitError,
)
from ritocco.checkpoint import load_tokenizer, open_checkpoint
from ritocco.loading import pocket_model
from ritocco.pool import INTERRUPTED
from ritocco.progress import Log
from ritocco.safety import NSFW_ERROR, SafetyChecker
from virtual_runtime import PATIENCE, VirtualRuntime

Ask = Callable[..., dict[str, Any]]
Make = Callable[..., Batcher]
EULER = "K_EULER"  # as many rows as steps


@pytest.fixture
def runtime() -> VirtualRuntime:
    return VirtualRuntime()


@pytest.fixture(scope="module")
def engine_on() -> Callable[..., Engine]:
    opened = open_checkpoint(pocket_model())

    def make(runtime: VirtualRuntime, **options: Any) -> Engine:
        return Engine(runtime, load_tokenizer(opened), opened.scheduler, **options)

    return make


@pytest.fixture
def make(runtime: VirtualRuntime, engine_on: Callable[..., Engine]) -> Iterator[Make]:
    """A batcher on the virtual runtime, and its clock; closed at the end, whatever it holds."""
    made: list[Batcher] = []

    def batcher(engines: Any = None, **options: Any) -> Batcher:
        made.append(Batcher(engines or engine_on(runtime), clock=lambda: runtime.now, **options))
        return made[-1]

    yield batcher
    runtime.let_all()
    for one in made:
        one.close(drain=False, timeout=PATIENCE)


@pytest.fixture
def asked(ask: Ask) -> Callable[..., dict[str, Any]]:
    """A request of so many steps and a seed, which the virtual runtime writes down."""

    def given(steps: int, seed: int, **changes: Any) -> dict[str, Any]:
        plain = {"scheduler": EULER, "guidance_scale": 1, "num_inference_steps": steps, "seed": seed}
        return ask(**(plain | changes))

    return given


def queued(batcher: Batcher, runtime: VirtualRuntime, *requests: dict[str, Any]) -> list[Ticket]:
    """Submit while the first of them waits at its start, then let everything go."""
    runtime.hold()
    tickets = [batcher.submit(requests[0])]
    assert runtime.arrive() == "start"
    tickets += [batcher.submit(one) for one in requests[1:]]
    runtime.let_all()
    return tickets


def results(tickets: list[Ticket]) -> list[Any]:
    return [ticket.result(PATIENCE) for ticket in tickets]


def runs(runtime: VirtualRuntime) -> list[tuple[int, ...]]:
    """Seeds of the steps, each run once."""
    steps = runtime.steps()
    return [one for one, before in zip(steps, [None, *steps], strict=False) if one != before]


def test_a_short_request_passes_a_long_one(runtime: VirtualRuntime, make: Make, asked: Ask) -> None:
    runtime.hold()
    batcher = make(capacity=1)
    long = batcher.submit(asked(100, 1))
    runtime.let(2)
    assert [runtime.arrive() for _ in range(3)] == ["start", "step", "step"]
    short = batcher.submit(asked(4, 2))
    runtime.let_all()
    results([long, short])
    assert runtime.steps() == [(1,)] * 2 + [(2,)] * 4 + [(1,)] * 98, "the step under way, then the short one"


def test_requests_of_two_sizes_take_turns_by_their_work(
    runtime: VirtualRuntime, make: Make, asked: Ask
) -> None:
    runtime.step_seconds = lambda cells, rows: cells / 64 * rows
    first = asked(6, 9)  # which measures a step
    tickets = queued(
        make(capacity=1), runtime, first, asked(10, 1), asked(6, 2, size=(128, 64)), asked(12, 3)
    )
    results(tickets)
    assert runs(runtime) == [(9,), (1,), (2,), (3,)], "six large steps are twelve small ones' work"


def test_with_age_the_long_request_comes_to_its_turn(runtime: VirtualRuntime, make: Make, asked: Ask) -> None:
    """A short one follows another for ever; the bound of the policy says when the long one is done."""
    batcher, done = make(ageing=0.5), threading.Event()
    count = iter(range(10, 1000))

    def another(_: Ticket) -> None:
        if not done.is_set():
            batcher.submit(asked(5, next(count))).add_done_callback(another)

    runtime.hold()
    another(batcher.submit(asked(5, 1)))
    assert runtime.arrive() == "start"
    another(batcher.submit(asked(5, 2)))
    long = batcher.submit(asked(60, 3))
    ended: list[float] = []

    def end(_: Ticket) -> None:
        ended.append(runtime.now)
        done.set()

    long.add_done_callback(end)
    runtime.let_all()
    long.result(PATIENCE)
    first = runtime.steps().index((3,))
    assert first >= 15, "others went first while they had less to do"
    # r / a and what was in the house then: itself and two short ones, each with one that is being asked for.
    assert ended[0] <= 60 / 0.5 + 60 + 4 * 5 + 5


@pytest.mark.parametrize("gain", [False, True])
def test_a_batch_is_filled_only_where_that_pays(
    runtime: VirtualRuntime, make: Make, asked: Ask, gain: bool
) -> None:
    runtime.step_seconds = lambda cells, rows: 1.0 + 0.1 * rows if gain else 1.0 * rows
    batcher = make()
    results(queued(batcher, runtime, *(asked(40, seed) for seed in range(8))))
    filled = [len(one) for one in runtime.steps()]
    if gain:
        assert max(filled) == 8
        assert sum(filled) / len(filled) > 4
    else:
        assert set(filled) == {1, 2}
        assert filled.count(2) <= 10, "tried once, and given up"
    assert sum(filled) == 8 * 40
    snapshot = batcher.snapshot()
    assert snapshot.fill == pytest.approx(sum(filled) / len(filled))
    assert snapshot.steps == {lanes: filled.count(lanes) for lanes in sorted(set(filled))}
    assert snapshot.outcomes == {"succeeded": 8}
    assert snapshot.step_seconds[0][64, 64, 1] == pytest.approx(1.1 if gain else 1.0)
    assert (snapshot.waiting, snapshot.set_aside, snapshot.running, snapshot.lanes) == (0, 0, 0, 0)


def test_a_full_queue_refuses_before_it_looks(runtime: VirtualRuntime, make: Make, asked: Ask) -> None:
    batcher = make(waiting=2)
    runtime.hold()
    running = batcher.submit(asked(5, 1))
    assert runtime.arrive() == "start"
    waiting = [batcher.submit(asked(5, 2)), batcher.submit(asked(5, 3))]
    with pytest.raises(BusyError, match="2 requests are waiting") as caught:
        batcher.submit({"image": object()})
    assert caught.value.retry_after > 0
    assert batcher.snapshot().waiting == 2
    runtime.let_all()
    results([running, *waiting])
    assert batcher.submit(asked(1, 4)).result(PATIENCE).status == "succeeded"


def test_a_bad_request_is_refused_in_the_callers_thread_and_takes_no_place(
    make: Make, asked: Ask, runtime: VirtualRuntime
) -> None:
    batcher = make(waiting=1)
    for _ in range(3):
        with pytest.raises(RequestError, match="num_inference_steps"):
            batcher.submit(asked(501, 1))
        with pytest.raises(RequestError, match="image"):
            batcher.submit(asked(1, 1, image="bench.png"), allow_local=False)
    with pytest.raises(TypeError, match="colour"):
        batcher.submit(asked(1, 1), colour=1)
    assert runtime.done == []
    assert batcher.submit(asked(1, 1)).result(PATIENCE).status == "succeeded"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"capacity": 0}, "capacity"),
        ({"capacity": 1.5}, "capacity"),
        ({"capacity": True}, "capacity"),
        ({"waiting": "64"}, "waiting"),
        ({"ageing": None}, "ageing"),
        ({"time_limit": float("nan")}, "time_limit"),
        ({"time_limit": "1 h"}, "time_limit"),
        ({"waiting": 0}, "waiting"),
        ({"ageing": 0.0}, "ageing"),
        ({"time_limit": 0.0}, "time_limit"),
    ],
)
def test_options_are_checked(
    runtime: VirtualRuntime, engine_on: Callable[..., Engine], options: dict[str, Any], field: str
) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        Batcher(engine_on(runtime), **options)
    assert caught.value.field == field
    with pytest.raises(RequestError, match="one checkpoint"):
        Batcher([engine_on(runtime), engine_on(runtime, version="other")])
    with Batcher(engine_on(runtime, version="one")) as batcher:
        assert batcher.version == "one"


@pytest.mark.parametrize("engines", [[], None, 1, [1], "engine", ["engine"], [None], {}])
def test_engines_that_are_none(engines: Any) -> None:
    with pytest.raises(RequestError, match=r"engines is .*; it must be an Engine") as caught:
        Batcher(engines)
    assert caught.value.field == "engines"


def test_an_engine_stands_there_once(runtime: VirtualRuntime, engine_on: Callable[..., Engine]) -> None:
    engine = engine_on(runtime)
    with pytest.raises(RequestError, match="may stand there once") as caught:
        Batcher([engine, engine])
    assert caught.value.field == "engines"


def test_the_live_prediction(runtime: VirtualRuntime, make: Make, asked: Ask) -> None:
    runtime.hold()
    seen: list[tuple[int, int]] = []
    ticket = make().submit(
        asked(3, 7), id="abc", created_at="2024-01-01T00:00:00.000Z", on_step=lambda *at: seen.append(at)
    )
    prediction = ticket.prediction
    assert (ticket.id, prediction.id, prediction.created_at) == ("abc", "abc", "2024-01-01T00:00:00.000Z")
    assert prediction.logs.startswith("Using seed: 7\n")
    assert runtime.arrive() == "start"
    assert (prediction.status, prediction.completed_at) == ("processing", None)
    assert prediction.started_at is not None
    for taken in range(3):
        runtime.let()
        assert runtime.arrive() == "step"
        assert prediction.logs.count("/3 [") == taken == len(seen)
    runtime.let()
    assert runtime.arrive() == "finish"
    assert not ticket.done()
    runtime.let()
    assert ticket.result(PATIENCE) is prediction
    assert prediction.status == "succeeded"
    assert prediction.output is not None
    assert len(prediction.images) == 1
    assert prediction.completed_at is not None
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert set(prediction.metrics) == {
        *("inputs", "waited", "text", "encode", "denoise", "decode", "outputs", "predict_time")
    }


def test_an_ended_prediction_is_seen_whole(
    runtime: VirtualRuntime, make: Make, asked: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The status comes last."""
    ticket = make().submit(asked(1, 1))
    seen = []
    original = Log.text

    def text(log: Log) -> str:
        seen.append(ticket.prediction.status)
        return original(log)

    monkeypatch.setattr(Log, "text", text)
    assert ticket.result(PATIENCE).status == "succeeded"
    assert set(seen) <= {"starting", "processing"}


@pytest.mark.parametrize("state", ["waiting", "start", "step", "finish", "ended"])
def test_cancel_in_every_state(runtime: VirtualRuntime, make: Make, asked: Ask, state: str) -> None:
    runtime.hold()
    batcher = make()
    other = batcher.submit(asked(2, 1))
    assert runtime.arrive() == "start"
    ticket = batcher.submit(asked(3, 2))
    order = ["start", "step", "step", "finish", "start", "step", "step", "step", "finish"]
    stop = {"waiting": 0, "start": 4, "step": 6, "finish": 8}
    for name in order[1 : stop.get(state, 0) + 1]:
        runtime.let()
        assert runtime.arrive() == name
    if state == "ended":
        runtime.let_all()
        ticket.result(PATIENCE)
    ticket.cancel()
    before = len(runtime.done)
    runtime.let_all()
    prediction = ticket.result(PATIENCE)
    assert prediction.status == ("succeeded" if state == "ended" else "canceled")
    if state != "ended":
        assert prediction.output is None
        assert prediction.images == []
        assert prediction.error is None
        taken = {"waiting": 0, "start": 0, "step": 2, "finish": 3}[state]
        assert prediction.logs.splitlines()[-1] == f"Canceled after {taken} of 3 steps"
        if state != "waiting":
            assert len(runtime.done) - before <= 1, "within one step"
    assert other.result(PATIENCE).status == "succeeded"
    assert batcher.submit(asked(1, 3)).result(PATIENCE).status == "succeeded"


def test_what_waits_has_let_go_of_its_sources(
    runtime: VirtualRuntime, engine_on: Callable[..., Engine], asked: Ask
) -> None:
    request = engine_on(runtime).check(asked(1, 1)).request
    assert (request.fields.image, request.fields.mask, request.fields.num_inference_steps) == ("", "", 1)
    assert request.inputs.pixels.shape == (64, 64, 3)


def test_on_step_cancels_and_its_errors_are_its_own(runtime: VirtualRuntime, make: Make, asked: Ask) -> None:
    runtime.step_seconds = lambda cells, rows: 1.0  # so that they share their steps
    batcher = make()

    def fails(done: int, total: int) -> None:
        if done == 9:
            raise ZeroDivisionError("mine")

    runtime.hold()
    first = batcher.submit(asked(12, 1))
    assert runtime.arrive() == "start"
    stopped = batcher.submit(asked(12, 2), on_step=lambda done, total: done < 8)
    broken = batcher.submit(asked(12, 3), on_step=fails)
    fine = batcher.submit(asked(12, 4))
    runtime.let_all()
    assert stopped.result(PATIENCE).status == "canceled"
    assert stopped.prediction.logs.splitlines()[-1] == "Canceled after 8 of 12 steps"
    with pytest.raises(ZeroDivisionError, match="mine"):
        broken.result(PATIENCE)
    assert (broken.prediction.status, broken.prediction.error) == ("failed", "ZeroDivisionError: mine")
    assert [one.status for one in results([first, fine])] == ["succeeded"] * 2
    assert any({2, 3, 4} <= set(step) for step in runtime.steps())
    assert batcher.healthy


def test_on_start_comes_before_the_device_and_may_cancel(
    runtime: VirtualRuntime, make: Make, asked: Ask
) -> None:
    batcher, seen = make(), list[tuple[str, int]]()

    def told() -> None:
        seen.append((ticket.prediction.status, len(runtime.done)))

    def fails() -> None:
        raise ZeroDivisionError("mine")

    runtime.hold()
    first = batcher.submit(asked(1, 1))
    assert runtime.arrive() == "start"
    ticket = batcher.submit(asked(2, 2), on_start=told)
    unwanted = batcher.submit(asked(3, 3), on_start=lambda: False)
    broken = [batcher.submit(asked(4, 4), on_start=fails) for _ in range(3)]
    runtime.let_all()
    assert [one.status for one in results([first, ticket, unwanted])] == ["succeeded"] * 2 + ["canceled"]
    assert [status for status, _ in seen] == ["starting"]
    assert runtime.done[seen[0][1]][0] == "start", "what was computed next"
    assert unwanted.prediction.started_at is None
    assert unwanted.prediction.logs.splitlines()[-1] == "Canceled after 0 of 3 steps"
    for one in broken:
        with pytest.raises(ZeroDivisionError, match="mine"):
            one.result(PATIENCE)
    assert {seeds for what, seeds in runtime.done if what == "step"} == {(1,), (2,)}
    assert batcher.healthy


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_callbacks_that_raise_and_callbacks_that_come_late(
    make: Make, asked: Ask, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    batcher, seen, waits = make(), list[Ticket](), threading.Event()

    def fails(ticket: Ticket) -> None:
        raise error("mine")

    ticket = batcher.submit(asked(1, 1), on_step=lambda *_: waits.wait(PATIENCE))
    ticket.add_done_callback(fails)
    ticket.add_done_callback(seen.append)
    waits.set()
    ticket.result(PATIENCE)
    assert batcher.submit(asked(1, 2)).result(PATIENCE).status == "succeeded"
    assert seen == [ticket]
    ticket.add_done_callback(seen.append)
    ticket.add_done_callback(fails)
    assert seen == [ticket, ticket]
    assert [record.getMessage() for record in caplog.records].count(
        f"a done callback of prediction {ticket.id} failed"
    ) == 2


@pytest.mark.parametrize("stage", ["start", "step", "finish"])
def test_an_error_ends_its_own_request_alone(
    runtime: VirtualRuntime, make: Make, asked: Ask, stage: str
) -> None:
    batcher, failed = make(), list[str]()

    def fails(what: str, seeds: tuple[int, ...]) -> None:
        if what == stage and not failed:
            failed.append(what)
            raise BackendError("no memory")

    runtime.fails = fails
    first, *others = queued(batcher, runtime, asked(3, 1), asked(4, 2), asked(5, 3))
    with pytest.raises(BackendError, match="no memory"):
        first.result(PATIENCE)
    assert (first.prediction.status, first.prediction.error) == ("failed", "no memory")
    assert first.prediction.completed_at is not None
    assert [one.status for one in results(others)] == ["succeeded"] * 2
    assert batcher.healthy
    assert batcher.snapshot().outcomes == {"failed": 1, "succeeded": 2}


@pytest.mark.parametrize("stage", ["publish", "conclude"])
@pytest.mark.parametrize("error", [MemoryError, SystemExit])
def test_making_files_fails_for_its_own_request_alone(
    make: Make, asked: Ask, monkeypatch: pytest.MonkeyPatch, stage: str, error: type[BaseException]
) -> None:
    """Neither what makes files nor what ends a prediction ends the thread of both."""

    def fails(*_: Any) -> None:
        raise error("none left")

    batcher = make()
    with monkeypatch.context() as broken:
        broken.setattr(f"ritocco.stages.{stage}", fails)
        with pytest.raises((MemoryError, BackendError), match="none left"):
            batcher.submit(asked(1, 1)).result(PATIENCE)
    assert batcher.submit(asked(1, 2)).result(PATIENCE).status == "succeeded"
    batcher.close()


def test_of_several_whose_step_fails_only_the_guilty_one_fails(
    runtime: VirtualRuntime, make: Make, asked: Ask
) -> None:
    """The others begin again, and paint what they would have painted."""
    alone = [make().submit(asked(20, seed)).result(PATIENCE) for seed in (1, 2, 4)]
    runtime.done.clear()
    runtime.step_seconds = lambda cells, rows: 1.0

    def fails(what: str, seeds: tuple[int, ...]) -> None:
        # Alone from the start, together not before the twelfth step.
        if 3 in seeds and (len(seeds) == 1 or runtime.steps().count(seeds) > 2):
            raise RuntimeError("CUDA error")

    runtime.fails = fails
    batcher = make()
    one, two, guilty, four = queued(batcher, runtime, *(asked(20, seed) for seed in (1, 2, 3, 4)))
    with pytest.raises(RuntimeError, match="CUDA error"):
        guilty.result(PATIENCE)
    assert guilty.prediction.error == "RuntimeError: CUDA error"
    found = results([one, two, four])
    assert [each.output for each in found] == [each.output for each in alone]
    assert any("starting again, alone" in each.logs for each in found)
    assert batcher.healthy


def test_an_engine_on_which_everything_fails_is_not_healthy(
    runtime: VirtualRuntime, make: Make, asked: Ask
) -> None:
    batcher = make()

    def fails(what: str, seeds: tuple[int, ...]) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    runtime.fails = fails
    for seed in range(3):
        assert batcher.healthy
        with pytest.raises(RuntimeError, match="device-side"):
            batcher.submit(asked(1, seed)).result(PATIENCE)
    assert not batcher.healthy
    runtime.fails = lambda what, seeds: None
    batcher.submit(asked(1, 1)).result(PATIENCE)
    assert batcher.healthy


def test_a_defect_of_the_loop_itself_ends_all_tickets(
    runtime: VirtualRuntime, make: Make, asked: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = make()
    runtime.hold()
    tickets = [batcher.submit(asked(3, 1))]
    assert runtime.arrive() == "start"
    tickets.append(batcher.submit(asked(3, 2)))

    def broken(*_: object, **__: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("ritocco.device_loop.decide", broken)
    runtime.let_all()
    for ticket in tickets:
        with pytest.raises(KeyError, match="a defect"):
            ticket.result(PATIENCE)
        assert ticket.prediction.status == "failed"
    assert not batcher.healthy
    with pytest.raises(BackendError, match="no engine left"):
        batcher.submit(asked(1, 3))


def test_a_broken_engine_does_not_fail_at_all_that_waits(
    runtime: VirtualRuntime, make: Make, asked: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(what: str, seeds: tuple[int, ...]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("ritocco.device_loop.PAUSE_S", 1e6)
    monkeypatch.setattr("ritocco.device_loop.LONGEST_PAUSE_S", 1e6)
    runtime.fails = broken
    batcher = make()
    *failed, canceled, second, third = queued(batcher, runtime, *(asked(1, seed) for seed in range(6)))
    for ticket in failed:
        with pytest.raises(ZeroDivisionError):
            ticket.result(PATIENCE)
    assert not batcher.healthy
    canceled.cancel()
    assert canceled.result(PATIENCE).status == "canceled", "which does not wait for the pause"
    assert not second.done()
    batcher.close(drain=False)
    for ticket in (second, third):
        with pytest.raises(BackendError, match=re.escape(INTERRUPTED)):
            ticket.result(PATIENCE)


def test_a_time_limit_counts_from_the_begin_of_the_work(
    runtime: VirtualRuntime, make: Make, asked: Ask
) -> None:
    batcher = make(capacity=1, time_limit=10.0)
    first, late = queued(batcher, runtime, asked(8, 1), asked(9, 2))
    assert [one.status for one in results([first, late])] == ["succeeded"] * 2, "8 seconds in the queue"
    alone = batcher.submit(asked(30, 3))
    with pytest.raises(TimeLimitError, match="time limit of 10 seconds, after 10 of 30 steps"):
        alone.result(PATIENCE)
    assert alone.prediction.status == "failed"


def test_a_time_limit_goes_on_while_others_pass(runtime: VirtualRuntime, make: Make, asked: Ask) -> None:
    runtime.hold()
    batcher = make(capacity=1, time_limit=10.0)
    passed = batcher.submit(asked(30, 1))
    runtime.let(2)
    assert [runtime.arrive() for _ in range(3)] == ["start", "step", "step"]
    short = batcher.submit(asked(4, 2))
    runtime.let_all()
    assert short.result(PATIENCE).status == "succeeded"
    with pytest.raises(TimeLimitError, match="after 6 of 30"):
        passed.result(PATIENCE)


def test_closing_drains(runtime: VirtualRuntime, make: Make, asked: Ask) -> None:
    batcher = make()
    tickets = queued(batcher, runtime, asked(3, 1), asked(4, 2))
    batcher.close()
    assert all(ticket.done() for ticket in tickets)
    assert [ticket.result(0).status for ticket in tickets] == ["succeeded"] * 2
    with pytest.raises(BackendError, match="closed"):
        batcher.submit(asked(1, 1))
    assert not batcher.healthy
    batcher.close()


def test_closing_without_draining_interrupts_between_two_steps(
    runtime: VirtualRuntime, make: Make, asked: Ask
) -> None:
    batcher = make()
    runtime.hold()
    tickets = [batcher.submit(asked(50, 1))]
    assert runtime.arrive() == "start"
    tickets.append(batcher.submit(asked(50, 2)))
    runtime.let()
    assert runtime.arrive() == "step"
    closer = threading.Thread(target=batcher.close, kwargs={"drain": False})
    closer.start()
    while batcher.healthy:  # until the closing is said
        pass
    runtime.let_all()
    closer.join(PATIENCE)
    for ticket in tickets:
        with pytest.raises(BackendError, match="interrupted; please retry"):
            ticket.result(0)
        assert ticket.prediction.error == INTERRUPTED
    assert len(runtime.steps()) == 1


def test_closing_with_a_network_that_does_not_return_ends_the_tickets(
    runtime: VirtualRuntime, make: Make, asked: Ask
) -> None:
    batcher = make()
    runtime.hold()
    running, waiting = batcher.submit(asked(5, 1)), None
    assert runtime.arrive() == "start"
    waiting = batcher.submit(asked(5, 2))
    batcher.close(timeout=0.01)
    for ticket in (running, waiting):
        with pytest.raises(BackendError, match="interrupted"):
            ticket.result(0)


def test_the_batchers_own_threads_do_not_wait_for_themselves(make: Make, asked: Ask) -> None:
    batcher, tickets = make(), list[Ticket]()
    ready = threading.Event()

    def waits(done: int, total: int) -> None:
        ready.wait(PATIENCE)
        tickets[0].result()

    tickets.append(batcher.submit(asked(2, 1), on_step=waits))
    ready.set()
    with pytest.raises(BackendError, match="own thread"):
        tickets[0].result(PATIENCE)
    closed = batcher.submit(asked(2, 2), on_step=lambda done, total: batcher.close())
    assert closed.result(PATIENCE).status == "succeeded"


def test_many_threads_submit_and_cancel(runtime: VirtualRuntime, make: Make, asked: Ask) -> None:
    batcher, gate = make(waiting=1000), threading.Barrier(8)

    def client(number: int) -> list[str]:
        gate.wait(PATIENCE)
        tickets = [batcher.submit(asked(1 + i % 5, 100 * number + i)) for i in range(12)]
        for ticket in tickets[number % 3 :: 3]:
            ticket.cancel()
        return [ticket.result(PATIENCE).status for ticket in tickets]

    with ThreadPoolExecutor(8) as pool:
        statuses = [status for found in pool.map(client, range(8)) for status in found]
    assert len(statuses) == 96
    assert set(statuses) <= {"succeeded", "canceled"}
    assert batcher.snapshot().outcomes == {name: statuses.count(name) for name in set(statuses)}
    assert statuses.count("succeeded") >= 64


def test_two_engines_share_the_queue_and_a_closed_one_ends_its_own(
    runtime: VirtualRuntime, engine_on: Callable[..., Engine], make: Make, asked: Ask
) -> None:
    other = VirtualRuntime()
    engines = [engine_on(runtime), engine_on(other)]
    batcher = make(engines)
    runtime.hold()
    other.hold()
    tickets = [batcher.submit(asked(5, seed)) for seed in range(2)]
    assert (runtime.arrive(), other.arrive()) == ("start", "start"), "both are at work"
    tickets += [batcher.submit(asked(5, seed)) for seed in range(2, 8)]
    other.let_all()
    results(tickets[2:])
    assert len(other.steps()) >= 30, "one does not wait for the other"
    runtime.let_all()
    results(tickets)
    engines[0].close()
    assert results([batcher.submit(asked(2, seed)) for seed in range(4)])[0].status == "succeeded"


def test_an_engine_that_is_closed_under_a_batcher(
    runtime: VirtualRuntime, engine_on: Callable[..., Engine], make: Make, asked: Ask
) -> None:
    engine = engine_on(runtime)
    batcher = make(engine)
    closer = threading.Thread(target=engine.close)

    def close_elsewhere(done: int, total: int) -> None:
        if done == 2:
            closer.start()
            closer.join(PATIENCE)

    tickets = [batcher.submit(asked(9, 1), on_step=close_elsewhere)]
    with pytest.raises(BackendError, match="engine is closed"):
        tickets[0].result(PATIENCE)
    with pytest.raises(BackendError, match="engine"):
        batcher.submit(asked(1, 2)).result(PATIENCE)
    assert not batcher.healthy


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[[VirtualRuntime], None]:
    """Makes a runtime's device fail from now on, as after a fault in a kernel."""

    def call(runtime: VirtualRuntime) -> None:
        def fail(what: str, seeds: tuple[int, ...]) -> None:
            raise RuntimeError("unspecified launch failure")

        runtime.fails = fail
        runtime.traits = replace(runtime.traits, device="lost")

    monkeypatch.setattr("ritocco.engine.responds", lambda name: name != "lost")
    return call


def test_a_lost_device_ends_all_with_one_error(
    runtime: VirtualRuntime, engine_on: Callable[..., Engine], make: Make, asked: Ask, lose: Any
) -> None:
    engine = engine_on(runtime)
    batcher = make(engine)

    def fail(done: int, total: int) -> None:
        if done == 2:
            lose(runtime)
            engine.traits = runtime.traits

    runtime.hold()
    tickets = [batcher.submit(asked(9, 1), on_step=fail)]
    assert runtime.arrive() == "start"
    tickets += [batcher.submit(asked(9, seed)) for seed in range(2, 5)]
    runtime.let_all()
    for ticket in tickets:
        with pytest.raises(DeviceLostError, match="lost has stopped computing: unspecified launch failure"):
            ticket.result(PATIENCE)
    assert len(runtime.steps()) == 2, "nobody else is tried there"
    assert batcher.lost
    assert not batcher.healthy
    assert batcher.snapshot().engines == 0
    with pytest.raises(DeviceLostError, match="no engine left"):
        batcher.submit(asked(1, 9))


def test_others_take_over_from_a_lost_device(
    runtime: VirtualRuntime, engine_on: Callable[..., Engine], make: Make, asked: Ask, lose: Any
) -> None:
    other = VirtualRuntime()
    engines = [engine_on(runtime), engine_on(other)]
    batcher = make(engines)
    runtime.hold()
    other.hold()
    first = [batcher.submit(asked(20, seed)) for seed in range(2)]
    assert (runtime.arrive(), other.arrive()) == ("start", "start")
    more = [batcher.submit(asked(3, seed)) for seed in range(2, 8)]
    lose(runtime)
    engines[0].traits = runtime.traits
    other.let_all()
    runtime.let_all()
    with pytest.raises(DeviceLostError, match="lost has stopped"):
        results(first)  # one of them, whose turn it was
    assert sorted(ticket.prediction.status for ticket in first) == ["failed", "succeeded"]
    assert {one.status for one in results(more)} == {"succeeded"}
    assert not batcher.lost
    assert (batcher.healthy, batcher.snapshot().engines) == (True, 1)


def test_a_failure_where_the_device_responds_is_the_requests_own(
    runtime: VirtualRuntime, make: Make, asked: Ask
) -> None:
    def fail(what: str, seeds: tuple[int, ...]) -> None:
        if seeds == (1,):
            raise RuntimeError("out of luck")

    runtime.fails = fail
    batcher = make()
    with pytest.raises(RuntimeError, match="out of luck"):
        batcher.submit(asked(3, 1)).result(PATIENCE)
    assert batcher.submit(asked(3, 2)).result(PATIENCE).status == "succeeded"
    assert not batcher.lost


class Flags(SafetyChecker):
    """Flags everything."""

    def __init__(self) -> None:
        """Without a network."""

    def flag(self, images: Any) -> list[bool]:
        return [True] * len(images)


def test_flagged_pictures_are_a_failed_prediction(
    runtime: VirtualRuntime, engine_on: Callable[..., Engine], make: Make, asked: Ask
) -> None:
    prediction = make(engine_on(runtime, safety=Flags())).submit(asked(1, 1)).result(PATIENCE)
    assert (prediction.status, prediction.error, prediction.output) == ("failed", NSFW_ERROR, None)


def test_predict_awaits_and_its_cancellation_cancels(runtime: VirtualRuntime, make: Make, asked: Ask) -> None:
    batcher = make()

    async def both() -> Any:
        prediction = await batcher.predict(asked(2, 1), id="mine")
        assert (prediction.status, prediction.id) == ("succeeded", "mine")
        with pytest.raises(RequestError, match="steps"):
            await batcher.predict(asked(501, 1))
        while not runtime.reached.empty():
            runtime.arrive()
        runtime.hold()
        task = asyncio.create_task(batcher.predict(asked(50, 2)))
        assert await asyncio.to_thread(runtime.arrive) == "start"
        runtime.let()
        assert await asyncio.to_thread(runtime.arrive) == "step"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        runtime.let_all()
        return await batcher.predict(asked(3, 3))

    assert asyncio.run(both()).status == "succeeded"
    assert runtime.steps().count((2,)) <= 1
    assert batcher.snapshot().outcomes == {"succeeded": 2, "canceled": 1}


def test_what_ends_after_its_loop_is_no_mistake(
    runtime: VirtualRuntime, make: Make, asked: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = make()
    runtime.hold()

    async def leave() -> Any:
        waiting = asyncio.ensure_future(batcher.predict(asked(2, 1)))
        assert await asyncio.to_thread(runtime.arrive) == "start"
        return waiting

    assert asyncio.run(leave()).cancelled()
    runtime.let_all()
    assert batcher.submit(asked(1, 2)).result(PATIENCE).status == "succeeded"
    batcher.close()
    assert batcher.snapshot().outcomes == {"canceled": 1, "succeeded": 1}
    assert [one.getMessage() for one in caplog.records if one.levelname == "ERROR"] == []


def test_a_batcher_that_nobody_holds_ends_once_its_tickets_have(
    runtime: VirtualRuntime, engine_on: Callable[..., Engine], asked: Ask
) -> None:
    before = threading.active_count()
    batcher = Batcher(engine_on(runtime))
    held = weakref.ref(batcher)
    runtime.hold()
    ticket = batcher.submit(asked(2, 1))
    assert runtime.arrive() == "start"
    del batcher
    gc.collect()
    assert held() is not None, "its ticket keeps it at work"
    runtime.let_all()
    assert ticket.result(PATIENCE).status == "succeeded"
    while held() is not None or threading.active_count() > before:
        gc.collect()


def test_the_interpreter_ends_with_a_running_batcher() -> None:
    """It waits for the step, and no thread is inside a network when the interpreter goes."""
    script = """
import sys, threading
import numpy as np
import ritocco
engine = ritocco.load(sys.argv[1], device="cpu", dtype="float32")
begun = threading.Event()
pixels = np.zeros((64, 64, 3), np.uint8)
batcher = ritocco.Batcher(engine)
ticket = batcher.submit(
    {"image": pixels, "mask": pixels, "width": 64, "height": 64, "num_inference_steps": 500},
    on_step=lambda done, total: begun.set(),
)
ticket.add_done_callback(lambda one: print(one.prediction.status, one.prediction.error, flush=True))
begun.wait(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(pocket_model())],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"failed {INTERRUPTED}"), done.stderr
    assert done.stderr == ""


def test_the_loops_errors_are_logged(
    runtime: VirtualRuntime,
    make: Make,
    asked: Ask,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ritocco.device_loop.decide", lambda *_, **__: 1 / 0)
    with caplog.at_level(logging.ERROR, logger="ritocco"), pytest.raises(ZeroDivisionError):
        make().submit(asked(1, 1)).result(PATIENCE)
    assert "a batcher's thread has ended: division by zero" in caplog.text
