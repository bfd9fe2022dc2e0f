"""The batcher beside one request at a time, first come, first served, over recorded traces.

    python -m ritocco_bench.batching times            # of the embedded model, here
    python -m ritocco_bench.batching simulate         # on those, over the 50 traces; --gpu: on a GPU's
    python -m ritocco_bench.batching real --traces 3  # the same for real, both ways in turns
    python -m ritocco_bench.batching tune             # other traces, for the weight of age

Rows go to `--out`. Seconds from request to picture; what is reported is their ratio, trace by trace, with the
95 % interval of its mean (bootstrap).
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ritocco
from ritocco.batcher import AGEING, Batcher
from ritocco.engine import Engine
from ritocco.errors import RitoccoError
from ritocco_bench import traces
from ritocco_bench.batching_times import asked_of, from_json, measured, of_ladder, to_json
from ritocco_bench.processes import BenchError
from ritocco_bench.rows import append
from ritocco_bench.simulation import Asked, Given, Outcome, batched, one_by_one
from ritocco_bench.traces import MEAN_STEPS, Trace

OUT = Path("benchmarks/results/batching.jsonl")
CAPACITY = 8
ARRIVALS: tuple[float | None, ...] = (None, 0.9)
"""Parts of what one request at a time can take; None: a burst, all at once."""
TUNING_SEEDS = range(10_000, 10_200)
RESAMPLES = 10_000
Pair = tuple[Outcome, Outcome]


def asked(trace: Trace, times: Given, load: float | None) -> list[Asked]:
    """A trace's requests of the two sizes that `times` knows, at a part of what one at a time can take."""
    sizes = sorted(times.steps)
    each = [times.start(s) + MEAN_STEPS * times.step(s, 1) + times.finish(s) for s in sizes]
    gap = 0.0 if load is None else sum(each) / len(each) / load
    drawn = zip(trace.arrivals(gap), trace.sizes, trace.steps, strict=True)
    return [Asked(at=at, size=sizes[size], steps=steps) for at, size, steps in drawn]


def simulate(
    held: Sequence[Trace], times: Given, load: float | None, *, capacity: int, ageing: float
) -> list[Pair]:
    """First come, first served, and the batcher's policy, for each trace."""
    requests = [asked(trace, times, load) for trace in held]
    return [
        (one_by_one(each, times), batched(each, times, capacity=capacity, ageing=ageing)) for each in requests
    ]


def real(engine: Engine, requests: Sequence[Asked], *, capacity: int, ageing: float) -> Pair:
    """The same with pictures: `Engine.predict` one after the other, then a Batcher."""
    inputs = [asked_of(one.size, one.steps, seed) for seed, one in enumerate(requests)]
    begun = time.perf_counter()
    ends: list[float] = []
    for one, given in zip(requests, inputs, strict=True):
        _wait_until(begun + one.at)
        engine.predict(given)
        ends.append(time.perf_counter() - begun)
    alone = _outcome(requests, ends, 1.0)
    with Batcher(engine, capacity=capacity, ageing=ageing, waiting=len(requests)) as batcher:
        begun, finished = time.perf_counter(), [0.0] * len(requests)
        lock = threading.Lock()

        def note(place: int) -> Callable[[ritocco.Ticket], None]:
            def end(_: ritocco.Ticket) -> None:
                with lock:
                    finished[place] = time.perf_counter() - begun

            return end

        tickets = []
        for place, (one, given) in enumerate(zip(requests, inputs, strict=True)):
            _wait_until(begun + one.at)
            tickets.append(batcher.submit(given))
            tickets[-1].add_done_callback(note(place))
        for ticket in tickets:
            ticket.result()
        batcher.close()
        return alone, _outcome(requests, finished, batcher.snapshot().fill)


