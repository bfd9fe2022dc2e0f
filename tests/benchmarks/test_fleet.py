"""The simulation of fleets: against queueing theory, the simulation of single steps, and itself."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ritocco_bench import fleet, fleet_report, store_times
from ritocco_bench.autoscaling import Autoscaler
from ritocco_bench.batching_times import of_ladder
from ritocco_bench.environment import environment
from ritocco_bench.fleet_day import Table, flow, table
from ritocco_bench.fleet_mix import HALVES, MIX, MIXES, Kind, alone, of_day, poisson, varying
from ritocco_bench.fleet_routes import ROUTES, models, pools, two_choices
from ritocco_bench.fleet_run import Plan, run
from ritocco_bench.painter import Painter
from ritocco_bench.processes import BenchError
from ritocco_bench.simulation import Asked, Given, batched

ROOT = Path(__file__).resolve().parent.parent.parent
ONE_SECOND = Given(steps={1: {1: 0.1}}, starts={1: 0.0}, finishes={1: 0.0})
ALIKE = (Kind(share=1.0, size=1, steps=10),)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def gpu() -> Given:
    return of_ladder(sizes=(512, 768, 1024))


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_painter_that_takes_one_at_a_time_waits_as_long_as_theory_says(load: float) -> None:
    """M/D/1 of service time s and load rho: a wait of rho s / (2 (1 - rho)) [Pollaczek and Khinchine]."""
    asked = poisson(ALIKE, load, 40_000 / load, seed=5)
    ran = run(asked, ONE_SECOND, Plan(painters=1, capacity=1, route="random"), seed=0)
    assert np.mean(ran.waits) - 1.0 == pytest.approx(load / (2 * (1 - load)), rel=0.04)
    assert ran.busy == pytest.approx(load, rel=0.02)
    assert ran.ongoing == pytest.approx(load * np.mean(ran.waits), rel=0.02)  # Little's law
    assert (ran.fill, ran.shared) == (1.0, 1.0)


def test_many_painters_by_chance_wait_as_long_as_one() -> None:
    """A Poisson process that is split by chance is one for each."""
    asked = poisson(ALIKE, 0.6 * 20, 2000.0, seed=6)
    ran = run(asked, ONE_SECOND, Plan(painters=20, capacity=1, route="random"), seed=0)
    assert np.mean(ran.waits) - 1.0 == pytest.approx(0.6 / (2 * 0.4), rel=0.06)


@pytest.mark.parametrize("load", [0.6, 1.1, 2.0])
@pytest.mark.parametrize("mix", ["mix", "halves", "traces"])
def test_turns_that_are_taken_together_change_nothing(mix: str, load: float) -> None:
    """Beside the simulation that decides before each step."""
    times = gpu()
    rate = load / alone(MIXES[mix], times)
    asked = poisson(MIXES[mix], rate, 120 / rate, seed=7)
    step_by_step = batched(asked, times, capacity=8, ageing=0.1)
    ran = run(asked, times, Plan(painters=1), seed=0)
    assert ran.waits == pytest.approx(step_by_step.waits, abs=1e-9)
    assert ran.fill == pytest.approx(step_by_step.fill)
    if load == 2.0:
        assert ran.shared > 1.2  # else nothing was shared that could have been wrong


def drawn(seed: int) -> tuple[list[Asked], Given]:
    """Requests of all kinds within four seconds, and times of a device on which company pays as it may."""
    rng = random.Random(seed)  # noqa: S311

    def steps(one: float) -> dict[int, float]:
        gains = sorted((1.0, rng.uniform(1.05, 1.9), rng.uniform(1.2, 3.5), rng.uniform(1.5, 6.0)))
        return {lanes: one * gain for lanes, gain in zip((1, 2, 4, 8), gains, strict=True)}

    times = Given(
        steps={1: steps(0.1), 2: steps(rng.uniform(0.05, 0.4))},
        starts={1: rng.uniform(0.0, 0.3), 2: rng.uniform(0.0, 0.3)},
        finishes={1: 0.05, 2: 0.1},
    )
    asked = [
        Asked(
            at=rng.uniform(0.0, 4.0),
            size=rng.choice((1, 2)),
            steps=rng.randint(2, 60),
            lanes=rng.choice((1, 1, 1, 2, 4)),
        )
        for _ in range(14)
    ]
    return sorted(asked, key=lambda one: one.at), times


def test_nor_do_they_where_requests_pass_each_other() -> None:
    """Which matters in one of a hundred of these."""
    for seed in range(300):
        asked, times = drawn(seed)
        step_by_step = batched(asked, times, capacity=8, ageing=0.1)
        ran = run(asked, times, Plan(painters=1), seed=0)
        assert ran.waits == pytest.approx(step_by_step.waits, abs=1e-6), seed


def test_a_few_painters_are_as_many_batchers_with_a_part_of_the_requests_each() -> None:
    times = gpu()
    asked = poisson(MIX, 3 * 1.1 / alone(MIX, times), 25.0, seed=8)
    ran = run(asked, times, Plan(painters=3, route="in turn"), seed=0)
    for place in range(3):
        own = batched(asked[place::3], times, capacity=8, ageing=0.1)
        assert ran.waits[place::3] == pytest.approx(own.waits, abs=1e-9)


def test_a_request_that_comes_in_the_middle_of_a_step_is_seen_at_its_end() -> None:
    free = Given(steps={1: {1: 1.0, 8: 1.0}}, starts={1: 0.0}, finishes={1: 0.0})
    asked = [Asked(at=0.0, size=1, steps=10), Asked(at=2.5, size=1, steps=3)]
    ran = run(asked, free, Plan(painters=1), seed=0)
    # The fourth turn is the first that it can have part in, at 3 seconds.
    assert list(ran.waits) == list(batched(asked, free, capacity=8, ageing=0.1).waits)
    assert ran.waits[1] == 3.5


@pytest.mark.parametrize("route", list(ROUTES))
def test_whatever_the_route_everybody_is_served_once_and_all_the_work_is_done(route: str) -> None:
    times = gpu()
    asked = poisson(HALVES, 1.1 * 8 / alone(HALVES, times), 20.0, seed=9)
    ran = run(asked, times, Plan(painters=8, route=route, most_ongoing=4), seed=1)
    assert len(ran.waits) == len(asked) > 100
    assert min(ran.slower) > 1 - 1e-9  # company never makes a request faster than it is alone
    assert ran.painter_s == pytest.approx(8 * asked[-1].at)
    assert ran.started <= ran.ongoing


def test_steps_are_neither_lost_nor_taken_twice() -> None:
    times = gpu()
    asked = poisson(MIX, 1.2 / alone(MIX, times), 60.0, seed=10)
    painter = Painter(times, capacity=8, ageing=0.1)
    for key, one in enumerate(asked):
        painter.submit(key, one, 0.0)
    ended = []
    while painter.ongoing:
        found = painter.advance()
        ended += [] if found is None else [found]
    assert sorted(ended) == list(range(len(asked)))
    assert painter.joined == sum(one.steps for one in asked)
    assert painter.moved == sum(one.steps * one.lanes for one in asked)
    assert painter.moved / painter.taken > 4  # all were there from the begin
    assert (painter.begun, painter.until) == (0, math.inf)


def test_a_seed_is_a_run() -> None:
    times = gpu()

    def once(seed: int) -> Sequence[float]:
        asked = poisson(MIX, 40.0, 10.0, seed=seed)
        return run(asked, times, Plan(painters=10), seed=seed).waits

    assert once(3) == once(3)
    assert once(3) != once(4)


def test_arrivals_follow_their_rates() -> None:
    asked = varying(MIX, lambda at: 100.0 if at < 50 else 20.0, 100.0, 100.0, seed=11)
    assert sum(one.at < 50 for one in asked) == pytest.approx(5000, rel=0.05)
    assert sum(one.at >= 50 for one in asked) == pytest.approx(1000, rel=0.1)
    assert [one.at for one in asked] == sorted(one.at for one in asked)
    assert sum(one.lanes == 4 for one in asked) == pytest.approx(600, rel=0.15)
    curve = [of_day(60.0 * minute) for minute in range(24 * 60)]
    assert min(curve) == pytest.approx(0.15)
    assert max(curve) == 1.0
    assert of_day(20 * 3600 + 600) == 1.0 > of_day(20 * 3600 - 1) > of_day(21 * 3600) > 0.4


def test_two_choices_are_better_than_chance() -> None:
    times = gpu()
    asked = poisson(MIX, 0.8 * 20 / alone(MIX, times), 60.0, seed=12)
    p95 = {
        route: np.percentile(run(asked, times, Plan(painters=20, route=route), seed=0).slower, 95)
        for route in ("random", "two choices")
    }
    assert p95["two choices"] < 0.8 * p95["random"]


def test_models_gather_on_one_painter_until_it_is_full() -> None:
    painters = [Painter(ONE_SECOND, capacity=1, ageing=0.1) for _ in range(4)]
    everybody, rng, shares = list(range(4)), random.Random(0), {1: 1.0}  # noqa: S311
    route = models(3, warm=False)(painters, 2, shares, rng)
    first = route(1, everybody, 0.0)
    assert first is not None
    for key in range(2):
        assert route(1, everybody, 0.0) == first
        painters[first].submit(key, Asked(at=0.0, size=1, steps=10), 0.0)
    assert route(1, everybody, 0.9) is None  # it waits for the one that has its size
    other = route(1, everybody, 2.1)
    assert other not in (None, first)
    plain = two_choices(painters, 2, shares, rng)
    assert {plain(1, everybody, 0.0) for _ in range(50)} == {0, 1, 2, 3} - {first}


def test_sizes_have_painters_by_their_work() -> None:
    painters = [Painter(ONE_SECOND, capacity=1, ageing=0.1) for _ in range(10)]
    route = pools(painters, 8, {512: 8.0, 768: 2.0}, random.Random(0))  # noqa: S311
    everybody = list(range(10))
    assert {route(512, everybody, 0.0) for _ in range(200)} == set(range(8))
    assert {route(768, everybody, 0.0) for _ in range(200)} == {8, 9}
    assert {route(768, [3], 0.0) for _ in range(9)} == {3}


def test_the_autoscaler_by_hand() -> None:
    scaler = Autoscaler(target=2.0, least=1, most=8, up_s=30, down_s=60, look_back_s=10, interval_s=10)
    assert [scaler.decide(9.0, 2) for _ in range(3)] == [2, 2, 5]
    assert [scaler.decide(100.0, 5) for _ in range(3)] == [5, 5, 8]
    assert [scaler.decide(1.0, 8) for _ in range(6)] == [8] * 5 + [1]
    slow = Autoscaler(target=2.0, least=1, most=8, down_s=0, down_factor=0.25, look_back_s=10)
    assert [slow.decide(2.0, there) for there in (8, 2, 1)] == [7, 2, 1]
    # What is in between begins to count anew.
    assert [scaler.decide(n, 5) for n in (*[1.0] * 5, 10.0, *[1.0] * 5)] == [5] * 11
    assert [scaler.decide(n, 2) for n in (9.0, 9.0, 3.0, 9.0, 9.0, 9.0)] == [2] * 5 + [5]


def test_a_fleet_that_is_scaled_grows_for_a_rush_and_shrinks_after_it() -> None:
    times = gpu()
    asked = varying(MIX, lambda at: 30.0 if 100 < at < 200 else 4.0, 30.0, 400.0, seed=13)
    plan = Plan(
        painters=2,
        scaled=lambda: Autoscaler(target=2.0, least=1, most=12, up_s=20, down_s=60),
        cold_s=15.0,
    )
    ran = run(asked, times, plan, seed=0)
    counts = [count for _, count in ran.counts]
    assert counts[0] == 2
    assert 6 <= max(counts) <= 12
    assert counts[-1] <= 3
    assert len(ran.waits) == len(asked)
    grown = next(at for at, count in ran.counts if count > 2)
    assert 110 <= grown <= 160
    with pytest.raises(BenchError, match="models, one size each"):
        run(asked, times, Plan(painters=2, route="models, one size each", scaled=plan.scaled), seed=0)


def test_the_fluid_by_hand() -> None:
    """A painter serves 1 a second with 1 in its house, 2 with 3, and no more."""
    looked = Table(rates=[1.0, 2.0], ongoing=[1.0, 3.0], over=[[0.1, 0.0], [0.5, 0.2]], busy=[0.5, 1.0])
    steady = flow(looked, lambda _: 10.0, painters=10, seconds=1000.0)
    assert steady.over == pytest.approx((0.1, 0.0), abs=0.01)
    assert steady.left == pytest.approx(10.0, rel=0.01)
    assert steady.painter_s == 10_000
    over = flow(looked, lambda _: 30.0, painters=10, seconds=100.0)
    assert over.left == pytest.approx(1000.0, rel=0.05)  # 20 of 30 leave it
    assert over.over[1] > 0.9
    assert looked.slow(6.0) == [1.0, 1.0]
    assert looked.rate(0, 0.3) == looked.rate(1, 0.1) == pytest.approx(1.5)


def test_the_fluid_beside_each_request() -> None:
    times = gpu()
    plan = Plan(painters=20)
    looked = table(MIX, times, plan, requests=4000, seed=0, loads=(0.2, 0.5, 0.8, 1.0, 1.1))

    def rate(at: float) -> float:
        return 20 * (2.0 if at < 100 else 4.4 if at < 200 else 3.0)

    asked = varying(MIX, rate, 20 * 4.4, 300.0, seed=14)
    slower = np.asarray(run(asked, times, plan, seed=0).slower)
    day = flow(looked, rate, painters=20, seconds=300.0)
    assert day.requests == pytest.approx(len(asked), rel=0.03)
    assert day.over[0] == pytest.approx(np.mean(slower > 2), abs=0.03)
    assert day.over[1] == pytest.approx(np.mean(slower > 4), abs=0.03)
    scaled = Plan(painters=10, cold_s=20.0, scaled=lambda: Autoscaler(target=1.5, least=2, most=40))
    ran = run(asked, times, scaled, seed=0)
    fluid = flow(
        looked, rate, painters=10, seconds=300.0, cold_s=20.0, scaler=Autoscaler(target=1.5, least=2, most=40)
    )
    assert fluid.painter_s == pytest.approx(ran.painter_s, rel=0.1)
    assert fluid.most == pytest.approx(max(count for _, count in ran.counts), rel=0.25)


INPUT = {"prompt": "a yellow cat", "image": f"data:image/png;base64,{'A' * 4000}"}


def test_sqlite_takes_five_transactions_for_a_prediction() -> None:
    output = np.random.default_rng(0).bytes(50_000)
    found = store_times.sqlite(INPUT, output, clients=2, seconds=0.2)
    assert found.transactions == 5  # accept, prepare, prepared, start, finish
    assert found.predictions >= 1
    assert found.stored_bytes > len(output) + 4000


@pytest.mark.slow
def test_postgresql_takes_the_same_and_one_for_a_picture_in_it() -> None:
    output = np.random.default_rng(0).bytes(50_000)
    with store_times.server() as url:
        inside = store_times.postgres(url, INPUT, output, clients=2, seconds=0.5, pictures=True)
        beside = store_times.postgres(url, INPUT, output, clients=2, seconds=0.5, pictures=False)
    assert (inside.transactions, beside.transactions) == (6, 5)
    assert inside.written_bytes > len(output) > beside.written_bytes > 1000
    assert min(inside.predictions, beside.predictions) >= 2


def test_without_postgresql_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="--postgres"), store_times.server(tmp_path):
        raise AssertionError("there is none")


def test_the_commands_and_their_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"

    def command(*words: str) -> int:
        return fleet.main([*words, "--out", str(out), "--requests", "400"])

    assert command("page") == 1
    assert "fleet rates" in capsys.readouterr().err
    monkeypatch.setattr(fleet, "TABLE_PAINTERS", 4)
    monkeypatch.setattr(fleet, "RUSH_PAINTERS", 2)
    monkeypatch.setattr(fleet, "CHECKED", (19.99, 20.02))
    monkeypatch.setattr(fleet, "ROUTE_LOADS", (0.7, 1.1))
    monkeypatch.setattr(fleet, "FEW_ONGOING", 2)
    here = environment("cpu")
    monkeypatch.setattr("ritocco_bench.rows.environment", lambda device: here)
    monkeypatch.setattr(fleet, "WAITING", (1, 4))
    commands = (["rates", "--fleets", "1,2"], ["routes"], ["waiting"], ["day", "--step", "10"], ["check"])
    for words in commands:
        assert command(*words) == 0
    store: dict[str, Any] = {"case": "fleet-store", "input_bytes": 1000, "output_bytes": 2000, "clients": 1}
    store |= {"transactions": 5, "per_second": 10.0, "written_bytes": 3000.0, "stored_bytes": 4000.0}
    with out.open("a") as stream:
        for kept in fleet_report.KEPT:
            stream.write(json.dumps(store | {"store": "postgresql", "kept": kept}) + "\n")
    capsys.readouterr()
    assert command("page", "--plots", str(tmp_path), "--price", "3") == 0
    page = capsys.readouterr().out
    for title in (
        "Requests a second",
        "Routes",
        "A day",
        "Network",
        "Lost GPUs",
        "at 3 an hour (an example)",
    ):
        assert title in page
    for name in ("fleet-routes.png", "fleet-day.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    rows = fleet_report.read(out)
    limits = [row for row in rows if row["case"] == "fleet-rates" and row["mix"] == "mix"]
    assert [(row["painters"], row["limit"]) for row in limits] == [(1, 2.0), (1, 4.0), (2, 2.0), (2, 4.0)]
    assert all(row["p95"] <= row["limit"] for row in limits)
    assert limits[0]["per_second"] < limits[1]["per_second"]
    assert all(row["environment"]["machine"] for row in rows if row["case"] != "fleet-store")


def test_a_limit_that_no_load_keeps_is_named() -> None:
    with pytest.raises(BenchError, match=r"p95 is 3\.00 times"):
        fleet.most(lambda load: {"load": load, "p95": 3.0}, 2.0, 0.1, 1.0)
    found = fleet.most(lambda load: {"load": load, "p95": 1 + load}, 1.5, 0.1, 1.0)
    assert 0.48 < found["load"] <= 0.5
