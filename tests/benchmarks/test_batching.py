"""The benchmark of batching: its traces, its simulation by hand, and one small run of each command."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ritocco import Engine
from ritocco.batcher import AGEING
from ritocco_bench import batching, traces
from ritocco_bench.batching_times import from_json, measured, of_ladder, to_json
from ritocco_bench.processes import BenchError
from ritocco_bench.simulation import Asked, Given, batched, one_by_one

ROOT = Path(__file__).resolve().parent.parent.parent
# Two sizes; the large one's step takes four times as long, and two at once take twice as long as one.
NO_GAIN = Given(steps={1: {1: 1.0}, 2: {1: 4.0}}, starts={1: 2.0, 2: 5.0}, finishes={1: 1.0, 2: 3.0})
FREE = Given(steps={1: {1: 1.0, 8: 1.0}}, starts={1: 0.0}, finishes={1: 0.0})


def test_the_recorded_traces_are_those_that_are_drawn() -> None:
    held = traces.read(ROOT / traces.FILE)
    assert held == [traces.draw(seed) for seed in range(50)]
    assert not set(range(50)) & set(batching.TUNING_SEEDS)
    for one in held:
        assert len(one.steps) == len(one.sizes) == len(one.gaps) == 32
        assert 4 <= min(one.steps) <= max(one.steps) <= 100
        assert set(one.sizes) == {0, 1}


def test_first_come_first_served_by_hand() -> None:
    requests = [
        Asked(at=1.0, size=2, steps=2),
        Asked(at=2.0, size=1, steps=3),
        Asked(at=100.0, size=1, steps=1),
    ]
    found = one_by_one(requests, NO_GAIN)
    assert found.waits == (16.0, 21.0, 4.0)  # until 17, 23 and 104
    assert (found.end, found.slowest, found.mean) == (104.0, 21.0, 41 / 3)


def test_the_policy_by_hand() -> None:
    requests = [Asked(at=0.0, size=2, steps=5), Asked(at=6.0, size=1, steps=3)]
    found = batched(requests, NO_GAIN, capacity=8, ageing=0.1)
    # The large one starts until 5 and takes a step until 9; the small one is done at 15, the large one at 34.
    assert found.waits == (34.0, 9.0)
    assert found.end == one_by_one(requests, NO_GAIN).end
    assert found.fill == 1.0
    both = batched([Asked(at=0.0, size=1, steps=6)] * 2, FREE, capacity=8, ageing=0.1)
    assert (both.waits, both.fill) == ((6.0, 6.0), 2.0)
    late = batched([Asked(at=50.0, size=1, steps=1)], NO_GAIN, capacity=8, ageing=0.1)
    assert late.waits == (4.0,)


def test_given_times_between_and_beyond() -> None:
    given = Given(steps={1: {1: 2.0, 4: 5.0}}, starts={1: 0.0}, finishes={1: 0.0})
    assert [given.step(1, rows) for rows in (1, 2, 3, 4, 8)] == [2.0, 3.0, 4.0, 5.0, 10.0]
    assert from_json(json.loads(json.dumps(to_json(NO_GAIN)))) == NO_GAIN


def test_the_gpus_times_are_the_measured_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = of_ladder()
    assert {count: round(1000 * s, 1) for count, s in given.steps[512].items()} == {
        1: 5.1,
        2: 8.4,
        4: 15.6,
        8: 30.3,
    }
    assert given.step(1024, 1) == given.step(512, 4)
    assert given.start(512) == pytest.approx(0.0067)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(BenchError, match=r"empty\.jsonl"):
        of_ladder(empty)


@pytest.mark.parametrize("times", [NO_GAIN, None], ids=["no gain", "gpu"])
def test_what_was_promised_holds_on_the_virtual_clock(
    times: Given | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some of the traces; the benchmark has all, and intervals."""
    monkeypatch.chdir(ROOT)
    held, given = traces.read()[:6], times or of_ladder()
    for load, mean, slowest in ((None, 1.6, 1.2), (0.9, 1.3, 1.5)):
        found = batching.figures(batching.simulate(held, given, load, capacity=8, ageing=AGEING))
        assert found["mean_times_better"][0] >= mean
        assert found["slowest_times_worse"][0] <= slowest
        assert found["throughput"][0] >= 0.999


@pytest.mark.slow
def test_a_small_run_for_real_and_the_commands(
    tiny_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["batching", *words, "--out", str(out)])
        return batching.main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batching, "_engine", lambda arguments: tiny_engine)
    monkeypatch.setattr(batching, "measured", partial(measured, lanes=(1, 2)))
    assert run("simulate") == 1
    assert "run `python -m ritocco_bench.batching times` first" in capsys.readouterr().err
    assert run("times", "--sizes", "64,128", "--repeats", "1") == 0
    few = tmp_path / "few.jsonl"
    assert run("draw", "--file", str(few), "--traces", "2") == 0
    short = [
        one.__class__(seed=one.seed, steps=(1, 2), sizes=(0, 1), gaps=(0.1, 0.1)) for one in traces.read(few)
    ]
    traces.write(few, short)
    assert run("simulate", "--file", str(few), "--plots", str(tmp_path)) == 0
    assert (tmp_path / "batching-here.png").read_bytes().startswith(b"\x89PNG")
    assert run("real", "--file", str(few), "--traces", "1") == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == [
        *("batching-times", "batching-here", "batching-here", "batching-real", "batching-real")
    ]
    for row in rows[1:]:
        assert row["seconds"]["batcher"]["mean"] > 0
        assert row["environment"]["machine"]
        low, high = row["mean_times_better"][1:]
        assert low <= row["mean_times_better"][0] <= high