def figures(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Ratios, trace by trace, and the mean of each with its 95 % interval.

    mean_times_better, throughput: ours is better above 1. slowest_times_worse: better below 1.
    """
    each = {
        "mean_times_better": [first.mean / ours.mean for first, ours in pairs],
        "slowest_times_worse": [ours.slowest / first.slowest for first, ours in pairs],
        "throughput": [first.end / ours.end for first, ours in pairs],
    }
    found: dict[str, Any] = {name: _interval(values) for name, values in each.items()}
    found["each"] = {name: [round(value, 4) for value in values] for name, values in each.items()}
    found["seconds"] = {
        "first come": {
            "mean": _mean(p[0].mean for p in pairs),
            "slowest": _mean(p[0].slowest for p in pairs),
        },
        "batcher": {"mean": _mean(p[1].mean for p in pairs), "slowest": _mean(p[1].slowest for p in pairs)},
    }
    found["fill"] = _mean(ours.fill for _, ours in pairs)
    return found


def said(found: dict[str, Any]) -> str:
    """The figures on a line."""
    parts = [
        f"{words} {found[name][0]:.2f} ({found[name][1]:.2f} to {found[name][2]:.2f})"
        for name, words in (
            ("mean_times_better", "mean better by"),
            ("slowest_times_worse", "slowest worse by"),
            ("throughput", "throughput"),
        )
    ]
    return f"{', '.join(parts)}; {found['fill']:.2f} pictures a step"


def draw(folder: Path, name: str, drawn: Mapping[str, Sequence[Pair]]) -> Path:
    """How many requests are done after how long, both ways, for each kind of arrivals.

    Raises BenchError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("plots need matplotlib; pip install 'ritocco[bench]'") from error
    figure = Figure(figsize=(5 * len(drawn), 3.6), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (title, pairs) in zip(panels, drawn.items(), strict=True):
        for which, label in ((0, "one at a time, first come"), (1, "Batcher")):
            waits = np.sort([wait for pair in pairs for wait in pair[which].waits])
            axes.plot(waits, np.arange(1, len(waits) + 1) / len(waits), label=label)
        axes.set(
            title=title, xlabel="seconds from request to picture", ylabel="share of requests", ylim=(0, 1)
        )
        axes.grid(alpha=0.3)
        axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"batching-{name}.png"
    figure.savefig(file, dpi=110)
    return file


def main() -> int:
    """Run a command line; 1 where something is missing."""
    arguments = _parser().parse_args()
    try:
        return int(_COMMANDS[arguments.command](arguments) or 0)
    except (BenchError, RitoccoError, OSError) as error:
        print(f"{type(error).__name__}: {error}\nNothing is reported.", file=sys.stderr)
        return 1


def _times(arguments: argparse.Namespace) -> None:
    engine = _engine(arguments)
    given = measured(engine, _sizes(arguments), repeats=arguments.repeats)
    row = {"case": "batching-times", "model": str(arguments.model or "embedded"), **to_json(given)}
    append(arguments.out, row | {"dtype": engine.traits.dtype}, device=engine.traits.device)
    for size, steps in given.steps.items():
        each = ", ".join(f"{seconds * 1000:.1f} ms at {count}" for count, seconds in steps.items())
        around = f"start {given.start(size):.3f} s, finish {given.finish(size):.3f} s"
        print(f"{size} x {size}: a step {each}; {around}")


def _simulate(arguments: argparse.Namespace) -> None:
    name, times = ("gpu", of_ladder()) if arguments.gpu else ("here", _measured(arguments))
    held = traces.read(arguments.file)[: arguments.traces]
    drawn = {}
    for load in ARRIVALS:
        pairs = simulate(held, times, load, capacity=arguments.capacity, ageing=arguments.ageing)
        title = _title(load)
        drawn[title] = pairs
        _report(arguments, f"batching-{name}", title, pairs, times)
    if arguments.plots is not None:
        print(draw(arguments.plots, name, drawn))


def _real(arguments: argparse.Namespace) -> None:
    engine, times = _engine(arguments), _measured(arguments)
    held = traces.read(arguments.file)[: arguments.traces]
    engine.predict(asked_of(min(times.steps), 2, 0))
    for load in ARRIVALS if arguments.load is None else [arguments.load or None]:
        pairs = []
        for trace in held:
            requests = asked(trace, times, load)[: arguments.requests]
            pairs.append(real(engine, requests, capacity=arguments.capacity, ageing=arguments.ageing))
            print(f"{_title(load)}, trace {trace.seed}: {said(figures(pairs[-1:]))}", flush=True)
        _report(arguments, "batching-real", _title(load), pairs, times)


def _tune(arguments: argparse.Namespace) -> None:
    """Prints alone: what is chosen is a constant of the batcher."""
    held = [traces.draw(seed) for seed in TUNING_SEEDS[: arguments.traces]]
    name, times = ("gpu", of_ladder()) if arguments.gpu else ("here", _measured(arguments))
    for ageing in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5):
        for load in ARRIVALS[1:]:
            pairs = simulate(held, times, load, capacity=arguments.capacity, ageing=ageing)
            print(f"{name}, ageing {ageing}, {_title(load)}: {said(figures(pairs))}", flush=True)


def _draw(arguments: argparse.Namespace) -> None:
    """The traces, drawn again; they are in the repository."""
    traces.write(arguments.file, [traces.draw(seed) for seed in range(arguments.traces)])


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "times": _times,
    "simulate": _simulate,
    "real": _real,
    "tune": _tune,
    "draw": _draw,
}


def _report(
    arguments: argparse.Namespace, case: str, title: str, pairs: Sequence[Pair], times: Given
) -> None:
    found = figures(pairs)
    print(f"{case}, {title}, {len(pairs)} traces: {said(found)}")
    row = {"case": case, "arrivals": title, "traces": len(pairs), "file": arguments.file.name}
    row |= {"capacity": arguments.capacity, "ageing": arguments.ageing, **found, **to_json(times)}
    append(arguments.out, row)


def _measured(arguments: argparse.Namespace) -> Given:
    """The last times in the file of results."""
    file: Path = arguments.times or arguments.out
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [row for row in map(json.loads, lines) if row["case"] == "batching-times"]
    if not rows:
        raise BenchError(f"{file} has no step times; run `python -m ritocco_bench.batching times` first")
    return from_json(rows[-1])


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval: percentiles of the means of resampled values."""
    array = np.asarray(values)
    rng = np.random.default_rng(0)
    means = array[rng.integers(0, len(array), (RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def _mean(values: Iterable[float]) -> float:
    held = list(values)
    return sum(held) / len(held)


def _outcome(requests: Sequence[Asked], ends: Sequence[float], fill: float) -> Outcome:
    waits = tuple(end - one.at for one, end in zip(requests, ends, strict=True))
    return Outcome(waits=waits, end=max(ends), fill=fill)


def _wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def _title(load: float | None) -> str:
    return "burst" if load is None else f"{load:g} of capacity"


def _engine(arguments: argparse.Namespace) -> Engine:
    return ritocco.load(arguments.model, device=arguments.device, backend="torch")


def _sizes(arguments: argparse.Namespace) -> list[int]:
    return [int(size) for size in arguments.sizes.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ritocco_bench.batching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=tuple(_COMMANDS), help="see above")
    parser.add_argument("--model", type=Path, help="default: the embedded model")
    parser.add_argument("--device", default="auto", help="times, real: auto, cpu, cuda or cuda:N")
    parser.add_argument("--sizes", default="256,512", help="times: pixels per side of the two sizes")
    parser.add_argument("--repeats", type=int, default=5, help="times: how often each is measured")
    parser.add_argument(
        "--gpu", action="store_true", help="simulate, tune: on the step times of ladder.jsonl"
    )
    parser.add_argument("--times", type=Path, help="file with the step times; default --out")
    parser.add_argument("--file", type=Path, default=traces.FILE, help="the traces")
    parser.add_argument("--traces", type=int, default=50, help="how many of them")
    parser.add_argument("--requests", type=int, default=traces.REQUESTS, help="real: of each trace")
    parser.add_argument("--load", type=float, help="real: of capacity, 0 for a burst; default: both")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="pictures that share a step")
    parser.add_argument("--ageing", type=float, default=AGEING, help="weight of age in the policy")
    parser.add_argument("--plots", type=Path, help="simulate: a folder for a PNG")
    parser.add_argument("--out", type=Path, default=OUT, help="JSONL file that rows are added to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
